"""`gate_act` and its backward: y = relu((1 - g) x + g f) with g = sigmoid(v), one pass each."""

from __future__ import annotations

import torch
from torch import Tensor

from .autograd import differentiable, fake, forbid_gradients
from .layout import mask_shape, to_nhwc


@fake("gate_act")
def _(v: Tensor, x, f, relu, save_mask):
    n, c, h, w = v.shape
    mask = v.new_empty(mask_shape(c, n * h * w) if save_mask else (0,), dtype=torch.int32)
    return torch.empty_like(v), mask


@fake("gate_act_backward")
def _(dy, mask, v, x, f):
    return torch.empty_like(dy), torch.empty_like(dy), torch.empty_like(dy)


forbid_gradients("gate_act_backward")


def _setup(ctx, inputs, output) -> None:
    v, x, f, relu, save_mask = inputs
    y, mask = output
    ctx.mark_non_differentiable(mask)
    ctx.saved_mask = save_mask
    ctx.save_for_backward(v, x, f, mask if save_mask else (y if relu else None))


def _backward(ops, ctx, dy: Tensor, _dmask: Tensor):
    v, x, f, gate = ctx.saved_tensors
    mask = gate if ctx.saved_mask or gate is None else ops.relu_mask(gate)
    return *ops.gate_act_backward(to_nhwc(dy), mask, v, x, f), None, None


differentiable("gate_act", _backward, _setup)
