"""`conv1x1`, `conv1x1_dgrad` and `conv1x1_wgrad`: a 1x1 convolution with the batch norms around it.

What a batch norm and ReLU do to the operand, what they do to the gradients, and the statistics and sums that the next
one needs are parts of the products: csrc/conv1x1/conv1x1.h has the formulas.
"""

from __future__ import annotations

from torch import Tensor

from .aten import POINTWISE, conv, conv_backward
from .autograd import fake, forbid_gradients
from .dispatch import ops as _ops
from .layout import acc_dtype, empty_nhwc
from .pointwise import (
    Checks,
    activated,
    check_backward,
    dgrad_added,
    geometry,
    masked,
    on_cpu,
    scattered,
    strided,
    transposed,
    vector_like,
)


def check_fprop(x: Tensor, weight: Tensor, scale, shift, stride) -> None:
    check = Checks("conv1x1", "x", x)
    check.stride(stride)
    check.weight("weight", weight, "K", x.shape[1])
    check.together(scale=scale, shift=shift)
    check.vectors(x.shape[1], scale=scale, shift=shift)


@on_cpu("conv1x1")
def _fprop(x: Tensor, weight: Tensor, scale, shift, stride, stats):
    check_fprop(x, weight, scale, shift, stride)
    out = conv(activated(x, scale, shift), weight, geometry(stride))
    return out, *(_ops.bn_stats(out) if stats else (vector_like(x, 0), vector_like(x, 0)))


@fake("conv1x1")
def _(x, weight, scale, shift, stride, stats):
    n, _, h, w = x.shape
    k = weight.shape[0]
    out = empty_nhwc(x, (n, k, strided(h, stride), strided(w, stride)))
    return out, vector_like(x, k, stats), vector_like(x, k, stats)


def check_dgrad(
    dy: Tensor, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, weight: Tensor, height, width, stride,
    addend, addend_mask, gate_u, gate_scale, gate_shift, gate_mean, addend_scale, addend_stride, addend_offset,
) -> None:  # fmt: skip
    check = Checks("conv1x1_dgrad", "dy", dy)
    n, k, *pixels = dy.shape
    check_backward(check, dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1)
    check.needs("u", u, mask=mask)
    check.stride(stride)
    check.require(
        pixels == [strided(height, stride), strided(width, stride)],
        f"dy has shape {list(dy.shape)}, which is not the output's for height {height}, width {width} and stride "
        f"{stride}",
    )
    check.weight("weight", weight, k, "C")
    shape = (n, weight.shape[1], height, width)
    check.dgrad_end(shape, addend, addend_mask, gate_u, gate_scale, gate_shift, gate_mean, addend_stride, addend_offset)
    check.require(addend_scale != 0, "addend_scale is 0, expected another value")
    check.require(gate_u is None or stride == 1, f"stride is {stride}, expected 1 with gate_u")


@on_cpu("conv1x1_dgrad")
def _dgrad(
    dy: Tensor, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, weight: Tensor, height, width, stride,
    addend, addend_mask, gate_u, gate_scale, gate_shift, gate_mean, addend_scale=1.0, addend_stride=0, addend_offset=0,
):  # fmt: skip
    check_dgrad(
        dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, weight, height, width, stride,
        addend, addend_mask, gate_u, gate_scale, gate_shift, gate_mean, addend_scale, addend_stride, addend_offset,
    )  # fmt: skip
    du = dy
    if u is not None:
        du = _ops.bn_act_backward_apply(dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1)
    dx = scattered(conv(du, transposed(weight), POINTWISE), height, width, stride)
    if gate_u is not None:
        return _ops.bn_act_backward_reduce(dx, None, gate_u, gate_scale, gate_shift, gate_mean, True)
    if addend is not None:
        dx = dgrad_added(dx, masked(addend, addend_mask), addend_scale, addend_stride, addend_offset)
    return dx, vector_like(dy, 0), vector_like(dy, 0)


@fake("conv1x1_dgrad")
def _(
    dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, weight, height, width, stride,
    addend, addend_mask, gate_u, gate_scale, gate_shift, gate_mean, addend_scale=1.0, addend_stride=0, addend_offset=0,
):  # fmt: skip
    c, gated = weight.shape[1], gate_u is not None
    return empty_nhwc(dy, (dy.shape[0], c, height, width)), vector_like(dy, c, gated), vector_like(dy, c, gated)


def check_wgrad(
    dy: Tensor, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, x: Tensor, x_scale, x_shift, stride, sums
) -> None:  # fmt: skip
    check = Checks("conv1x1_wgrad", "dy", dy)
    check_backward(check, dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1)
    check.stride(stride)
    check.require(u is None or not sums, "sums is True with u, expected False: sums are those of dy * mask")
    check.activation("x", x)
    n, c, h, w = x.shape
    k = dy.shape[1]
    check.require(
        dy.shape == (n, k, strided(h, stride), strided(w, stride)),
        f"x has shape {list(x.shape)}, of which stride {stride} does not make dy's, which is {list(dy.shape)}",
    )
    check.together(x_scale=x_scale, x_shift=x_shift)
    check.vectors(c, x_scale=x_scale, x_shift=x_shift)


@on_cpu("conv1x1_wgrad")
def _wgrad(
    dy: Tensor, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, x: Tensor, x_scale, x_shift, stride, wide, sums
):  # fmt: skip
    check_wgrad(dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, x, x_scale, x_shift, stride, sums)
    k, c = dy.shape[1], x.shape[1]
    sum_dz = vector_like(dy, 0)
    if u is not None:
        du = _ops.bn_act_backward_apply(dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1)
    elif sums:
        du, sum_dz, _ = _ops.bn_act_backward_reduce(dy, mask, None, None, None, None, mask is not None)
        du = dy if mask is None else du
    else:
        du = masked(dy, mask)
    a = activated(x, x_scale, x_shift)
    if wide:  # the product's sums would be rounded to the operands' type
        du, a = du.to(acc_dtype(x.dtype)), a.to(acc_dtype(x.dtype))
    _, dw = conv_backward(du, a, a.new_empty((k, c, 1, 1)), geometry(stride), False, True)
    return dw.reshape(k, c).view(k, c, 1, 1), sum_dz


@fake("conv1x1_wgrad")
def _(dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, x, x_scale, x_shift, stride, wide, sums):
    k = dy.shape[1]
    dw = x.new_empty((k, x.shape[1], 1, 1), dtype=acc_dtype(x.dtype) if wide else x.dtype)
    return dw, vector_like(dy, k, sums)


forbid_gradients("conv1x1", "conv1x1_dgrad", "conv1x1_wgrad")
