"""Every convolution, batch norm and block of ResNet-18 and ResNet-50 at 224, each shape once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

import resnet_fused as rf

EXPANSION = {"basic": 1, "bottleneck": 4}


class NormShape(NamedTuple):
    """A batch norm's channels, and height and width."""

    channels: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.channels}@{self.size}"


class ConvShape(NamedTuple):
    """A square convolution that keeps the size but for its stride."""

    channels: int
    filters: int
    kernel: int
    stride: int
    size: int  # height and width of the input

    @property
    def name(self) -> str:
        return f"{self.channels}-{self.filters}-{self.kernel}x{self.kernel}-s{self.stride}@{self.size}"

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def output(self) -> NormShape:
        return NormShape(self.filters, self.size // self.stride)


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

    @property
    def stage(self) -> int:
        """The one of ResNet's four stages that has blocks of so many planes."""
        return self.planes.bit_length() - 6

    @property
    def outplanes(self) -> int:
        return self.planes * EXPANSION[self.kind]

    def build(self) -> nn.Module:
        """The plain PyTorch block, with a projection where the shape changes."""
        cls = rf.reference.BasicBlock if self.kind == "basic" else rf.reference.Bottleneck
        out = self.planes * cls.expansion
        down = None
        if self.stride != 1 or self.inplanes != out:
            down = nn.Sequential(nn.Conv2d(self.inplanes, out, 1, self.stride, bias=False), nn.BatchNorm2d(out))
        return cls(self.inplanes, self.planes, self.stride, down)

    def units(self) -> Iterator[ConvShape]:
        """The chain's convolutions, then the projection if there is one."""
        narrow, wide, after = self.planes, self.outplanes, self.size // self.stride
        if self.kind == "basic":
            yield ConvShape(self.inplanes, narrow, 3, self.stride, self.size)
            yield ConvShape(narrow, narrow, 3, 1, after)
        else:
            yield ConvShape(self.inplanes, narrow, 1, 1, self.size)
            yield ConvShape(narrow, narrow, 3, self.stride, self.size)
            yield ConvShape(narrow, wide, 1, 1, after)
        if self.stride != 1 or self.inplanes != wide:
            yield ConvShape(self.inplanes, wide, 1, self.stride, self.size)


def _blocks(kind: str) -> Iterator[BlockShape]:
    """Those of a network: of each stage the first, and the others, which are alike."""
    inplanes, size = 64, 56
    for planes in (64, 128, 256, 512):
        stride = 1 if planes == 64 else 2
        yield BlockShape(kind, inplanes, planes, stride, size)
        inplanes, size = planes * EXPANSION[kind], size // stride
        yield BlockShape(kind, inplanes, planes, 1, size)


BLOCKS = tuple(dict.fromkeys(shape for kind in EXPANSION for shape in _blocks(kind)))
STEM = ConvShape(3, 64, 7, 2, 224)
CONVS = tuple(dict.fromkeys([STEM, *(unit for block in BLOCKS for unit in block.units())]))
NORMS = tuple(dict.fromkeys(conv.output for conv in CONVS))
JOINS = tuple(dict.fromkeys(NormShape(b.outplanes, b.size // b.stride) for b in BLOCKS))  # outputs of blocks
ENDS = tuple(dict.fromkeys(list(b.units())[2] for b in BLOCKS if b.kind == "bottleneck"))  # last convolutions
# Those whose input is the raw output of the convolution before them: first of a block and projections are not.
INNER = frozenset(unit for b in BLOCKS for unit in list(b.units())[1 : 2 if b.kind == "basic" else 3])
QUICK = ("basic-64-64-s1@56", "bottleneck-256-64-s1@56", "bottleneck-256-128-s2@56")
