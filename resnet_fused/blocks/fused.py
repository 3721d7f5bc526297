"""The drop-in blocks: torchvision's names, arguments, defaults and state_dict; fused forward and backward.

A block decides at each call whether its fused form stands for exactly what its modules would do. Hooks, adapters,
parametrizations or foreign modules on an inner layer make it run module by module ("composed"), and `explain` and
`fuse_`'s report say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .. import functional, reference
from ..checks import check_memory
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
    takes_batch_stats,
    traced_as_leaf,
)
from ..ops.bn_act_pool import Pool, StemTail
from ..ops.layout import Padded, to_nhwc
from ..ops.norm_relu import NormReLU
from ..ops.pointwise import matrix_kernels_take
from ..ops.stem import Stem
from ..ops.stem import obstacle as stem_obstacle
from ..ops.sync import Group
from ..recorder import Pass, record

BatchNorm = nn.BatchNorm2d | nn.SyncBatchNorm


class FusedBlock(NotScripted, nn.Module):
    """Mixin in front of a composed block class: its forward is the fused form where that is the same thing.

    The composed class names its layers conv1, bn1, conv2, bn2 (, conv3, bn3), its activations relu or act1..3, and
    its shortcut downsample (None, a Sequential(conv, norm), or any module). x: [N, C, H, W] -> [N, K, P, Q].
    Dtypes, and the errors for other inputs, are those of `resnet_fused.functional.residual_block`.
    """

    memory: functional.Memory = "lean"
    branch_scale: float = 1.0  # of the two terms of the sum
    shortcut_scale: float = 1.0
    concatenates: bool = False  # x stands beside the branch's output instead of being added to it
    has_shortcut: bool = True
    placement: str = "original"  # see `reference.ResidualBlock`

    def layers(self) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
        """(conv name, conv, norm name, norm) of the main path, in order."""
        for i in (1, 2, 3):
            if hasattr(self, f"conv{i}"):
                yield f"conv{i}", getattr(self, f"conv{i}"), f"bn{i}", getattr(self, f"bn{i}")

    def composed_reason(self) -> str | None:
        """Why this block must run module by module; None if it runs fused."""
        reason = global_hook_reason()
        for conv_name, conv, bn_name, bn in self.layers():
            reason = reason or conv_reason(conv_name, conv) or norm_reason(bn_name, bn)
        for name in ("relu", "act1", "act2", "act3"):
            if hasattr(self, name):
                reason = reason or relu_reason(name, getattr(self, name))
        for name in ("se", "drop_block", "aa", "drop_path"):  # timm's extras
            extra = getattr(self, name, None)
            if extra is not None and type(extra) is not nn.Identity:
                reason = reason or f"{name} is a {type(extra).__name__}"
        if self.placement == "bn_after_add" and type(bn) not in BATCH_NORMS:
            reason = reason or f"{bn_name}, behind the sum, is a {type(bn).__name__}"
        return reason

    def projection(self) -> tuple[nn.Conv2d, nn.Module] | None:
        """The shortcut's (conv, norm) where it is that and nothing else."""
        down: Any = getattr(self, "downsample", None)
        if not _is_sequence(down) or len(down) not in (1, 2):
            return None
        conv, bn = (*down, nn.Identity())[:2]
        if conv_reason("downsample.0", conv) or norm_reason("downsample.1", bn):
            return None
        return conv, bn

    def shortcut_tail(self) -> tuple[list[nn.Module], nn.Conv2d, nn.Module] | None:
        """(what runs first, conv, norm) of a longer shortcut that ends so, as ResNet-D's behind an average pool."""
        down: Any = getattr(self, "downsample", None)
        if not _is_sequence(down) or len(down) < 3:
            return None
        *first, conv, bn = down
        if conv_reason("conv", conv) or norm_reason("norm", bn) or isinstance(bn, nn.Identity):
            return None
        return first, conv, bn

    def shortcut(self, x: Tensor) -> Any:
        """As `functional.residual_block` takes it; a module of another kind runs here."""
        down: Any = getattr(self, "downsample", None)
        if not self.has_shortcut:
            return None
        if down is None:
            return "concat" if self.concatenates else "identity"
        if type(down) is reference.PaddedShortcut and hook_reason("downsample", down) is None:
            return down.padded
        if _is_sequence(down) and not len(down):
            return "identity"
        if projection := self.projection():
            return convbn_of(*projection)
        if (tail := self.shortcut_tail()) is None:
            return down(x)
        first, conv, bn = tail
        for module in first:
            x = module(x)
        return functional.conv_bn_act(x, convbn_of(conv, bn), None, False, self.memory)

    def shortcut_note(self) -> str:
        """How a shortcut runs that is no part of the fused op, for reports."""
        down: Any = getattr(self, "downsample", None)
        if down is None or self.projection() or type(down) is reference.PaddedShortcut:
            return ""
        if self.shortcut_tail():
            return "its downsample's last convolution and norm are a unit of their own, whose output is added"
        return "its downsample runs as it is, its output is added" if not _is_sequence(down) or len(down) else ""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, K, P, Q]."""
        if isinstance(x, Proxy):
            return traced_as_leaf(self, x)
        reason = self.composed_reason()
        if reason is not None:
            record(x, (), None, None, reason)
            return super().forward(x)
        if self.placement != "original":
            return self.placed(x)
        scales = (self.branch_scale, self.shortcut_scale)
        return functional.residual_block(x, self.units(), self.shortcut(x), True, self.memory, *scales)

    def units(self) -> list[functional.ConvBN]:
        """Those of the main path."""
        return [convbn_of(conv, bn) for _, conv, _, bn in self.layers()]  # type: ignore[arg-type]

    def placed(self, x: Tensor) -> Tensor:
        """With another `placement` of norms and ReLUs than the original: two or three fused steps."""
        units = self.units()
        if self.placement == "bn_after_add":
            *_, (_, _, _, bn) = self.layers()
            last = replace(units[-1], gamma=None, beta=None, running_mean=None, running_var=None, has_norm=False,
                           training=False)  # fmt: skip
            z = functional.residual_block(x, [*units[:-1], last], self.shortcut(x), False, self.memory)
            return bn_relu(z, bn)  # type: ignore[arg-type]
        if self.placement == "relu_before_add":
            f = functional.residual_block(x, units, None, True, self.memory)
            shortcut = self.shortcut(x)
            if isinstance(shortcut, functional.ConvBN):
                return functional.residual_block(x, [shortcut], f, False, self.memory)
            record(f, (), None, Pass("aten", "the shortcut added behind the ReLU, one pass"), None)
            return f + _beside(f, x, shortcut)
        record(x, (), None, Pass("aten", "the ReLU in front, one pass"), None)
        a = torch.relu(x)
        shortcut = self.shortcut(a)
        if isinstance(shortcut, str | Padded):  # these take x as it is
            shortcut = x if isinstance(shortcut, str) else shortcut(x, units[-1].weight.shape[0])
        return functional.residual_block(a, units, shortcut, False, self.memory)


def _is_sequence(down: Any) -> bool:
    """Whether it runs its modules one after the other, and nobody watches."""
    plain = isinstance(down, nn.Sequential) and type(down).forward is nn.Sequential.forward
    return plain and hook_reason("downsample", down) is None


def _beside(f: Tensor, x: Tensor, shortcut: Any) -> Tensor:
    """The shortcut that is no projection, as a tensor like f [N, K, P, Q]."""
    if isinstance(shortcut, str):  # "identity"
        return x.to(f.dtype)
    return (shortcut(x, f.shape[1]) if isinstance(shortcut, Padded) else shortcut).to(f.dtype)


class BasicBlock(FusedBlock, reference.BasicBlock):
    """relu(bn2(conv3x3(relu(bn1(conv3x3(x))))) + shortcut), fused.

    Arguments, errors and state_dict of `torchvision.models.resnet.BasicBlock`. x: [N, inplanes, H, W] of the
    parameters' dtype (or any under autocast); returns [N, planes, ceil(H/stride), ceil(W/stride)] channels_last.
    Dtypes, and the errors for other inputs, are those of `resnet_fused.functional.residual_block`.
    """


class Bottleneck(FusedBlock, reference.Bottleneck):
    """relu(bn3(conv1x1(relu(bn2(conv3x3(relu(bn1(conv1x1(x)))))))) + shortcut), fused; the stride on the 3x3.

    Arguments and state_dict of `torchvision.models.resnet.Bottleneck`, groups and base_width (ResNeXt, wide)
    included. x: [N, inplanes, H, W]; returns [N, 4*planes, ceil(H/stride), ceil(W/stride)] channels_last.
    Dtypes, and the errors for other inputs, are those of `resnet_fused.functional.residual_block`.
    """


class ScaledBasicBlock(BasicBlock):
    """relu(shortcut_scale shortcut(x) + branch_scale F(x)) with `BasicBlock`'s F; the scales cost no pass.

    Shapes, dtypes, errors and the other arguments are BasicBlock's: x: [N, inplanes, H, W] -> [N, planes, P, Q].
    """

    def __init__(self, *args: Any, branch_scale: float = 0.1, shortcut_scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.branch_scale, self.shortcut_scale = branch_scale, shortcut_scale


class ScaledBottleneck(Bottleneck):
    """relu(shortcut_scale shortcut(x) + branch_scale F(x)) with `Bottleneck`'s F; the scales cost no pass.

    Shapes, dtypes, errors and the other arguments are Bottleneck's: x: [N, inplanes, H, W] -> [N, 4*planes, P, Q].
    """

    def __init__(self, *args: Any, branch_scale: float = 0.1, shortcut_scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.branch_scale, self.shortcut_scale = branch_scale, shortcut_scale


class ConcatBasicBlock(FusedBlock, reference.ConcatBasicBlock):
    """[x | relu(F(x))] along the channels with `BasicBlock`'s F of stride 1, fused.

    x: [N, inplanes, H, W] -> [N, inplanes + planes, H, W]. norm_layer: as BasicBlock's, and so are dtypes and errors.
    """

    concatenates = True


class ConcatBottleneck(FusedBlock, reference.ConcatBottleneck):
    """[x | relu(F(x))] along the channels with `Bottleneck`'s F of stride 1, fused.

    x: [N, inplanes, H, W] -> [N, inplanes + 4*planes, H, W]. groups, base_width, norm_layer: as Bottleneck's, and so
    are dtypes and errors.
    """

    concatenates = True


class ConvBNAct(NotScripted, nn.Module):
    """act(bn(conv(x)) + residual) as one fused unit; `norm=False` is conv + bias.

    Holds `conv` and (with a norm) `bn`. in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as
    nn.Conv2d's. relu: whether there is an act. memory: "lean" or "fast", what is kept for backward.
    x: [N, in_channels, H, W]; residual: [N, out_channels, P, Q] or None; returns [N, out_channels, P, Q] channels_last.
    Dtypes, and the errors for other inputs, are those of `resnet_fused.functional.conv_bn_act`.
    Raises ValueError for another `memory`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        norm: bool = True,
        relu: bool = True,
        memory: functional.Memory = "lean",
    ) -> None:
        super().__init__()
        check_memory(memory)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=not norm)
        self.bn: nn.Module = nn.BatchNorm2d(out_channels) if norm else nn.Identity()
        self.relu = relu
        self.memory: functional.Memory = memory

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, in_channels, H, W] (, [N, out_channels, P, Q]) -> [N, out_channels, P, Q]."""
        if isinstance(x, Proxy):
            return traced_as_leaf(self, x, residual)
        reason = global_hook_reason() or conv_reason("conv", self.conv) or norm_reason("bn", self.bn)
        if reason is not None:
            record(x, (), None, None, reason)
            y = self.bn(self.conv(x))
            y = y if residual is None else y + residual
            return torch.relu(y) if self.relu else y
        return functional.conv_bn_act(x, convbn_of(self.conv, self.bn), residual, self.relu, self.memory)


def bn_relu_maxpool(x: Tensor, bn: BatchNorm, pool: Pool) -> Tensor:
    """maxpool(relu(bn(x))) in one pass, the stem's tail: [N, C, H, W] -> [N, C, P, Q], the pooled size.

    `pool`: kernel, stride and padding of a square one. Dtypes and errors are those of `BNReLUMaxPool`.
    """
    return _with_norm(lambda *norm: StemTail.apply(to_nhwc(x), *norm, pool), bn, x, _pixels(x, bn))


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

    return _with_norm(run, bn, x, _pixels(x, bn))


def _pixels(x: Tensor, bn: BatchNorm) -> int:
    """How many each channel of x [N, C, H, W] has; raises what bn would."""
    nn.BatchNorm2d._check_input_dim(bn, x)  # type: ignore[arg-type]
    n, c, h, w = x.shape
    if c != bn.num_features:
        raise ValueError(f"x has shape {list(x.shape)}, expected {bn.num_features} channels")
    if takes_batch_stats(bn) and n * h * w == 1 and Group.of(group_of(bn)) is None:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    return n * h * w


def conv_bn_relu_maxpool(x: Tensor, conv: nn.Conv2d, bn: BatchNorm, pool: Pool) -> Tensor:
    """maxpool(relu(bn(conv(x)))) on the matrix kernels: [N, C, H, W] -> [N, K, P, Q], the pooled size.

    x has a dtype of theirs, bfloat16 or float16. `pool`: as in `bn_relu_maxpool`. Whether they take all these is
    `FusedStem.conv1_reason`'s to say.
    """
    g = convbn_of(conv, bn).geometry
    weight = conv.weight.to(x.dtype)
    n, _, p, q = g.out_shape(x.shape, weight.shape)
    return _with_norm(lambda *norm: Stem.apply(to_nhwc(x), weight, *norm, g, pool), bn, x, n * p * q)


def _with_norm(run: Callable[..., Any], bn: BatchNorm, like: Tensor, pixels: int) -> Tensor:
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
