"""`bn_act_pool`: the stem's batch norm, ReLU and max pool in one pass, with an int8 argmax for backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .autograd import differentiable, fake, forbid_gradients
from .bn_stats import batch_stats as stats_of
from .layout import empty_nhwc, pixels_of, to_nhwc
from .norm_relu import relu_bn_backward
from .spec import Norm
from .sync import Group, agreed

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


class StemTail(torch.autograd.Function):
    """maxpool(relu(bn(u))): (u, gamma, beta, mean, var, eps, batch_stats, group, pool) -> (y, mean, var) or, with a
    group, (y, mean, var, count [1])."""

    @staticmethod
    def forward(ctx, u, gamma, beta, mean, var, eps, batch_stats, group: Group | None, pool):
        own = stats_of(u) if batch_stats else (mean.clone(), var.clone())
        stats = agreed(own, pixels_of(u), group)
        norm = Norm.of(stats[0], stats[1], gamma, beta, eps)
        y, argmax = _ops.bn_act_pool(u, norm.scale, norm.shift, *pool)
        ctx.save_for_backward(u, argmax, norm.mean, norm.var, norm.rstd, norm.scale, norm.shift, norm.beta)
        ctx.batch_stats, ctx.group, ctx.pool = batch_stats, group, pool
        ctx.mark_non_differentiable(*stats)
        return y, *stats

    @staticmethod
    def backward(ctx, dy, *_):
        u, argmax, *vectors = ctx.saved_tensors
        da = _ops.bn_act_pool_backward(to_nhwc(dy), argmax, *u.shape[2:], *ctx.pool)
        grads = relu_bn_backward(da, u, Norm(*vectors), ctx.batch_stats, ctx.group)
        return *grads, None, None, None, None, None, None


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
