"""`conv2d`, `conv2d_bn_act`, `conv2d_dgrad` and `conv2d_wgrad`: see csrc/conv2d/conv2d.h for the formulas."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..ops.conv2d import check_bn_act, check_dgrad, check_fprop, check_wgrad
from ..ops.layout import empty_nhwc
from ..ops.pointwise import Checks
from .expand import bn_act
from .pixels import wgrad
from .rows import dgrad, fprop
from .window import Window


def conv2d(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, geometry: Sequence[int], stats: bool
) -> tuple[Tensor, ...]:
    check_fprop(Checks("conv2d", "x", x), x, weight, scale, shift, geometry)
    return fprop("conv2d", x, weight, scale, shift, Window.of(weight.shape[2:], geometry), stats)


def conv2d_bn_act(
    x: Tensor, weight: Tensor, scale, shift, geometry: Sequence[int], out_scale: Tensor, out_shift: Tensor, residual,
    relu: bool, save_mask: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_bn_act(x, weight, scale, shift, geometry, out_scale, out_shift, residual, relu, save_mask)
    return bn_act(
        "conv2d_bn_act", x, scale, shift, weight, out_scale, out_shift, None, None, None,
        Window.of(weight.shape[2:], geometry), Window(), residual, relu, save_mask,
    )  # fmt: skip


def conv2d_dgrad(
    dy: Tensor, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, weight: Tensor, height: int, width: int,
    geometry: Sequence[int], addend, addend_mask, gate_u, gate_scale, gate_shift, gate_mean, addend_scale: float = 1.0,
    addend_stride: int = 0, addend_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    du = (dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, weight, height, width)
    end = (addend, addend_mask, gate_u, gate_scale, gate_shift, gate_mean, addend_scale, addend_stride, addend_offset)
    check_dgrad(*du, geometry, *end)
    return dgrad("conv2d_dgrad", *du, Window.of(weight.shape[2:], geometry), *end)


def conv2d_wgrad(
    dy: Tensor, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, x: Tensor, x_scale, x_shift,
    kernel_size: Sequence[int], geometry: Sequence[int],
) -> Tensor:  # fmt: skip
    operands = (dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, x, x_scale, x_shift)
    groups = check_wgrad(*operands, kernel_size, geometry).groups
    dw = empty_nhwc(x, (dy.shape[1], x.shape[1] // groups, *kernel_size))
    wgrad("conv2d_wgrad", *operands, Window.of(kernel_size, geometry), dw, None)
    return dw
