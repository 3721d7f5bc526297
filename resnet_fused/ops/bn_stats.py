"""`bn_stats`: per-channel mean and biased variance of an activation."""

from __future__ import annotations

import torch
from torch import Tensor

from .autograd import differentiable, fake
from .dispatch import ops as _ops
from .layout import acc_dtype, pixels_of


@fake("bn_stats")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    shape, dtype = (x.shape[1],), acc_dtype(x.dtype)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], output[0])


def _backward(ops, ctx, dmean: Tensor, dvar: Tensor) -> Tensor:
    """d mean/dx = 1/M, d var/dx = 2 (x - mean)/M."""
    x, mean = ctx.saved_tensors
    pixels = pixels_of(x)
    per_channel = (1, -1, 1, 1)
    centred = x - mean.view(per_channel)
    return ((dmean.view(per_channel) + 2 * dvar.view(per_channel) * centred) / pixels).to(x.dtype)


differentiable("bn_stats", _backward, _setup)


def batch_stats(u: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, var) [C] of u; zeros of an empty one, which a group (`sync.py`) gives no weight."""
    if u.numel():
        return _ops.bn_stats(u)
    zero = u.new_zeros(u.shape[1], dtype=acc_dtype(u.dtype))
    return zero, torch.zeros_like(zero)
