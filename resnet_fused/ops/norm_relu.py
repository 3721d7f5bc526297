"""relu(bn(u)) on its own, and its backward, which the stem's and a block's inner units' is too."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .bn_stats import batch_stats as stats_of
from .dispatch import ops as _ops
from .layout import pixels_of, to_nhwc
from .spec import Norm
from .sync import Group, agreed, summed


class Prologue(NamedTuple):
    """What makes du of the gradient da of relu(bn(u)): the arguments behind da of bn_act_backward_apply, and of a
    product that does it as it reads da."""

    mask: None
    u: Tensor  # [N, C, H, W]
    scale: Tensor  # [C], and all that follow
    shift: Tensor
    mean: Tensor
    coef_dz: Tensor
    coef_x: Tensor
    coef_1: Tensor


def relu_bn_reduce(
    da: Tensor, u: Tensor, norm: Norm, batch_stats: bool, group: Group | None
) -> tuple[Prologue, Tensor, Tensor]:
    """(the prologue, dgamma, dbeta) from the gradient da of relu(bn(u)) [N, C, H, W]."""
    gate = (norm.scale, norm.shift, norm.mean)
    _, dbeta, dzx = _ops.bn_act_backward_reduce(da, None, u, *gate, False)
    sums = summed(dbeta, dzx, pixels_of(u), group) if batch_stats else None
    return Prologue(None, u, *gate, norm.scale, *norm.coefficients(sums)), norm.rstd * dzx, dbeta


def relu_bn_backward(
    da: Tensor, u: Tensor, norm: Norm, batch_stats: bool, group: Group | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(du, dgamma, dbeta) from the gradient da of relu(bn(u)) [N, C, H, W]."""
    prologue, dgamma, dbeta = relu_bn_reduce(da, u, norm, batch_stats, group)
    return _ops.bn_act_backward_apply(da, *prologue), dgamma, dbeta


class NormReLU(torch.autograd.Function):
    """relu(bn(u)): (u, gamma, beta, mean, var, eps, batch_stats, handed, group) -> (y, mean, var) or, with a group,
    (y, mean, var, count [1]).

    With `batch_stats` they are those of u, of all of the group's processes: this process's are taken here, or, if
    `handed`, the given ones, whose gradient is part of u's.
    """

    @staticmethod
    def forward(ctx, u, gamma, beta, mean, var, eps, batch_stats, handed, group: Group | None):
        own = stats_of(u) if batch_stats and not handed else (mean.clone(), var.clone())
        stats = agreed(own, pixels_of(u), group)
        norm = Norm.of(stats[0], stats[1], gamma, beta, eps)
        y = norm.operand(u)
        ctx.save_for_backward(u, norm.mean, norm.var, norm.rstd, norm.scale, norm.shift, norm.beta)
        ctx.batch_stats, ctx.group = batch_stats, group
        ctx.mark_non_differentiable(*stats)
        return y, *stats

    @staticmethod
    def backward(ctx, dy, *_):
        u, *vectors = ctx.saved_tensors
        grads = relu_bn_backward(to_nhwc(dy), u, Norm(*vectors), ctx.batch_stats, ctx.group)
        return *grads, None, None, None, None, None, None
