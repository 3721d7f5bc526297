"""`bn_act_pool`: the stem's batch norm, ReLU and max pool in one pass, with an int8 argmax for backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .autograd import differentiable, fake, forbid_gradients
from .layout import empty_nhwc, to_nhwc

_ops = torch.ops.resnet_fused


def pooled_size(size, kernel: int, stride: int, padding: int):
    """Output size of a floor-mode pool along one dimension."""
    return (size + 2 * padding - kernel) // stride + 1


@fake("bn_act_pool")
def _(x: Tensor, scale, shift, kernel, stride, padding):
    n, c, h, w = x.shape
    shape = (n, c, pooled_size(h, kernel, stride, padding), pooled_size(w, kernel, stride, padding))
    return empty_nhwc(x, shape), empty_nhwc(x, shape, dtype=torch.int8)


@fake("bn_act_pool_backward")
def _(dy: Tensor, argmax, h, w, kernel, stride, padding):
    return empty_nhwc(dy, (dy.shape[0], dy.shape[1], h, w))


forbid_gradients("bn_act_pool_backward")


class Pool(NamedTuple):
    """A square max pool."""

    kernel: int
    stride: int
    padding: int


def unpool_bn_backward(
    dy: Tensor,
    argmax: Tensor,
    u: Tensor,
    norm: tuple[Tensor, Tensor, Tensor, Tensor],
    batch_stats: bool,
    pool: Pool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(du, dgamma, dbeta) for `norm` = (mean, rstd, scale, shift), all [C]."""
    mean, rstd, scale, shift = norm
    da = _ops.bn_act_pool_backward(dy, argmax, u.shape[2], u.shape[3], *pool)
    _, dbeta, dzx = _ops.bn_act_backward_reduce(da, None, u, scale, shift, mean, False)
    coef_x = coef_1 = torch.zeros_like(scale)
    if batch_stats:
        pixels = u.numel() // u.shape[1]
        coef_x, coef_1 = scale * rstd.square() * dzx / -pixels, scale * dbeta / -pixels
    du = _ops.bn_act_backward_apply(da, None, u, scale, shift, mean, scale, coef_x, coef_1)
    return du, rstd * dzx, dbeta


class StemTail(torch.autograd.Function):
    """maxpool(relu(bn(u))): (u, gamma, beta, mean, var, eps, batch_stats, pool) -> (y, mean, var)."""

    @staticmethod
    def forward(ctx, u, gamma, beta, mean, var, eps, batch_stats, pool):
        if batch_stats:
            mean, var = _ops.bn_stats(u)
        rstd = torch.rsqrt(var + eps)
        scale = gamma * rstd
        shift = beta - mean * scale
        y, argmax = _ops.bn_act_pool(u, scale, shift, *pool)
        ctx.save_for_backward(u, argmax, mean, rstd, scale, shift)
        ctx.batch_stats, ctx.pool = batch_stats, pool
        stats = (mean, var) if batch_stats else (mean.clone(), var.clone())
        ctx.mark_non_differentiable(*stats)
        return y, *stats

    @staticmethod
    def backward(ctx, dy, _dmean, _dvar):
        u, argmax, *norm = ctx.saved_tensors
        du, dgamma, dbeta = unpool_bn_backward(to_nhwc(dy), argmax, u, tuple(norm), ctx.batch_stats, ctx.pool)
        return du, dgamma, dbeta, None, None, None, None, None


def _setup(ctx, inputs, output) -> None:
    x, scale, shift, *pool = inputs
    ctx.pool = pool
    ctx.save_for_backward(x, scale, shift, output[1])


def _backward(ops, ctx, dy: Tensor, _dargmax: Tensor):
    x, scale, shift, argmax = ctx.saved_tensors
    da = ops.bn_act_pool_backward(to_nhwc(dy), argmax, x.shape[2], x.shape[3], *ctx.pool)
    zero = torch.zeros_like(scale)
    _, dshift, dscale = ops.bn_act_backward_reduce(da, None, x, scale, shift, zero, False)
    dx = ops.bn_act_backward_apply(da, None, x, scale, shift, zero, scale, zero, zero)
    return dx, dscale, dshift, None, None, None


differentiable("bn_act_pool", _backward, _setup)
