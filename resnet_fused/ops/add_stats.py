"""`add_stats`: y = x + u, or x + scale*u + shift, with the mean and biased variance of y from the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .autograd import differentiable, fake
from .layout import acc_dtype, pixels_of


@fake("add_stats")
def _(x: Tensor, u, scale, shift):
    channels, acc = (x.shape[1],), acc_dtype(x.dtype)
    return torch.empty_like(x), x.new_empty(channels, dtype=acc), x.new_empty(channels, dtype=acc)


def _setup(ctx, inputs, output) -> None:
    _, u, scale, _ = inputs
    y, mean, _ = output
    ctx.save_for_backward(u, scale, y, mean)


def _backward(ops, ctx, dy: Tensor, dmean: Tensor, dvar: Tensor):
    """d mean/dy = 1/M, d var/dy = 2 (y - mean)/M."""
    u, scale, y, mean = ctx.saved_tensors
    pixels = pixels_of(y)
    per_channel = (1, -1, 1, 1)
    through = (dmean.view(per_channel) + 2 * dvar.view(per_channel) * (y - mean.view(per_channel))) / pixels
    wide = dy + through  # in the accumulation type
    dz = wide.to(y.dtype)
    if scale is None:
        return dz, dz.clone(), None, None
    return dz, (wide * scale.view(per_channel)).to(u.dtype), (wide * u).sum((0, 2, 3)), wide.sum((0, 2, 3))


differentiable("add_stats", _backward, _setup)
