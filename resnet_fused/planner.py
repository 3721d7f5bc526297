"""Which plan each unit runs by, and why.

An end unit (the last of a chain, or a projection) either keeps its raw output for backward, computes it again, or
never has it: the Gram form (`ops/gram_form.py`). All three give the same numbers to rounding: the Gram form convolves
those outputs after all in which it would cancel, which depends on the data and so is no part of the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .functional import ConvBN

# The Gram form's arithmetic beyond fprop + dgrad + wgrad, as a share of them, up to which it is preferred to
# running the convolution again (a share of 1/3).
_GRAM_SHARE = 1 / 3


def gram_share(pixels: int, c: int, k: int) -> float:
    """Extra FLOPs of the Gram form over those of the plain 1x1 unit, forward and backward.

    Forward M C C (Gram) + K C C (W Cov), backward M C C (a Q) + K C C (Q), against 3 M C K.
    """
    return 2 * (pixels + k) * c / (3 * pixels * k)


def gram_obstacle(
    unit: ConvBN, x_shape: tuple[int, ...], projection: bool, dtype: torch.dtype, kernels: bool
) -> str | None:
    """Why a unit cannot, or should not, take the Gram form; None if it should.

    kernels: whether the matrix kernels run it. They are bound by memory up to far more channels than a ResNet has: for
    M pixels the Gram form costs them about 4 M C C FLOPs more and moves 10 M K bytes less.
    """
    k, c, r, s = unit.weight.shape
    if (r, s) != (1, 1) or unit.groups != 1 or unit.padding != (0, 0):
        return "not a dense 1x1 convolution"
    if not unit.batch_stats:
        return "statistics are given, not the batch's"
    if kernels and c % 8 == 0 and k % 8 == 0:
        return None if unit.stride == (1, 1) or (projection and unit.stride[0] == unit.stride[1]) else "strided"
    if dtype == torch.float16:  # the sums over pixels come out of a convolution's wgrad, in its type
        return "the Gram form's sums over pixels may leave float16's range"
    if unit.stride[0] != unit.stride[1] or (unit.stride != (1, 1) and not projection):
        return "strided"
    n, _, p, q = unit.geometry.out_shape(x_shape, unit.weight.shape)
    share = gram_share(n * p * q, c, k)
    if share > _GRAM_SHARE:
        return f"the Gram form would add {round(100 * share)}% of arithmetic"
    return None


def special_shortcut(kind: str, scale: float) -> str | None:
    """What a shortcut of this kind is, if it is more than a tensor to be added."""
    if kind == "padded":
        return "the shortcut is strided and padded where it is read"
    if kind == "concat":
        return "the output is written beside the shortcut's"
    return None if scale == 1 else "the shortcut is scaled where it is read"


def plan_end(
    unit: ConvBN,
    x_shape: tuple[int, ...],
    projection: bool,
    memory: str,
    dtype: torch.dtype,
    kernels: bool,
    special: str | None = None,
) -> tuple[str, str]:
    """(plan, reason) of an end unit with input shape [N, C, H, W]; `special` as in `explain_units`."""
    if memory == "fast":
        return "keep", "memory='fast'"
    if unit.weight.shape[2:] != (1, 1):
        return "keep", "running a k x k convolution again costs more than its output"
    obstacle = special or gram_obstacle(unit, x_shape, projection, dtype, kernels)
    if obstacle is None:
        return "gram", "its statistics follow from its operand's Gram matrix"
    return "recompute", obstacle


def plan_units(
    x_shape: tuple[int, ...],
    units: Sequence[ConvBN],
    projected: bool,
    memory: str,
    dtype: torch.dtype,
    kernels: bool = False,
    special: str | None = None,
) -> list[str]:
    """The plan of every unit of a block; the projection is the last of `units` if `projected`."""
    return [plan for plan, _ in explain_units(x_shape, units, projected, memory, dtype, kernels, special)]


def explain_units(
    x_shape: tuple[int, ...],
    units: Sequence[ConvBN],
    projected: bool,
    memory: str,
    dtype: torch.dtype,
    kernels: bool = False,
    special: str | None = None,
) -> list[tuple[str, str]]:
    """(plan, reason) of every unit. `special`: what the shortcut is, if it is more than a tensor to be added."""
    last = len(units) - 1 - projected
    shape = x_shape
    plans: list[tuple[str, str]] = []
    for i, unit in enumerate(units[: last + 1]):
        inner = ("keep", "its activation is recomputed from its raw output")
        plans.append(plan_end(unit, shape, False, memory, dtype, kernels, special) if i == last else inner)
        shape = unit.geometry.out_shape(shape, unit.weight.shape)
    if projected:
        plans.append(plan_end(units[-1], x_shape, True, memory, dtype, kernels))
    return plans
