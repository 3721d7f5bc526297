"""Which kernels run a unit's convolution, or why it goes through ATen.

A dense 1x1 convolution takes `conv1x1`; every other one `conv2d`, if its plans take the problem: they are asked, for
fprop, dgrad and wgrad each, so that what runs is what they say.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import plans
from .aten import Geometry
from .conv2d import encoded
from .dispatch import ops as _ops

NO_NORM = (None,) * 8  # in place of a batch norm's backward, behind dy
Affine = tuple[Tensor | None, Tensor | None]
Shape = tuple[int, ...]
_ANY = 16  # an address, for plans that depend on whether an operand is there


class Route(NamedTuple):
    """`kernel`: "conv1x1", "conv2d" or "aten". `fprop`, `dgrad`, `wgrad`: why ATen runs it; None if the kernel does."""

    kernel: str
    fprop: str | None = None
    dgrad: str | None = None
    wgrad: str | None = None

    @classmethod
    def aten(cls, reason: str) -> Route:
        return cls("aten", reason, reason, reason)

    @property
    def whole(self) -> bool:
        """Whether a kernel runs all three."""
        return not (self.fprop or self.dgrad or self.wgrad)

    def conv(self, u: Tensor, weight: Tensor, affine: Affine, g: Geometry, stats: bool) -> list[Tensor]:
        """fprop of relu(affine(u)), or u: (raw output, its mean and variance or empty ones)."""
        if self.kernel == "conv1x1":
            return list(_ops.conv1x1(u, weight, *affine, g.stride[0], stats))
        return list(_ops.conv2d(u, weight, *affine, encoded(g), stats))

    def conv_dgrad(self, du: Sequence[Any], weight: Tensor, u: Tensor, g: Geometry, end: Sequence[Any]) -> list[Tensor]:
        """(gradient of u's activation, or of what gates it; its sums). du: dy and the batch norm's backward on load,
        nine arguments; end: what the ops take from the addend on."""
        if self.kernel == "conv1x1":
            return list(_ops.conv1x1_dgrad(*du, weight, *u.shape[2:], g.stride[0], *end))
        return list(_ops.conv2d_dgrad(*du, weight, *u.shape[2:], encoded(g), *end))

    def conv_wgrad(self, du: Sequence[Any], u: Tensor, affine: Affine, weight: Tensor, g: Geometry) -> Tensor:
        if self.kernel == "conv1x1":
            return _ops.conv1x1_wgrad(*du, u, *affine, g.stride[0], False, False)[0]
        return _ops.conv2d_wgrad(*du, u, *affine, weight.shape[2:], encoded(g))


def arch_of(x: Tensor) -> int:
    """The compute capability, times ten, for which plans of x's kernels are made."""
    if not x.is_cuda:
        return 80
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


@lru_cache(maxsize=4096)
def route_of(
    geometry: Geometry, weight: Shape, activated: bool, x_shape: Shape, dtype: torch.dtype, arch: int
) -> Route:
    """For weights [K, C/groups, R, S] and an input [N, C, H, W]; `activated`: the input is relu(s u + t)."""
    if not is_pointwise(geometry, weight, activated):
        return _conv2d(geometry, weight, activated, x_shape, dtype, arch)
    if weight[0] % 8 or weight[1] % 8:
        return Route.aten("its channels are not multiples of 8")
    return Route("conv1x1")


def is_pointwise(g: Geometry, weight: Shape, activated: bool) -> bool:
    """Whether `conv1x1` is the op for a unit."""
    one = weight[2:] == (1, 1) and g.groups == 1 and g.padding == (0, 0)
    return one and g.stride[0] == g.stride[1] and (g.stride[0] == 1 or not activated)


def _conv2d(g: Geometry, weight: Shape, activated: bool, x_shape: Shape, dtype: torch.dtype, arch: int) -> Route:
    (n, c, h, w), (k, _, r, s) = x_shape, weight
    sizes: dict[str, int | torch.dtype] = {
        "N": n,
        "C": c,
        "H": h,
        "W": w,
        "K": k,
        "R": r,
        "S": s,
        "groups": g.groups,
        "dtype": dtype,
    }
    for name in ("stride", "padding", "dilation"):
        sizes |= {f"{name}_h": getattr(g, name)[0], f"{name}_w": getattr(g, name)[1]}
    affine = {"scale": _ANY, "shift": _ANY} if activated else {}
    operand = {f"x_{name}": at for name, at in affine.items()}
    backward = dict.fromkeys(("u", "mask", "mean", "coef_dz", "coef_x", "coef_1"), _ANY)
    reasons = [
        plans.plan("conv2d", sizes, arch, affine).reason,
        plans.plan("conv2d_dgrad", sizes, arch, backward).reason,
        plans.plan("conv2d_wgrad", sizes, arch, backward | operand).reason,
    ]
    if all(reasons):
        return Route("aten", *reasons)
    return Route("conv2d", *(reason or None for reason in reasons))
