"""Batch norms that run in one pass with what follows: relu(bn(x)), and what the stem's tail shares with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .. import functional, reference
from ..modules import (
    BATCH_NORMS,
    NotScripted,
    global_hook_reason,
    group_of,
    hook_reason,
    takes_batch_stats,
    traced_as_leaf,
)
from ..ops.layout import to_nhwc
from ..ops.norm_relu import NormReLU
from ..ops.sync import Group
from ..recorder import Pass, record

BatchNorm = nn.BatchNorm2d | nn.SyncBatchNorm


def bn_relu(x: Tensor, bn: BatchNorm, stats: functional.Stats | None = None) -> Tensor:
    """relu(bn(x)) in one pass: [N, C, H, W] -> the same shape.

    `stats`: mean and biased variance of x, each [C] in the accumulation type, from whoever wrote x (this process's x,
    also where bn's statistics are shared by several); without them a pass over x takes them. Dtypes and errors are
    those of `BNReLU`.
    """
    group = Group.of(group_of(bn))
    reason = functional.fallback_reason(x, shared=group is not None)
    what = "batch norm and ReLU in one pass" + ("" if group is None else f"; statistics of {group.size} processes")
    record(x, (), None, None if reason else Pass("fused", what), reason)
    if reason is not None:
        return torch.relu(bn(x))

    def run(gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, eps: float, batch_stats: bool, group: Any) -> Any:
        given = stats if stats is not None and batch_stats else (mean, var)
        return NormReLU.apply(to_nhwc(x), gamma, beta, *given, eps, batch_stats, given is stats, group)

    return with_norm(run, bn, x, checked_pixels(x, bn))


def checked_pixels(x: Tensor, bn: BatchNorm) -> int:
    """How many each channel of x [N, C, H, W] has; raises what bn would."""
    nn.BatchNorm2d._check_input_dim(bn, x)  # type: ignore[arg-type]
    n, c, h, w = x.shape
    if c != bn.num_features:
        raise ValueError(f"x has shape {list(x.shape)}, expected {bn.num_features} channels")
    if takes_batch_stats(bn) and n * h * w == 1 and Group.of(group_of(bn)) is None:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    return n * h * w


def with_norm(run: Callable[..., Any], bn: BatchNorm, like: Tensor, pixels: int) -> Tensor:
    """run(gamma, beta, mean, var, eps, batch_stats, group) -> (y, mean, var, with a group the count [1]); moves the
    running statistics."""
    c, batch_stats = bn.num_features, takes_batch_stats(bn)
    affine = functional.vector(bn.weight, 1, like, c), functional.vector(bn.bias, 0, like, c)
    given = functional.given_stats(
        bn.running_mean, bn.running_var, like, c, torch.is_grad_enabled() and not batch_stats
    )
    group = Group.of(group_of(bn))
    y, mean, var, *count = run(*affine, *given, bn.eps, batch_stats, group)
    moves = bn.training and bn.track_running_stats
    if moves and bn.running_mean is not None and bn.running_var is not None:
        factor = reference.average_factor(bn.num_batches_tracked, bn.momentum)
        over = pixels if group is None else count[0]
        functional.move_running(bn.running_mean, bn.running_var, mean, var, over, factor)
    return y


class BNReLU(NotScripted, nn.Module):
    """relu(bn(x)) in one pass; holds `bn`, made by `norm_layer` for so many channels.

    x: [N, C, H, W] float32, bfloat16, float16 or float64 -> the same shape and dtype, channels_last. In a
    PreActSequential the block in front hands it the statistics of x. Raises ValueError for x of another shape,
    RuntimeError for another dtype.
    """

    def __init__(self, channels: int, norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.bn = norm_layer(channels)

    def composed_reason(self) -> str | None:
        """Why it must run module by module; None if it runs fused."""
        if type(self.bn) not in BATCH_NORMS:
            return f"bn is a {type(self.bn).__name__}"
        return global_hook_reason() or hook_reason("bn", self.bn)

    def run(self, x: Tensor, stats: functional.Stats | None = None, hand_on: bool = False) -> tuple[Tensor, None]:
        """(y, None) from x and, where they are known, its statistics; it has none of y to hand on."""
        reason = self.composed_reason()
        if reason is None:
            return bn_relu(x, self.bn, stats), None  # type: ignore[arg-type]
        record(x, (), None, None, reason)
        return torch.relu(self.bn(x)), None

    def takes_stats(self) -> bool:
        """Whether it normalises with the batch's statistics."""
        return self.composed_reason() is None and takes_batch_stats(self.bn)

    def forward(self, x: Tensor) -> Tensor:
        return traced_as_leaf(self, x) if isinstance(x, Proxy) else self.run(x)[0]
