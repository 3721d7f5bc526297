"""`conv2d`, `conv2d_bn_act`, `conv2d_dgrad` and `conv2d_wgrad`: a k x k convolution with the batch norms around it.

The same as `conv1x1.py` for any kernel, padding, dilation and groups; csrc/conv2d/conv2d.h has the formulas. The
geometry comes as seven integers: stride, padding and dilation, each down and across, and groups. Weights are
[K, C / groups, R, S] in channels_last, which is KRSC in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .aten import Geometry, conv, conv_backward
from .autograd import fake, forbid_gradients
from .dispatch import ops as _ops
from .layout import empty_nhwc, mask_shape, to_nhwc
from .pointwise import Checks, activated, check_backward, dgrad_added, masked, on_cpu, vector_like


def encoded(g: Geometry) -> list[int]:
    """A geometry as the ops take it."""
    return [*g.stride, *g.padding, *g.dilation, g.groups]


def _decoded(check: Checks, numbers: list[int]) -> Geometry:
    check.require(
        len(numbers) == 7,
        f"geometry is {list(numbers)}, expected stride, padding and dilation, two integers each, and groups",
    )
    stride, padding, dilation, groups = tuple(numbers[:2]), tuple(numbers[2:4]), tuple(numbers[4:6]), numbers[6]
    check.require(
        min(*stride, *dilation, groups) >= 1,
        f"geometry is {list(numbers)}, expected strides, dilations and groups from 1",
    )
    check.require(min(padding) >= 0, f"geometry is {list(numbers)}, expected paddings from 0")
    return _geometry(numbers)


def _geometry(g: list[int]) -> Geometry:
    return Geometry((g[0], g[1]), (g[2], g[3]), (g[4], g[5]), g[6])


def _check_weight(check: Checks, weight: Tensor, k: int | None, c: int, groups: int) -> None:
    check.tensor("weight", weight, "K" if k is None else k, "C / groups", "R", "S")
    check.require(
        weight.shape[0] % groups == 0 and weight.shape[1] * groups == c,
        f"weight has shape {list(weight.shape)}, which does not convolve {c} channels in {groups} groups",
    )
    check.dense("weight", weight)


def check_fprop(check: Checks, x: Tensor, weight: Tensor, scale, shift, geometry) -> Geometry:
    g = _decoded(check, geometry)
    _check_weight(check, weight, None, x.shape[1], g.groups)
    check.together(scale=scale, shift=shift)
    check.vectors(x.shape[1], scale=scale, shift=shift)
    check.require(
        min(g.out_shape(x.shape, weight.shape)[2:]) >= 1,
        f"x has shape {list(x.shape)}, smaller than the kernel {list(weight.shape[2:])} with geometry {list(geometry)}",
    )
    return g


def _check_output(check: Checks, dy: Tensor, shape: tuple[int, ...]) -> None:
    check.require(
        tuple(dy.shape) == tuple(shape),
        f"dy has shape {list(dy.shape)}, expected the convolution's output, {list(shape)}",
    )


@on_cpu("conv2d")
def _fprop(x: Tensor, weight: Tensor, scale, shift, geometry, stats):
    g = check_fprop(Checks("conv2d", "x", x), x, weight, scale, shift, geometry)
    out = conv(activated(x, scale, shift), weight, g)
    return out, *(_ops.bn_stats(out) if stats else (vector_like(x, 0), vector_like(x, 0)))


@fake("conv2d")
def _(x, weight, scale, shift, geometry, stats):
    out = empty_nhwc(x, _geometry(geometry).out_shape(x.shape, weight.shape))
    return out, vector_like(x, weight.shape[0], stats), vector_like(x, weight.shape[0], stats)


def check_bn_act(
    x: Tensor, weight: Tensor, scale, shift, geometry, out_scale, out_shift, residual, relu, save_mask
) -> Geometry:
    check = Checks("conv2d_bn_act", "x", x)
    g = check_fprop(check, x, weight, scale, shift, geometry)
    shape = g.out_shape(x.shape, weight.shape)
    check.vectors(shape[1], out_scale=out_scale, out_shift=out_shift)
    check.activation("residual", residual, shape)
    check.require(
        relu or not save_mask,
        "save_mask is True and relu is False, expected relu=True: only a relu has a mask",
    )
    return g


@on_cpu("conv2d_bn_act")
def _bn_act(x: Tensor, weight: Tensor, scale, shift, geometry, out_scale, out_shift, residual, relu, save_mask):
    g = check_bn_act(x, weight, scale, shift, geometry, out_scale, out_shift, residual, relu, save_mask)
    out = conv(activated(x, scale, shift), weight, g)
    return _ops.bn_act(out, out_scale, out_shift, residual, None, None, relu, save_mask)


@fake("conv2d_bn_act")
def _(x, weight, scale, shift, geometry, out_scale, out_shift, residual, relu, save_mask):
    n, k, p, q = shape = _geometry(geometry).out_shape(x.shape, weight.shape)
    mask = x.new_empty(mask_shape(k, n * p * q) if save_mask else (0,), dtype=torch.int32)
    return empty_nhwc(x, shape), mask


def check_dgrad(
    dy: Tensor, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, weight: Tensor, height, width, geometry,
    addend, addend_mask, gate_u, gate_scale, gate_shift, gate_mean, addend_scale, addend_stride, addend_offset,
) -> Geometry:  # fmt: skip
    check = Checks("conv2d_dgrad", "dy", dy)
    check_backward(check, dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1)
    check.needs("u", u, mask=mask)
    g = _decoded(check, geometry)
    c = weight.shape[1] * g.groups if weight.dim() == 4 else 0
    _check_weight(check, weight, dy.shape[1], c, g.groups)
    shape = (dy.shape[0], c, height, width)
    _check_output(check, dy, g.out_shape(shape, weight.shape))
    check.dgrad_end(shape, addend, addend_mask, gate_u, gate_scale, gate_shift, gate_mean, addend_stride, addend_offset)
    check.require(addend_scale != 0, "addend_scale is 0, expected another value")
    return g


@on_cpu("conv2d_dgrad")
def _dgrad(
    dy: Tensor, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, weight: Tensor, height, width, geometry,
    addend, addend_mask, gate_u, gate_scale, gate_shift, gate_mean, addend_scale=1.0, addend_stride=0, addend_offset=0,
):  # fmt: skip
    g = check_dgrad(
        dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, weight, height, width, geometry,
        addend, addend_mask, gate_u, gate_scale, gate_shift, gate_mean, addend_scale, addend_stride, addend_offset,
    )  # fmt: skip
    shape = (dy.shape[0], weight.shape[1] * g.groups, height, width)
    du = dy
    if u is not None:
        du = _ops.bn_act_backward_apply(dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1)
    x = empty_nhwc(dy, shape)  # only its shape is read
    dx = conv_backward(du, x, weight, g, True, False)[0]
    if gate_u is not None:
        return _ops.bn_act_backward_reduce(dx, None, gate_u, gate_scale, gate_shift, gate_mean, True)
    if addend is not None:
        dx = dgrad_added(dx, masked(addend, addend_mask), addend_scale, addend_stride, addend_offset)
    return dx, vector_like(dy, 0), vector_like(dy, 0)


@fake("conv2d_dgrad")
def _(
    dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, weight, height, width, geometry,
    addend, addend_mask, gate_u, gate_scale, gate_shift, gate_mean, addend_scale=1.0, addend_stride=0, addend_offset=0,
):  # fmt: skip
    c, gated = weight.shape[1] * geometry[6], gate_u is not None
    return empty_nhwc(dy, (dy.shape[0], c, height, width)), vector_like(dy, c, gated), vector_like(dy, c, gated)


def check_wgrad(
    dy: Tensor, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, x: Tensor, x_scale, x_shift, kernel_size, geometry
) -> Geometry:  # fmt: skip
    check = Checks("conv2d_wgrad", "dy", dy)
    check_backward(check, dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1)
    check.needs("u", u, mask=mask)
    g = _decoded(check, geometry)
    check.require(
        len(kernel_size) == 2 and min(kernel_size) >= 1,
        f"kernel_size is {list(kernel_size)}, expected two integers from 1",
    )
    check.activation("x", x)
    k, c = dy.shape[1], x.shape[1]
    check.require(
        k % g.groups == 0 and c % g.groups == 0,
        f"geometry is {list(geometry)}, whose {g.groups} groups divide not both dy's channels, {k}, and x's, {c}",
    )
    weight_shape = (k, c // g.groups, *kernel_size)
    _check_output(check, dy, g.out_shape(x.shape, weight_shape))
    check.together(x_scale=x_scale, x_shift=x_shift)
    check.vectors(c, x_scale=x_scale, x_shift=x_shift)
    return g


@on_cpu("conv2d_wgrad")
def _wgrad(
    dy: Tensor, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, x: Tensor, x_scale, x_shift, kernel_size, geometry
):  # fmt: skip
    g = check_wgrad(
        dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, x, x_scale, x_shift, kernel_size, geometry
    )  # fmt: skip
    weight_shape = (dy.shape[1], x.shape[1] // g.groups, *kernel_size)
    du = dy
    if u is not None:
        du = _ops.bn_act_backward_apply(dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1)
    weight = empty_nhwc(x, weight_shape)  # only its shape is read
    return to_nhwc(conv_backward(du, activated(x, x_scale, x_shift), weight, g, False, True)[1])


@fake("conv2d_wgrad")
def _(dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, x, x_scale, x_shift, kernel_size, geometry):
    return empty_nhwc(x, (dy.shape[1], x.shape[1] // geometry[6], *kernel_size))


forbid_gradients("conv2d", "conv2d_bn_act", "conv2d_dgrad", "conv2d_wgrad")
