"""The drop-in blocks: torchvision's names, arguments, defaults and state_dict; fused forward and backward.

A block decides at each call whether its fused form stands for exactly what its modules would do. Hooks, adapters,
parametrizations or foreign modules on an inner layer make it run module by module ("composed"), and `explain` and
`fuse_`'s report say so.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    hook_reason,
    norm_reason,
    relu_reason,
    traced_as_leaf,
)
from ..ops.layout import Padded
from ..recorder import Pass, record
from .norms import bn_relu


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
