"""`concat_act` and its backward: y = [x | act(scale*u + shift)] along the channels, written once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .autograd import differentiable, fake, forbid_gradients
from .layout import acc_dtype, empty_nhwc, mask_shape, to_nhwc


@fake("concat_act")
def _(x: Tensor, u: Tensor, scale, shift, relu, save_mask):
    n, k, h, w = u.shape
    mask = u.new_empty(mask_shape(k, n * h * w) if save_mask else (0,), dtype=torch.int32)
    return empty_nhwc(u, (n, x.shape[1] + k, h, w)), mask


@fake("concat_act_backward")
def _(dy: Tensor, mask, u, mean, before):
    n, channels, h, w = dy.shape
    k, acc = channels - before, acc_dtype(dy.dtype)
    sums = dy.new_empty((k,), dtype=acc), dy.new_empty((k if mean is not None else 0,), dtype=acc)
    return empty_nhwc(dy, (n, k, h, w)), *sums


forbid_gradients("concat_act_backward")


def _setup(ctx, inputs, output) -> None:
    x, u, scale, _, relu, save_mask = inputs
    y, mask = output
    ctx.mark_non_differentiable(mask)
    ctx.before, ctx.saved_mask = x.shape[1], save_mask
    ctx.save_for_backward(u, scale, mask if save_mask else (y if relu else None))


def _backward(ops: Any, ctx: Any, dy: Tensor, _dmask: Tensor):
    u, scale, gate = ctx.saved_tensors
    mask = gate
    if gate is not None and not ctx.saved_mask:
        mask = ops.relu_mask(to_nhwc(gate[:, ctx.before :]))
    zero = torch.zeros_like(scale)
    dz, dshift, dscale = ops.concat_act_backward(to_nhwc(dy), mask, u, zero, ctx.before)
    du = ops.bn_act(dz, scale, zero, None, None, None, False, False)[0]
    return dy[:, : ctx.before], du, dscale, dshift, None, None


differentiable("concat_act", _backward, _setup)
