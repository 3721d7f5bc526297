"""Pre-activation blocks, and the sequence in which each block's output brings its statistics to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

from torch import Tensor, nn
from torch.fx import Proxy

from . import functional
from .blocks.norms import BNReLU
from .modules import (
    NotScripted,
    conv_reason,
    convbn_of,
    global_hook_reason,
    hook_reason,
    norm_reason,
    relu_reason,
    takes_batch_stats,
    traced_as_leaf,
)
from .recorder import record
from .reference import PaddedShortcut, conv1x1, conv3x3

Stats = functional.Stats


class PreActBlock(NotScripted, nn.Module):
    """conv_n(relu(bn_n(... conv_1(relu(bn_1(x)))))) + shortcut: modules bn1, conv1, bn2, conv2 (, bn3, conv3), relu.

    `downsample`, a convolution or None, takes relu(bn1(x)); a PaddedShortcut takes x. x: [N, inplanes, H, W]; returns
    [N, K, P, Q] channels_last. Dtypes and errors are those of `resnet_fused.functional.preact_block`.
    A network's `first` block has no bn1: both its paths start from x, which the stem has normalised and activated.
    """

    memory: functional.Memory = "lean"
    relu: nn.Module
    bn1: nn.Module | None
    downsample: nn.Module | None

    def layers(self) -> Iterator[tuple[str, Any, str, Any]]:
        """(norm name, norm, conv name, conv), in order; of a first block bn1 is None."""
        for i in (1, 2, 3):
            if hasattr(self, f"conv{i}"):
                yield f"bn{i}", getattr(self, f"bn{i}"), f"conv{i}", getattr(self, f"conv{i}")

    def composed_reason(self) -> str | None:
        """Why this block must run module by module; None if it runs fused."""
        reason = global_hook_reason() or relu_reason("relu", self.relu)
        for bn_name, bn, conv_name, conv in self.layers():
            reason = reason or (bn is not None and norm_reason(bn_name, bn)) or conv_reason(conv_name, conv)
            if type(bn) is nn.Identity:
                reason = reason or f"{bn_name} is an Identity"
        down = self.downsample
        if type(down) is PaddedShortcut:
            return reason or hook_reason("downsample", down)
        return reason or (conv_reason("downsample", down) if down is not None else None)

    def composed(self, x: Tensor) -> Tensor:
        """Module by module."""
        y, shortcut = x, x
        for i, (_, bn, _, conv) in enumerate(self.layers()):
            y = y if bn is None else self.relu(bn(y))
            if i == 0 and self.downsample is not None:
                shortcut = self.downsample(x if isinstance(self.downsample, PaddedShortcut) else y)
            y = conv(y)
        return y + shortcut

    def run(self, x: Tensor, stats: Stats | None = None, hand_on: bool = False) -> tuple[Tensor, Stats | None]:
        """(y, its statistics if `hand_on`) from x and, where they are known, x's: see `functional.preact_block`."""
        reason = self.composed_reason()
        if reason is not None:
            record(x, (), None, None, reason)
            return self.composed(x), None
        down: Any = self.downsample
        projection: Any = down.padded if isinstance(down, PaddedShortcut) else None
        if isinstance(down, nn.Conv2d):
            projection = convbn_of(down, nn.Identity())
        if self.bn1 is None:
            shortcut: Any = projection or "identity"
            return functional.residual_block(x, self.units_behind(), shortcut, False, self.memory), None
        units = [functional.BNConv(**vars(convbn_of(conv, bn))) for _, bn, _, conv in self.layers()]
        return functional.preact_block(x, units, projection, stats, hand_on)

    def units_behind(self) -> list[functional.ConvBN]:
        """The convolutions behind relu(bn1(x)), each with the norm that follows it, as in any other block."""
        layers = list(self.layers())
        norms = [*(bn for _, bn, _, _ in layers[1:]), nn.Identity()]
        return [convbn_of(conv, bn) for (_, _, _, conv), bn in zip(layers, norms, strict=True)]

    def takes_stats(self) -> bool:
        """Whether its first norm normalises with the batch's statistics."""
        return self.bn1 is not None and takes_batch_stats(self.bn1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, K, P, Q]."""
        return traced_as_leaf(self, x) if isinstance(x, Proxy) else self.run(x)[0]


class PreActBasicBlock(PreActBlock):
    """conv3x3(relu(bn2(conv3x3(relu(bn1(x)))))) + shortcut, fused; the stride on the first 3x3.

    x: [N, inplanes, H, W]; returns [N, planes, ceil(H/stride), ceil(W/stride)] channels_last. norm_layer: makes a norm
    for so many channels. first: see PreActBlock. shortcut: where shapes change, "A": x strided and with channels of
    zeros, "B": a 1x1 convolution; "C": a 1x1 convolution everywhere.
    Dtypes and errors are those of `resnet_fused.functional.preact_block`.
    """

    expansion: int = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        norm_layer: Any = nn.BatchNorm2d,
        first: bool = False,
        shortcut: Literal["A", "B", "C"] = "B",
    ) -> None:
        super().__init__()
        self.bn1 = None if first else norm_layer(inplanes)
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn2 = norm_layer(planes)
        self.conv2 = conv3x3(planes, planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inplanes, planes, stride, shortcut)


class PreActBottleneck(PreActBlock):
    """conv1x1(relu(bn3(conv3x3(relu(bn2(conv1x1(relu(bn1(x))))))))) + shortcut, fused; the stride on the 3x3.

    x: [N, inplanes, H, W]; returns [N, 4*planes, ceil(H/stride), ceil(W/stride)] channels_last. norm_layer, first,
    shortcut: as PreActBasicBlock's.
    Dtypes and errors are those of `resnet_fused.functional.preact_block`.
    """

    expansion: int = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        norm_layer: Any = nn.BatchNorm2d,
        first: bool = False,
        shortcut: Literal["A", "B", "C"] = "B",
    ) -> None:
        super().__init__()
        wide = planes * self.expansion
        self.bn1 = None if first else norm_layer(inplanes)
        self.conv1 = conv1x1(inplanes, planes)
        self.bn2 = norm_layer(planes)
        self.conv2 = conv3x3(planes, planes, stride)
        self.bn3 = norm_layer(planes)
        self.conv3 = conv1x1(planes, wide)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inplanes, wide, stride, shortcut)


def _shortcut(inplanes: int, planes: int, stride: int, kind: str) -> nn.Module | None:
    if kind not in ("A", "B", "C"):
        raise ValueError(f"shortcut is {kind!r}, expected 'A', 'B' or 'C'")
    return shortcut_of(kind, inplanes, planes, stride, conv1x1)


def shortcut_of(
    kind: str, inplanes: int, planes: int, stride: int, projection: Callable[[int, int, int], nn.Module]
) -> nn.Module | None:
    """Option "A", "B" or "C" of He et al. 2015, section 4.1; None: the identity. projection: of B and C, made for
    (inplanes, planes, stride)."""
    if kind != "C" and stride == 1 and inplanes == planes:
        return None
    return PaddedShortcut(inplanes, planes, stride) if kind == "A" else projection(inplanes, planes, stride)


class PreActSequential(NotScripted, nn.Sequential):
    """nn.Sequential in which a block hands the statistics of its output to the block, or the BNReLU, behind it.

    Arguments, state_dict and results of nn.Sequential; what is in it may be such a sequence in turn.
    x: [N, C, H, W] -> what the last module gives, [N, K, P, Q]; dtypes and errors are the blocks'.
    """

    def run(self, x: Tensor, stats: Stats | None = None, hand_on: bool = False) -> tuple[Tensor, Stats | None]:
        """As `PreActBlock.run`."""
        return run_in_turn(list(self), x, stats, hand_on)

    def takes_stats(self) -> bool:
        """Whether its first module normalises with the batch's statistics."""
        return len(self) > 0 and _takes_stats(self[0])

    def forward(self, x: Tensor) -> Tensor:
        return traced_as_leaf(self, x) if isinstance(x, Proxy) else self.run(x)[0]


def run_in_turn(
    modules: list[Any], x: Tensor, stats: Stats | None = None, hand_on: bool = False
) -> tuple[Tensor, Stats | None]:
    """Module after module; (y, its statistics if `hand_on` and the last one can take them)."""
    for module, after in zip(modules, [*modules[1:], None], strict=True):
        if _plain(module):
            wanted = hand_on if after is None else _takes_stats(after)
            x, stats = module.run(x, stats, wanted)
        else:
            x, stats = module(x), None
    return x, stats


def _takes_stats(module: Any) -> bool:
    return _plain(module) and module.takes_stats()


def _plain(module: nn.Module) -> bool:
    """Whether the module's call is its `run`."""
    for kind in (PreActBlock, PreActSequential, BNReLU):
        if isinstance(module, kind):
            own = type(module).forward is kind.forward
            return own and hook_reason("", module) is None and global_hook_reason() is None
    return False
