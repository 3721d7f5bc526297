"""`bn_act_backward_reduce` and `_apply`: the backward of ReLU and a batch norm in training.

Inside a block relu' follows from the raw output; at its end it comes from the mask, and dz is the shortcut's gradient.
"""

from __future__ import annotations

import torch

from benchmarks.ops import EPS, activation, forward_cases, shift
from benchmarks.shapes import JOINS, NORMS, NormShape
from benchmarks.suite import suite

ops = torch.ops.resnet_fused


def arguments(shape: NormShape, dtype: str, at_end: bool = False):
    """(dy, x, y, mask, (gamma, scale, shift), (mean, rstd)), gamma a random one."""
    x, dy = activation(*shape, dtype), activation(*shape, dtype)
    mean, var = ops.bn_stats(x)
    rstd = torch.rsqrt(var + EPS)
    gamma = shift(shape.channels)
    scale = gamma * rstd
    vectors = gamma, scale, shift(shape.channels) - mean * scale
    y, mask = ops.bn_act(x, *vectors[1:], None, None, None, True, at_end)
    return dy, x, y, mask if at_end else None, vectors, (mean, rstd)


def at_end(shape: NormShape, dtype: str):
    return arguments(shape, dtype, True)


def eager(dy, x, y, mask, vectors, stats):
    dz = torch.ops.aten.threshold_backward(dy, y, 0)
    backward = torch.ops.aten.native_batch_norm_backward
    return backward(dz, x, vectors[0], None, None, *stats, True, EPS, [True, True, True])


def ours(dy, x, y, mask, vectors, stats):
    mean, rstd = stats
    _, scale, own_shift = vectors
    gate = (scale, own_shift) if mask is None else (None, None)
    dz, dbeta, sum_dz_xc = ops.bn_act_backward_reduce(dy, mask, x, *gate, mean, mask is not None)
    dz = dy if mask is None else dz
    pixels = x.numel() // x.shape[1]
    coefficients = scale, scale * rstd.square() * sum_dz_xc / -pixels, scale * dbeta / -pixels
    return ops.bn_act_backward_apply(dz, None, x, *gate, mean, *coefficients), rstd * sum_dz_xc, dbeta


def math(dy, x, y, mask, vectors, stats):
    """For torch.compile: what native_batch_norm_backward computes."""
    mean, rstd = (v.view(1, -1, 1, 1) for v in stats)
    dz = torch.where(y > 0, dy, 0).float()
    xhat = (x - mean) * rstd
    dgamma, dbeta = (dz * xhat).sum((0, 2, 3)), dz.sum((0, 2, 3))
    pixels = x.numel() // x.shape[1]
    through = (dbeta.view(1, -1, 1, 1) + xhat * dgamma.view(1, -1, 1, 1)) / pixels
    dx = (vectors[0].view(1, -1, 1, 1) * rstd * (dz - through)).to(x.dtype)
    return dx, dgamma, dbeta


VARIANTS = {"eager": eager, "compile": math, "ours": ours}
CASES = [
    *forward_cases("bn_act_backward", NORMS[1:] + NORMS[:1], arguments, VARIANTS, works=("backward",)),
    *forward_cases("bn_act_backward-join", JOINS, at_end, VARIANTS, works=("backward",)),
]


@suite(CASES)
def test_bn_act_backward(timed):
    timed()
