"""`expand` and `expand_dgrad`.

A block's last 1x1 convolution with its batch norm, shortcut and ReLU in one product; and the gradient of an operand
whose batch norm has its statistics from a Gram matrix (see `gram_form.py`). csrc/expand/expand.h has the formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .aten import POINTWISE, conv
from .autograd import fake, forbid_gradients
from .dispatch import ops as _ops
from .layout import acc_dtype, empty_nhwc, mask_shape
from .pointwise import Checks, activated, added, geometry, masked, on_cpu, scattered, strided, transposed


def check_expand(
    x: Tensor, scale, shift, weight: Tensor, out_scale: Tensor, out_shift: Tensor, x2, weight2, out_scale2, stride,
    residual, relu, save_mask,
) -> None:  # fmt: skip
    check = Checks("expand", "x", x)
    n, c, h, w = x.shape
    check.together(scale=scale, shift=shift)
    check.vectors(c, scale=scale, shift=shift)
    check.weight("weight", weight, "K", c)
    k = weight.shape[0]
    check.vectors(k, out_scale=out_scale, out_shift=out_shift, out_scale2=out_scale2)
    check.together(x2=x2, weight2=weight2, out_scale2=out_scale2)
    check.stride(stride)
    if x2 is not None:
        check.activation("x2", x2)
        check.require(
            (x2.shape[0], strided(x2.shape[2], stride), strided(x2.shape[3], stride)) == (n, h, w),
            f"x2 has shape {list(x2.shape)}, of which stride {stride} does not make the pixels of x, which is "
            f"{list(x.shape)}",
        )
        check.weight("weight2", weight2, k, x2.shape[1])
    check.require(x2 is not None or stride == 1, f"stride is {stride}, expected 1 without x2")
    check.excludes("x2", x2, residual=residual)
    check.activation("residual", residual, (n, k, h, w))
    check.require(
        relu or not save_mask, "save_mask is True and relu is False, expected relu=True: only a relu has a mask"
    )


@on_cpu("expand")
def _expand(
    x: Tensor, scale, shift, weight: Tensor, out_scale: Tensor, out_shift: Tensor, x2, weight2, out_scale2, stride,
    residual, relu, save_mask,
):  # fmt: skip
    check_expand(
        x, scale, shift, weight, out_scale, out_shift, x2, weight2, out_scale2, stride, residual, relu, save_mask
    )
    u = conv(activated(x, scale, shift), weight, POINTWISE)
    if x2 is None:
        return _ops.bn_act(u, out_scale, out_shift, residual, None, None, relu, save_mask)
    u2 = conv(x2, weight2, geometry(stride))
    return _ops.bn_act(u, out_scale, out_shift, u2, out_scale2, torch.zeros_like(out_shift), relu, save_mask)


@fake("expand")
def _(
    x, scale, shift, weight, out_scale, out_shift, x2, weight2, out_scale2, stride, residual, relu, save_mask
):  # fmt: skip
    n, _, h, w = x.shape
    k = weight.shape[0]
    mask = x.new_empty(mask_shape(k, n * h * w) if save_mask else (0,), dtype=torch.int32)
    return empty_nhwc(x, (n, k, h, w)), mask


def check_expand_dgrad(
    dy: Tensor, mask, weight: Tensor, x: Tensor, scale, shift, q: Tensor, constant: Tensor, mean, stride, addend,
    addend_mask,
) -> None:  # fmt: skip
    check = Checks("expand_dgrad", "x", x)
    n, c, h, w = x.shape
    check.stride(stride)
    check.weight("weight", weight, "K", c)
    check.activation("dy", dy, (n, weight.shape[0], strided(h, stride), strided(w, stride)))
    check.mask("mask", mask, dy.shape)
    check.together(scale=scale, shift=shift)
    check.together(scale=scale, mean=mean)
    check.matrix("q", q, (c, c))
    check.vectors(c, scale=scale, shift=shift, mean=mean, constant=constant)
    check.activation("addend", addend, x.shape)
    check.mask("addend_mask", addend_mask, x.shape)
    check.needs("addend", addend, addend_mask=addend_mask)
    check.excludes("scale", scale, addend=addend)
    check.require(scale is None or stride == 1, f"stride is {stride}, expected 1 with scale")


@on_cpu("expand_dgrad")
def _expand_dgrad(
    dy: Tensor, mask, weight: Tensor, x: Tensor, scale, shift, q: Tensor, constant: Tensor, mean, stride, addend,
    addend_mask,
):  # fmt: skip
    check_expand_dgrad(dy, mask, weight, x, scale, shift, q, constant, mean, stride, addend, addend_mask)
    h, w = x.shape[2:]
    a = activated(x, scale, shift)
    through_q = conv(a, q[:, :, None, None], geometry(stride))
    da = added(conv(masked(dy, mask), transposed(weight), POINTWISE), through_q, constant)
    if scale is not None:
        return _ops.bn_act_backward_reduce(da, None, x, scale, shift, mean, True)
    dx = scattered(da, h, w, stride)
    if addend is not None:
        dx = added(dx, masked(addend, addend_mask))
    none = x.new_empty((0,), dtype=acc_dtype(x.dtype))
    return dx, none, none.clone()


@fake("expand_dgrad")
def _(dy, mask, weight, x, scale, shift, q, constant, mean, stride, addend, addend_mask):
    sums = [x.new_empty((0 if scale is None else x.shape[1],), dtype=acc_dtype(x.dtype)) for _ in range(2)]
    return empty_nhwc(x, x.shape), *sums


forbid_gradients("expand", "expand_dgrad")
