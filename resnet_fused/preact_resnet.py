"""Pre-activation ResNets (He et al. 2016, "Identity mappings"), for large and for small images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import BlockOptions, BNReLU, FusedStem, UnpooledStem
from .cifar import NARROW, WIDE
from .preact import run_in_turn
from .stages import blocks_of, init_he, stage


class _PreActNetwork(FusedStem):
    """Stages of pre-activation blocks behind a stem, the last norm and ReLU, average pool and fc.

    The first block starts from what the stem has activated; each block, and the last norm, gets the statistics of its
    input from the block in front.
    """

    def _make_stages(
        self, block: str, layers: Sequence[int], widths: Sequence[int], num_classes: int, norm: Any, options: Any
    ) -> None:
        if len(layers) != len(widths):
            raise ValueError(f"layers is {layers!r}, expected {len(widths)} entries, one a stage")
        if "placement" in options:
            raise ValueError(f"placement is {options['placement']!r}, expected none: these networks are 'full_preact'")
        self.options = BlockOptions(block, placement="full_preact", norm=norm, **options)
        inplanes = widths[0]
        self.stages = tuple(f"layer{i + 1}" for i in range(len(layers)))
        for name, planes, blocks in zip(self.stages, widths, layers, strict=True):
            first = name == "layer1"
            made, inplanes = stage(self.options, inplanes, planes, blocks, 1 if first else 2, first=first)
            setattr(self, name, made)
        self.norm = BNReLU(inplanes, norm)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inplanes, num_classes)
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = run_in_turn([*(getattr(self, name) for name in self.stages), self.norm], self.stem(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class PreActResNet(_PreActNetwork):
    """Pre-activation ResNet for images x: [N, 3, H, W], returning logits [N, num_classes] of x's dtype.

    That is the parameters' dtype.
    block: "basic" or "bottleneck"; layers: blocks of each of four stages. The stem is `ResNet`'s: 7x7 convolution,
    norm, ReLU, max pool. norm_layer: makes a norm for so many channels, by default nn.BatchNorm2d. Further keywords
    are those of `BlockOptions` but `placement`. Raises ValueError for `layers` of another length and as those do,
    RuntimeError for x of other channels or dtype than conv1's.
    """

    def __init__(
        self,
        block: str,
        layers: Sequence[int],
        num_classes: int = 1000,
        norm_layer: Callable[..., nn.Module] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        norm = norm_layer or nn.BatchNorm2d
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self._make_stages(block, layers, WIDE, num_classes, norm, options)


class CifarPreActResNet(UnpooledStem, _PreActNetwork):
    """Pre-activation ResNet for small images x: [N, 3, H, W] (H, W = 32), returning logits [N, num_classes].

    `CifarResNet`'s stem, and a stage for each of `widths`, of so many of `layers` blocks. The other arguments are
    those of `PreActResNet`, and so are dtypes and errors, with ValueError for empty `widths` too; but for x of other
    channels or dtype than conv1's they are `CifarResNet`'s.
    """

    def __init__(
        self,
        block: str,
        layers: Sequence[int],
        widths: Sequence[int] = NARROW,
        num_classes: int = 10,
        norm_layer: Callable[..., nn.Module] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not widths:
            raise ValueError("widths is empty, expected one entry a stage")
        norm = norm_layer or nn.BatchNorm2d
        self.conv1 = nn.Conv2d(3, widths[0], kernel_size=3, padding=1, bias=False)
        self.bn1 = norm(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self._make_stages(block, layers, widths, num_classes, norm, options)


def preact_resnet18(**kwargs) -> PreActResNet:
    """Pre-activation ResNet-18 (11.7 M parameters); keywords as `PreActResNet`."""
    return PreActResNet("basic", (2, 2, 2, 2), **kwargs)


def preact_resnet50(**kwargs) -> PreActResNet:
    """Pre-activation ResNet-50 (25.5 M parameters); keywords as `PreActResNet`."""
    return PreActResNet("bottleneck", (3, 4, 6, 3), **kwargs)


def preact_resnet110(**kwargs) -> CifarPreActResNet:
    """Pre-activation ResNet-110 of basic blocks (1.7 M parameters); keywords as `CifarPreActResNet`."""
    return CifarPreActResNet("basic", blocks_of("preact_resnet110", 110, 2), **kwargs)


def preact_resnet164(**kwargs) -> CifarPreActResNet:
    """Pre-activation ResNet-164 of bottlenecks (1.7 M parameters); keywords as `CifarPreActResNet`."""
    return CifarPreActResNet("bottleneck", blocks_of("preact_resnet164", 164, 3), **kwargs)
