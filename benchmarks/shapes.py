"""The blocks of ResNet-18 and ResNet-50 at 224: one of each kind and stage."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

import resnet_fused as rf


class BlockShape(NamedTuple):
    """A block's constructor arguments and its input's channels and size."""

    kind: str  # "basic" or "bottleneck"
    inplanes: int
    planes: int
    stride: int
    size: int  # height and width of the input

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.inplanes}-{self.planes}-s{self.stride}@{self.size}"

    def build(self) -> nn.Module:
        """The plain PyTorch block, with a projection where the shape changes."""
        cls = rf.reference.BasicBlock if self.kind == "basic" else rf.reference.Bottleneck
        out = self.planes * cls.expansion
        down = None
        if self.stride != 1 or self.inplanes != out:
            down = nn.Sequential(nn.Conv2d(self.inplanes, out, 1, self.stride, bias=False), nn.BatchNorm2d(out))
        return cls(self.inplanes, self.planes, self.stride, down)


BLOCKS = (
    BlockShape("basic", 64, 64, 1, 56),
    BlockShape("basic", 64, 128, 2, 56),
    BlockShape("basic", 128, 128, 1, 28),
    BlockShape("basic", 256, 256, 1, 14),
    BlockShape("basic", 512, 512, 1, 7),
    BlockShape("bottleneck", 64, 64, 1, 56),
    BlockShape("bottleneck", 256, 64, 1, 56),
    BlockShape("bottleneck", 256, 128, 2, 56),
    BlockShape("bottleneck", 512, 128, 1, 28),
    BlockShape("bottleneck", 1024, 256, 1, 14),
    BlockShape("bottleneck", 2048, 512, 1, 7),
)
QUICK = ("basic-64-64-s1@56", "bottleneck-256-64-s1@56", "bottleneck-256-128-s2@56")
