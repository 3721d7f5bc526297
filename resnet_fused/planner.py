"""Which plan each unit runs by, and why.

An end unit (the last of a chain, or a projection) either keeps its raw output for backward, computes it again, or
never has it: the Gram form (`ops/gram_form.py`). All three give the same numbers to rounding: the Gram form convolves
those outputs after all in which it would cancel, which depends on the data and so is no part of the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import tuned
from .backend import LEAN_PLANS

if TYPE_CHECKING:
    from .functional import ConvBN
    from .recorder import Call


# The Gram form's arithmetic beyond fprop + dgrad + wgrad, as a share of them, up to which it is preferred to
# running the convolution again (a share of 1/3).
_GRAM_SHARE = 1 / 3


def gram_share(pixels: int, c: int, k: int) -> float:
    """Extra FLOPs of the Gram form over those of the plain 1x1 unit, forward and backward.

    Forward M C C (Gram) + K C C (W Cov), backward M C C (a Q) + K C C (Q), against 3 M C K.
    """
    return 2 * (pixels + k) * c / (3 * pixels * k)


class EndUnit(NamedTuple):
    """What decides between an end unit's lean plans; by its text `tune` remembers the quicker one."""

    x_shape: tuple[int, ...]  # [N, C, H, W] of its input
    weight: tuple[int, ...]
    stride: tuple[int, int]
    projection: bool
    dtype: torch.dtype
    kernels: bool  # whether the matrix kernels take it

    def __str__(self) -> str:
        kind = "projection" if self.projection else "last"
        sizes = ",".join(map(str, self.x_shape))
        where = "kernels" if self.kernels else "aten"
        return f"{kind} {self.dtype}[{sizes}] to {self.weight[0]} stride {self.stride[0]},{self.stride[1]} {where}"


_forced: str | None = None


@contextmanager
def forced_plan(plan: str) -> Iterator[None]:
    """Within the block end units run by this one of LEAN_PLANS where they can."""
    global _forced
    before, _forced = _forced, plan
    try:
        yield
    finally:
        _forced = before


def _settled(unit: EndUnit, device: torch.device | None) -> tuple[str, str] | None:
    """(plan, reason) of a unit that can take either lean plan, if one is forced or was measured."""
    if _forced is not None:
        return _forced, "as it was asked for"
    if device is None or torch.compiler.is_compiling():
        return None
    entry = tuned.table(device).entries.get(str(unit))
    if entry is None or entry.winner not in LEAN_PLANS:
        return None
    times = ", ".join(f"{plan} {1e3 * seconds:.2f} ms" for plan, seconds in entry.seconds.items())
    return entry.winner, f"measured: {times}"


def gram_obstacle(
    unit: ConvBN, x_shape: tuple[int, ...], projection: bool, dtype: torch.dtype, kernels: bool
) -> str | None:
    """Why a unit cannot take the Gram form; None if it can. kernels: whether the matrix kernels run it."""
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
    return None


def _arithmetic(unit: ConvBN, x_shape: tuple[int, ...], kernels: bool) -> str | None:
    """Why a unit that can take the Gram form should not; None if it should.

    Matrix kernels are bound by memory up to far more channels than a ResNet has: for M pixels the Gram form costs them
    about 4 M C C FLOPs more and moves 10 M K bytes less.
    """
    k, c = unit.weight.shape[:2]
    if kernels and c % 8 == 0 and k % 8 == 0:
        return None
    n, _, p, q = unit.geometry.out_shape(x_shape, unit.weight.shape)
    share = gram_share(n * p * q, c, k)
    return f"the Gram form would add {round(100 * share)}% of arithmetic" if share > _GRAM_SHARE else None


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
    device: torch.device | None = None,
) -> tuple[str, str]:
    """(plan, reason) of an end unit with input shape [N, C, H, W]; `special` and `device` as in `explain_units`."""
    if memory == "fast":
        return "keep", "memory='fast'"
    if 0 in x_shape:
        return "keep", "an empty batch"
    if unit.weight.shape[2:] != (1, 1):
        return "keep", "running a k x k convolution again costs more than its output"
    obstacle = special or gram_obstacle(unit, x_shape, projection, dtype, kernels)
    if obstacle is None:
        asked = EndUnit(tuple(x_shape), tuple(unit.weight.shape), unit.stride, projection, dtype, kernels)
        if (settled := _settled(asked, device)) is not None:
            return settled
        obstacle = _arithmetic(unit, x_shape, kernels)
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
    device: torch.device | None = None,
) -> list[str]:
    """The plan of every unit of a block; the projection is the last of `units` if `projected`."""
    return [plan for plan, _ in explain_units(x_shape, units, projected, memory, dtype, kernels, special, device)]


def explain_units(
    x_shape: tuple[int, ...],
    units: Sequence[ConvBN],
    projected: bool,
    memory: str,
    dtype: torch.dtype,
    kernels: bool = False,
    special: str | None = None,
    device: torch.device | None = None,
) -> list[tuple[str, str]]:
    """(plan, reason) of every unit. `special`: what the shortcut is, if it is more than a tensor to be added; `device`:
    whose measurements decide where there are any."""
    last = len(units) - 1 - projected
    shape = x_shape
    plans: list[tuple[str, str]] = []
    for i, unit in enumerate(units[: last + 1]):
        inner = ("keep", "its activation is recomputed from its raw output")
        plans.append(plan_end(unit, shape, False, memory, dtype, kernels, special, device) if i == last else inner)
        shape = unit.geometry.out_shape(shape, unit.weight.shape)
    if projected:
        plans.append(plan_end(units[-1], x_shape, True, memory, dtype, kernels, None, device))
    return plans


def end_units(call: Call) -> Iterator[tuple[EndUnit, ConvBN]]:
    """The units of a recorded block that can take either lean plan."""
    spec: Any = call.spec
    if spec is None or not hasattr(spec, "shortcut") or special_shortcut(spec.shortcut, spec.shortcut_scale):
        return
    shape = call.x_shape
    for unit in call.units[:-1]:
        shape = unit.geometry.out_shape(shape, unit.weight.shape)
    ends = [(call.units[-1], shape, False)]
    if spec.shortcut == "projection":
        ends.append((call.shortcut, call.x_shape, True))
    for planned, (unit, x_shape, projection) in zip(spec.units[spec.chain - 1 :], ends, strict=True):
        if planned.plan in LEAN_PLANS and not gram_obstacle(unit, x_shape, projection, call.dtype, call.kernels):
            key = (tuple(x_shape), tuple(unit.weight.shape), unit.stride, projection, call.dtype, call.kernels)
            yield EndUnit(*key), unit
