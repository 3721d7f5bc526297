"""Pre-activation blocks, and the sequence in which each block's output brings its statistics to the next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy

from . import functional
from .modules import (
    NotScripted,
    conv_reason,
    convbn_of,
    global_hook_reason,
    hook_reason,
    is_frozen_norm,
    norm_reason,
    relu_reason,
    traced_as_leaf,
)
from .recorder import record
from .reference import conv1x1, conv3x3

Stats = functional.Stats


class PreActBlock(NotScripted, nn.Module):
    """conv_n(relu(bn_n(... conv_1(relu(bn_1(x)))))) + shortcut: modules bn1, conv1, bn2, conv2 (, bn3, conv3), relu.

    `downsample`, a convolution or None, takes relu(bn1(x)). x: [N, inplanes, H, W]; returns [N, K, P, Q] channels_last.
    """

    relu: nn.Module
    downsample: nn.Module | None

    def layers(self) -> Iterator[tuple[str, Any, str, Any]]:
        """(norm name, norm, conv name, conv), in order."""
        for i in (1, 2, 3):
            if hasattr(self, f"conv{i}"):
                yield f"bn{i}", getattr(self, f"bn{i}"), f"conv{i}", getattr(self, f"conv{i}")

    def composed_reason(self) -> str | None:
        """Why this block must run module by module; None if it runs fused."""
        reason = global_hook_reason() or relu_reason("relu", self.relu)
        for bn_name, bn, conv_name, conv in self.layers():
            reason = reason or norm_reason(bn_name, bn) or conv_reason(conv_name, conv)
            if type(bn) is nn.Identity:
                reason = reason or f"{bn_name} is an Identity"
        return reason or (conv_reason("downsample", self.downsample) if self.downsample is not None else None)

    def composed(self, x: Tensor) -> Tensor:
        """Module by module."""
        y, shortcut = x, x
        for i, (_, bn, _, conv) in enumerate(self.layers()):
            y = self.relu(bn(y))
            if i == 0 and self.downsample is not None:
                shortcut = self.downsample(y)
            y = conv(y)
        return y + shortcut

    def run(self, x: Tensor, stats: Stats | None = None, hand_on: bool = False) -> tuple[Tensor, Stats | None]:
        """(y, its statistics if `hand_on`) from x and, where they are known, x's: see `functional.preact_block`."""
        reason = self.composed_reason()
        if reason is not None:
            record(x, (), None, None, reason)
            return self.composed(x), None
        units = [functional.BNConv(**vars(convbn_of(conv, bn))) for _, bn, _, conv in self.layers()]
        down: Any = self.downsample
        projection = None if down is None else convbn_of(down, nn.Identity())
        return functional.preact_block(x, units, projection, stats, hand_on)

    def takes_stats(self) -> bool:
        """Whether its first norm normalises with the batch's statistics."""
        bn: Any = self.bn1
        return not is_frozen_norm(bn) and (bn.training or bn.running_mean is None)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, K, P, Q]."""
        return traced_as_leaf(self, x) if isinstance(x, Proxy) else self.run(x)[0]


class PreActBasicBlock(PreActBlock):
    """conv3x3(relu(bn2(conv3x3(relu(bn1(x)))))) + shortcut, fused; the stride on the first 3x3.

    x: [N, inplanes, H, W]; returns [N, planes, ceil(H/stride), ceil(W/stride)] channels_last. norm_layer: makes a norm
    of so many channels. A 1x1 convolution is the shortcut where shape or stride changes.
    Dtypes and errors are those of `resnet_fused.functional.preact_block`.
    """

    expansion: int = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1, norm_layer: Any = nn.BatchNorm2d) -> None:
        super().__init__()
        self.bn1 = norm_layer(inplanes)
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn2 = norm_layer(planes)
        self.conv2 = conv3x3(planes, planes)
        self.relu = nn.ReLU(inplace=True)
        changes = stride != 1 or inplanes != planes
        self.downsample = conv1x1(inplanes, planes, stride) if changes else None


class PreActBottleneck(PreActBlock):
    """conv1x1(relu(bn3(conv3x3(relu(bn2(conv1x1(relu(bn1(x))))))))) + shortcut, fused; the stride on the 3x3.

    x: [N, inplanes, H, W]; returns [N, 4*planes, ceil(H/stride), ceil(W/stride)] channels_last. norm_layer: makes a
    norm of so many channels. A 1x1 convolution is the shortcut where shape or stride changes.
    Dtypes and errors are those of `resnet_fused.functional.preact_block`.
    """

    expansion: int = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1, norm_layer: Any = nn.BatchNorm2d) -> None:
        super().__init__()
        wide = planes * self.expansion
        self.bn1 = norm_layer(inplanes)
        self.conv1 = conv1x1(inplanes, planes)
        self.bn2 = norm_layer(planes)
        self.conv2 = conv3x3(planes, planes, stride)
        self.bn3 = norm_layer(planes)
        self.conv3 = conv1x1(planes, wide)
        self.relu = nn.ReLU(inplace=True)
        changes = stride != 1 or inplanes != wide
        self.downsample = conv1x1(inplanes, wide, stride) if changes else None


class PreActSequential(NotScripted, nn.Sequential):
    """nn.Sequential in which a pre-activation block hands the statistics of its output to the block behind it.

    Arguments, state_dict and results of nn.Sequential. x: [N, C, H, W] -> what the last block gives, [N, K, P, Q];
    dtypes and errors are the blocks'.
    """

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return traced_as_leaf(self, x)
        blocks: list[Any] = list(self)
        stats: Stats | None = None
        for block, after in zip(blocks, [*blocks[1:], None], strict=True):
            if _plain(block):
                x, stats = block.run(x, stats, after is not None and _plain(after) and after.takes_stats())
            else:
                x, stats = block(x), None
        return x


def _plain(module: nn.Module) -> bool:
    """Whether the module's call is its forward, and that PreActBlock's."""
    if not isinstance(module, PreActBlock) or type(module).forward is not PreActBlock.forward:
        return False
    return hook_reason("", module) is None and global_hook_reason() is None
