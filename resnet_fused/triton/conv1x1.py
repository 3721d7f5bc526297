"""`conv1x1`, `conv1x1_dgrad` and `conv1x1_wgrad`: see csrc/conv1x1/conv1x1.h for the formulas."""

from __future__ import annotations

from torch import Tensor

from ..ops.conv1x1 import check_dgrad, check_fprop, check_wgrad
from ..ops.layout import acc_dtype
from ..ops.pointwise import vector_like
from .pixels import wgrad
from .rows import dgrad, fprop
from .window import Window


def _strided(stride: int) -> Window:
    return Window(stride_h=stride, stride_w=stride)


def conv1x1(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, stride: int, stats: bool
) -> tuple[Tensor, ...]:
    check_fprop(x, weight, scale, shift, stride)
    return fprop("conv1x1", x, weight, scale, shift, _strided(stride), stats)


def conv1x1_dgrad(
    dy: Tensor, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, weight: Tensor, height: int, width: int,
    stride: int, addend, addend_mask, gate_u, gate_scale, gate_shift, gate_mean, addend_scale: float = 1.0,
    addend_stride: int = 0, addend_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    du = (dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, weight, height, width)
    end = (addend, addend_mask, gate_u, gate_scale, gate_shift, gate_mean, addend_scale, addend_stride, addend_offset)
    check_dgrad(*du, stride, *end)
    return dgrad("conv1x1_dgrad", *du, _strided(stride), *end)


def conv1x1_wgrad(
    dy: Tensor, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, x: Tensor, x_scale, x_shift, stride: int,
    wide: bool, sums: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    operands = (dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, x, x_scale, x_shift)
    check_wgrad(*operands, stride, sums)
    k = dy.shape[1]
    dw = x.new_empty((k, x.shape[1], 1, 1), dtype=acc_dtype(x.dtype) if wide else x.dtype)
    sum_dz = vector_like(dy, k, sums)
    wgrad("conv1x1_wgrad", *operands, _strided(stride), dw, sum_dz if sums else None)
    return dw, sum_dz
