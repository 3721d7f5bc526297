"""Blocks beside, behind and instead of each other: two joined, one applied several times."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..gated import GatedBlock
from ..modules import NotScripted, traced_as_leaf
from ..preact import PreActBlock, PreActSequential
from ..recorder import Pass, record
from .fused import ConcatBasicBlock, ConcatBottleneck, ConvBNAct, FusedBlock

Connection = Literal["add", "concat", "bottleneck"]
CONNECTIONS = ("add", "concat", "bottleneck")


class Join(NotScripted, nn.Module):
    """Two activations added, or concatenated along the channels: one pass, which reads both and writes the result.

    a: [N, C, H, W], b: [N, K, H, W] -> the same shape (K = C), or with `concat` [N, C + K, H, W]. Dtypes are promoted
    as eager PyTorch does. Raises ValueError for other shapes.
    """

    def __init__(self, concat: bool = False) -> None:
        super().__init__()
        self.concat = concat

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if isinstance(a, Proxy):
            return traced_as_leaf(self, a, b)
        fits = a.shape == b.shape
        if self.concat:
            fits = a.dim() == b.dim() == 4 and a.shape[:1] + a.shape[2:] == b.shape[:1] + b.shape[2:]
        if not fits:
            same = "the same N, H and W" if self.concat else "the same shape"
            raise ValueError(f"Join: the outputs have shapes {list(a.shape)} and {list(b.shape)}, expected {same}")
        done = "concatenated in one pass" if self.concat else "added in one pass"
        record(a, (), None, Pass("aten", f"two finished activations {done}"), None)
        return torch.cat([a, b], 1) if self.concat else a + b

    def extra_repr(self) -> str:
        return f"concat={self.concat}"


def out_channels(block: Any) -> int | None:
    """Of a block's output; None where they cannot be read off it."""
    if isinstance(block, Connect):
        return block.out_channels
    if isinstance(block, ConvBNAct):
        return block.conv.out_channels
    if isinstance(block, GatedBlock):
        return block.conv2.conv.out_channels
    if isinstance(block, FusedBlock | PreActBlock):
        convs: list[Any] = [layer for row in block.layers() for layer in row if isinstance(layer, nn.Conv2d)]
        beside = convs[0].in_channels if isinstance(block, FusedBlock) and block.concatenates else 0
        return beside + convs[-1].out_channels
    if isinstance(block, nn.Sequential) and len(block):
        return out_channels(block[-1])
    return None


def squeeze(channels: int, planes: int, convs: int = 1, norm: Any = nn.BatchNorm2d) -> nn.Sequential:
    """`convs` 1x1 convolutions, each with its norm and a ReLU, from `channels` to `planes`."""
    if convs < 1:
        raise ValueError(f"convs is {convs}, expected at least 1")
    units = [ConvBNAct(channels if i == 0 else planes, planes, 1) for i in range(convs)]
    for unit in units:
        unit.bn = norm(planes)
    return nn.Sequential(*units)


class BottleneckConnection(nn.Sequential):
    """[x | relu(F(x))], brought back to F's channels by 1x1 convolutions, each with its norm and a ReLU.

    block: a ConcatBasicBlock or ConcatBottleneck. convs: how many, at least 1 (else ValueError). norm_layer: makes a
    norm for so many channels. input: [N, C, H, W] -> [N, K, H, W] with K the channels that F has; dtypes and errors
    are the block's.
    """

    def __init__(
        self, block: ConcatBasicBlock | ConcatBottleneck, convs: int = 1, norm_layer: Any = nn.BatchNorm2d
    ) -> None:
        *_, (_, last, _, _) = block.layers()
        planes: Any = last.out_channels
        channels = out_channels(block)
        assert channels is not None
        super().__init__(block, *squeeze(channels, planes, convs, norm_layer))


class Connect(nn.Module):
    """Two blocks that are fed the same x, and their outputs joined: what feeds the next.

    connection: "add" (the outputs have one shape), "concat" (along the channels; one N, H and W), or "bottleneck": the
    concatenation brought back to `channels`, by default those of block1's output, by `convs` 1x1 convolutions, each
    with its norm, made by norm_layer for so many channels, and a ReLU. x: [N, C, H, W], as block1 and block2 take it;
    dtypes are theirs. Raises ValueError for another connection, for an argument that it does not have, for convs
    below 1, for blocks whose output channels cannot be read off them with "bottleneck", and for outputs that do not
    fit each other.
    """

    def __init__(
        self,
        block1: nn.Module,
        block2: nn.Module,
        connection: Connection = "add",
        channels: int | None = None,
        convs: int = 1,
        norm_layer: Any = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if connection not in CONNECTIONS:
            raise ValueError(f"connection is {connection!r}, expected one of {', '.join(map(repr, CONNECTIONS))}")
        if connection != "bottleneck" and (channels is not None or convs != 1):
            raise ValueError(
                f"channels={channels}, convs={convs} with connection={connection!r}: it has no convolution"
            )
        widths = out_channels(block1), out_channels(block2)
        self.block1, self.block2 = block1, block2
        self.join = Join(connection != "add")
        self.squeeze: nn.Module = nn.Identity()
        self.out_channels = widths[0]
        if connection != "add":
            self.out_channels = None if None in widths else sum(width or 0 for width in widths)
        if connection == "bottleneck":
            if self.out_channels is None:
                kinds = " and ".join(type(block).__name__ for block in (block1, block2))
                raise ValueError(f"the output channels of {kinds} are unknown, which a bottleneck connection needs")
            wide, self.out_channels = self.out_channels, channels or widths[0]
            self.squeeze = squeeze(wide, self.out_channels or 0, convs, norm_layer)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, K, P, Q]."""
        return self.squeeze(self.join(self.block1(x), self.block2(x)))


class Shared(PreActSequential):
    """One `block` applied `times` times: its weights' gradients add up.

    With `separate_stats` each application has batch norm statistics of its own (weights and affine parameters stay
    shared), as buffers of its own copy; without, one set is moved `times` times a step.
    x: [N, C, H, W] -> the same shape, for the block takes what it gives; dtypes and errors are the block's.
    Raises ValueError for `times` below 1.
    """

    def __init__(self, block: nn.Module, times: int, separate_stats: bool = False) -> None:
        if times < 1:
            raise ValueError(f"times is {times}, expected at least 1")
        parameters = {id(p): p for p in block.parameters()}
        twins = [copy.deepcopy(block, dict(parameters)) if separate_stats else block for _ in range(times - 1)]
        super().__init__(block, *twins)
