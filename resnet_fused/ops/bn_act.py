"""`bn_act` and its backward passes: scale, shift, residual, ReLU and the bit mask.

    z = scale*x + shift (+ residual, or + residual_scale*residual + residual_shift);  y = relu(z) or z

With residual_stride the residual has other pixels and channels than x, which is a padded shortcut: `layout.Padded`.

The fused units of `block.py` call the steps of the backward one by one; the gradient registered here serves
direct calls and exported graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .autograd import differentiable, fake, forbid_gradients
from .layout import Padded, acc_dtype, mask_shape


def _empty_mask(x: Tensor) -> Tensor:
    return x.new_empty(mask_shape(x.shape[1], x.shape[0] * x.shape[2] * x.shape[3]), dtype=torch.int32)


@fake("bn_act")
def _(x, scale, shift, residual, residual_scale, residual_shift, relu, save_mask, stride=0, offset=0):
    mask = _empty_mask(x) if save_mask else x.new_empty((0,), dtype=torch.int32)
    return torch.empty_like(x), mask


@fake("relu_mask")
def _(y):
    return _empty_mask(y)


@fake("bn_act_backward_reduce")
def _(dy, mask, x, scale, shift, mean, write_dz):
    acc = acc_dtype(dy.dtype)
    dz = torch.empty_like(dy) if write_dz else dy.new_empty((0,))
    channels = dy.shape[1]
    return (
        dz,
        dy.new_empty((channels,), dtype=acc),
        dy.new_empty((channels if mean is not None else 0,), dtype=acc),
    )


@fake("bn_act_backward_apply")
def _(dy, mask, x, scale, shift, mean, coef_dz, coef_x, coef_1, addend=None):
    return torch.empty_like(x)


forbid_gradients("relu_mask", "bn_act_backward_reduce", "bn_act_backward_apply")


def _setup(ctx, inputs, output) -> None:
    x, scale, _, residual, residual_scale, _, relu, save_mask, stride, offset = inputs
    y, mask = output
    ctx.mark_non_differentiable(mask)
    ctx.relu, ctx.saved_mask = relu, save_mask
    ctx.padded = Padded(stride, offset) if stride else None
    ctx.save_for_backward(x, scale, residual, residual_scale, mask if save_mask else (y if relu else None))


def _backward(ops, ctx, dy: Tensor, _dmask: Tensor):
    x, scale, residual, residual_scale, gate = ctx.saved_tensors
    dy = dy.contiguous(memory_format=torch.channels_last)
    mask = gate if ctx.saved_mask or gate is None else ops.relu_mask(gate)
    zero = torch.zeros_like(scale)
    dz, dshift, dscale = ops.bn_act_backward_reduce(dy, mask, x, None, None, zero, True)

    def scaled(by: Tensor) -> Tensor:
        return ops.bn_act(dz, by, zero, None, None, None, False, False)[0]

    dresidual = dresidual_scale = None
    if residual is not None:
        dresidual = dz if residual_scale is None else scaled(residual_scale)
        if ctx.padded is not None:
            dresidual = ctx.padded.adjoint(dresidual, torch.zeros_like(residual))
            residual = ctx.padded(residual, x.shape[1]).contiguous(memory_format=torch.channels_last)
        if residual_scale is not None:
            dresidual_scale = ops.bn_act_backward_reduce(dz, None, residual, None, None, zero, False)[2]
    dresidual_shift = None if residual_scale is None else dshift.clone()
    return scaled(scale), dscale, dshift, dresidual, dresidual_scale, dresidual_shift, None, None, None, None


differentiable("bn_act", _backward, _setup)
