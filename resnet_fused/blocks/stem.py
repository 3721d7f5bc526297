"""The stem: batch norm, ReLU and max pool in one pass, with conv1's statistics where its kernels run."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy

from .. import functional, reference
from ..modules import (
    BATCH_NORMS,
    NotScripted,
    conv_reason,
    convbn_of,
    global_hook_reason,
    group_of,
    hook_reason,
    norm_reason,
    pool_reason,
    relu_reason,
    traced_as_leaf,
)
from ..ops.bn_act_pool import Pool, StemTail
from ..ops.layout import to_nhwc
from ..ops.pointwise import matrix_kernels_take
from ..ops.stem import Stem
from ..ops.stem import obstacle as stem_obstacle
from ..ops.sync import Group
from ..recorder import record
from .norms import BatchNorm, checked_pixels, with_norm


def bn_relu_maxpool(x: Tensor, bn: BatchNorm, pool: Pool) -> Tensor:
    """maxpool(relu(bn(x))) in one pass, the stem's tail: [N, C, H, W] -> [N, C, P, Q], the pooled size.

    `pool`: kernel, stride and padding of a square one. Dtypes and errors are those of `BNReLUMaxPool`.
    """
    return with_norm(lambda *norm: StemTail.apply(to_nhwc(x), *norm, pool), bn, x, checked_pixels(x, bn))


def conv_bn_relu_maxpool(x: Tensor, conv: nn.Conv2d, bn: BatchNorm, pool: Pool) -> Tensor:
    """maxpool(relu(bn(conv(x)))) on the matrix kernels: [N, C, H, W] -> [N, K, P, Q], the pooled size.

    x has a dtype of theirs, bfloat16 or float16. `pool`: as in `bn_relu_maxpool`. Whether they take all these is
    `FusedStem.conv1_reason`'s to say.
    """
    g = convbn_of(conv, bn).geometry
    weight = conv.weight.to(x.dtype)
    n, _, p, q = g.out_shape(x.shape, weight.shape)
    return with_norm(lambda *norm: Stem.apply(to_nhwc(x), weight, *norm, g, pool), bn, x, n * p * q)


class BNReLUMaxPool(NotScripted, nn.BatchNorm2d):
    """maxpool(relu(bn(x))) in one pass; arguments, parameters, buffers and state_dict of `torch.nn.BatchNorm2d`.

    The pool is 3x3, stride 2, padding 1. x: [N, C, H, W] float32, bfloat16, float16 or float64; returns the pooled
    [N, C, P, Q] channels_last. Raises ValueError for x of another shape, RuntimeError for another dtype.

    nn.SyncBatchNorm.convert_sync_batchnorm takes it for a norm alone, and the ReLU and the pool away: a network whose
    statistics are shared by processes has the three modules, and its `FusedStem` runs them in one pass.
    """

    pool = Pool(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, P, Q], the pooled size."""
        if isinstance(x, Proxy):
            return traced_as_leaf(self, x)
        reason = functional.fallback_reason(x)
        record(x, (), None, self.pool, reason)
        return reference.bn_act_pool(x, self, *self.pool) if reason else bn_relu_maxpool(x, self, self.pool)


class FusedStem(NotScripted, nn.Module):
    """Mixin of a network that begins conv1, bn1, relu (or act1), maxpool: its `stem` runs the last three in one pass.

    The modules stay what they are. Whoever calls, taps or replaces one of them gets what it gives in eager PyTorch,
    because only the network's own forward comes through here.
    """

    conv1: nn.Module
    bn1: Any
    maxpool: Any
    stem_kind = "BNReLUMaxPool"  # what `explain` calls what runs behind conv1

    @property
    def act_name(self) -> str:
        """What the network calls its first activation."""
        return "relu" if hasattr(self, "relu") else "act1"

    def stem_reason(self) -> str | None:
        """Why the stem must run module by module; None if it runs fused."""
        bn, pool, act = self.bn1, self.maxpool, self.act_name
        if type(bn) not in BATCH_NORMS:
            return f"bn1 is a {type(bn).__name__}"
        reason = global_hook_reason() or pool_reason("maxpool", pool)
        return reason or relu_reason(act, getattr(self, act)) or hook_reason("bn1", bn)

    def conv1_reason(self, x: Tensor) -> str | None:
        """Why conv1 does not run in one with what follows; None if it does."""
        conv: Any = self.conv1
        reason = conv_reason("conv1", conv)
        if reason is not None:
            return reason
        dtype = functional.operand_dtype(x)
        if not matrix_kernels_take(x if x.dtype == dtype else x.new_empty(0, dtype=dtype)):
            return "the matrix kernels take bfloat16 and float16, on compute capability 8.0 and newer"
        if conv.bias is not None or conv.out_channels != self.bn1.num_features:
            return "conv1 has a bias, or other channels than bn1"
        fits = x.dim() == 4 and x.shape[1] == conv.in_channels
        if not fits or functional.operand_dtype(conv.weight) != dtype:
            return "x does not fit conv1"  # whose error it is
        g = convbn_of(conv, self.bn1).geometry
        n, _, p, q = g.out_shape(x.shape, conv.weight.shape)
        if min(p, q) < 1 or n * p * q == 1:
            return "conv1's output has no two pixels"
        return stem_obstacle(conv.in_channels, tuple(conv.weight.shape), g)

    def stem(self, x: Tensor) -> Tensor:
        """maxpool(relu(bn1(conv1(x)))): [N, 3, H, W] -> [N, C, P, Q]."""
        if isinstance(x, Proxy):  # module by module, so that a graph may be tapped anywhere
            return self.stem_by_modules(self.conv1(x))
        shared = Group.of(group_of(self.bn1)) is not None
        reason = self.stem_reason() or functional.fallback_reason(x, shared=shared)
        whole = reason is None and self.conv1_reason(x) is None
        units: tuple[functional.ConvBN, ...] = ()
        if whole:
            x, units = x.to(functional.operand_dtype(x)), (convbn_of(self.conv1, self.bn1),)  # type: ignore[arg-type]
        else:
            x = self.conv1(x)
            reason = reason or functional.fallback_reason(x, shared=shared)
        if reason is not None:
            record(x, units, None, None, reason)
            return self.stem_by_modules(x)
        pool = Pool(self.maxpool.kernel_size, self.maxpool.stride, self.maxpool.padding)
        record(x, units, None, pool, None)
        if whole:
            return conv_bn_relu_maxpool(x, self.conv1, self.bn1, pool)  # type: ignore[arg-type]
        return bn_relu_maxpool(x, self.bn1, pool)

    def stem_by_modules(self, u: Tensor) -> Tensor:
        """What follows conv1."""
        return self.maxpool(getattr(self, self.act_name)(self.bn1(u)))


class UnpooledStem(FusedStem):
    """Mixin of a network that begins conv1, bn1, relu and has no pool: its `stem` runs the three as one unit."""

    stem_kind = "BNReLU"

    def stem_reason(self) -> str | None:
        """Why the stem must run module by module; None if it runs fused."""
        reason = global_hook_reason() or conv_reason("conv1", self.conv1) or norm_reason("bn1", self.bn1)
        return reason or relu_reason(self.act_name, getattr(self, self.act_name))

    def stem(self, x: Tensor) -> Tensor:
        """relu(bn1(conv1(x))): [N, 3, H, W] -> [N, C, P, Q]."""
        if isinstance(x, Proxy):
            return self.stem_by_modules(self.conv1(x))
        reason = self.stem_reason()
        if reason is None:
            return functional.conv_bn_act(x, convbn_of(self.conv1, self.bn1))  # type: ignore[arg-type]
        u = self.conv1(x)
        record(u, (), None, None, reason)
        return self.stem_by_modules(u)

    def stem_by_modules(self, u: Tensor) -> Tensor:
        """What follows conv1."""
        return getattr(self, self.act_name)(self.bn1(u))
