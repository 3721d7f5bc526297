"""One set of options for every block of the residual family, and `create`, which makes a block of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import nn

from .. import reference
from ..gated import GatedBlock, MNISTBlock
from ..preact import PreActBasicBlock, PreActBottleneck, shortcut_of
from .connect import CONNECTIONS, BottleneckConnection, Connection
from .fused import BasicBlock, Bottleneck, ConcatBasicBlock, ConcatBottleneck

Placement = Literal["original", "bn_after_add", "relu_before_add", "relu_preact", "full_preact"]

KINDS: dict[str, Any] = {"basic": BasicBlock, "bottleneck": Bottleneck, "mnist": MNISTBlock}
_PREACT: dict[str, Any] = {"basic": PreActBasicBlock, "bottleneck": PreActBottleneck}
_CONCAT: dict[str, Any] = {"basic": ConcatBasicBlock, "bottleneck": ConcatBottleneck}
_CHOICES = {
    "shortcut": ("A", "B", "C", "none"),
    "stride_on": (None, "conv1", "conv2"),
    "placement": reference.PLACEMENTS,
    "connection": CONNECTIONS,
}


@dataclass(frozen=True)
class BlockOptions:
    """What a residual block is, beside its widths and its stride.

    kind            "basic" (BasicBlock: 3x3, 3x3), "bottleneck" (Bottleneck: 1x1, 3x3, 1x1 x 4), "mnist" (MNISTBlock:
                    3x3, 5x5, biased, no norms), or another class with the arguments of torchvision's blocks
    shortcut        "A": the identity, strided and with channels of zeros where shapes change; "B": a 1x1 projection
                    there; "C": a projection everywhere; "none": the plain block relu(F(x))
    projection_norm whether a norm stands behind the projection; without one the projection has a bias
    stride_on       the convolution that strides, "conv1" or "conv2"; None is torchvision's: conv1 of a basic block,
                    conv2 of a bottleneck (v1.5; the paper of 2015 has "conv1")
    placement       where norms and ReLUs stand (He et al. 2016, figure 4): see `reference.ResidualBlock`; of
                    "full_preact" see `PreActBasicBlock`, whose projection has neither norm nor bias
    residual_scale  a in shortcut(x) + a F(x)
    shortcut_scale  b in b shortcut(x) + F(x)
    gate            relu((1 - g) x + g F(x)), g = sigmoid(conv1x1(x)): kind "mnist" alone
    connection      "add"; "concat": [x | relu(F(x))]; "bottleneck": that, and a 1x1 convolution back to F's channels
    norm            makes a norm for so many channels; `nn.Identity` for none
    groups, base_width  of a bottleneck's 3x3 convolution, as torchvision's

    Raises ValueError for a value that is none of these, and for options that contradict each other.
    """

    kind: str | type[nn.Module] = "basic"
    shortcut: Literal["A", "B", "C", "none"] = "B"
    projection_norm: bool = True
    stride_on: Literal["conv1", "conv2"] | None = None
    placement: Placement = "original"
    residual_scale: float = 1.0
    shortcut_scale: float = 1.0
    gate: bool = False
    connection: Connection = "add"
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d
    groups: int = 1
    base_width: int = 64

    def __post_init__(self) -> None:
        if self.kind in (BasicBlock, Bottleneck):
            object.__setattr__(self, "kind", "basic" if self.kind is BasicBlock else "bottleneck")
        if self.kind not in KINDS and not (isinstance(self.kind, type) and issubclass(self.kind, nn.Module)):
            raise ValueError(f"kind is {self.kind!r}, expected one of {', '.join(map(repr, KINDS))}, or a block class")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                expected = ", ".join(map(repr, choices))
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {expected}")
        default = {field.name: field.default for field in fields(self)}
        for why, fixed in self._no_choice():
            for name in fixed:
                if getattr(self, name) != default[name]:
                    value = getattr(self, name)
                    raise ValueError(f"{name} is {value!r}, expected {default[name]!r} with {why}")

    def _no_choice(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(an option that was chosen, the options that it leaves at their defaults)."""
        scales, shape = ("residual_scale", "shortcut_scale"), ("stride_on", "groups", "base_width")
        if self.kind == "mnist":
            yield "kind='mnist'", ("shortcut", "projection_norm", "placement", "connection", "norm", *shape)
        else:
            yield f"kind={self.kind!r}", ("gate",)
        if self.gate:
            yield "gate=True", scales
        if self.shortcut == "none":
            yield "shortcut='none'", ("projection_norm", "placement", "connection", *scales)
        if self.shortcut == "A":
            yield "shortcut='A'", ("projection_norm",)
        if self.placement != "original":
            yield f"placement={self.placement!r}", ("connection", *scales)
        if self.placement == "full_preact":
            yield "placement='full_preact'", ("projection_norm", "groups", "base_width")
        if self.connection != "add":
            yield f"connection={self.connection!r}", ("shortcut", "projection_norm", "stride_on", *scales)
        if not isinstance(self.kind, str):
            if not issubclass(self.kind, reference.ResidualBlock):
                yield f"kind={self.kind.__name__}", ("stride_on", "placement", *scales)
            yield f"kind={self.kind.__name__}", ("connection",)
            if self.placement == "full_preact":
                yield f"kind={self.kind.__name__}", ("placement",)

    @property
    def _class(self) -> Any:
        return KINDS[self.kind] if isinstance(self.kind, str) else self.kind

    @property
    def expansion(self) -> int:
        """Channels that F gives for each of its `planes`."""
        return self._class.expansion

    def out_channels(self, inplanes: int, planes: int) -> int:
        """Those of the block's output."""
        return planes * self.expansion + (inplanes if self.connection == "concat" else 0)

    def build(self, inplanes: int, planes: int, stride: int = 1, dilation: int = 1, first: bool = False) -> nn.Module:
        """A block for [N, inplanes, H, W] -> [N, out_channels, ceil(H/stride), ceil(W/stride)].

        dilation: of a bottleneck's 3x3 convolution. first: whether a pre-activation block is its network's first, whose
        input is activated already. Raises ValueError where the options do not allow these.
        """
        if self.placement == "full_preact":
            return self._preact(inplanes, planes, stride, dilation, first)
        if self.kind == "mnist" or self.connection != "add":
            return self._shape_keeping(inplanes, planes, stride, dilation)
        cls = self._class
        down = self._downsample(inplanes, planes * self.expansion, stride)
        block = cls(inplanes, planes, stride, down, self.groups, self.base_width, dilation, self.norm)
        if isinstance(block, reference.ResidualBlock):
            given = {
                "branch_scale": self.residual_scale,
                "shortcut_scale": self.shortcut_scale,
                "placement": self.placement,
                "has_shortcut": self.shortcut != "none",
            }
            for name, value in given.items():
                if getattr(block, name) != value:
                    setattr(block, name, value)
        elif self.shortcut == "none":
            raise ValueError(f"shortcut is 'none', which {cls.__name__} does not have")
        self._move_stride(block, stride)
        return block

    def _downsample(self, inplanes: int, planes: int, stride: int) -> nn.Module | None:
        if self.shortcut == "none":
            return None
        return shortcut_of(self.shortcut, inplanes, planes, stride, self._projection)

    def _projection(self, inplanes: int, planes: int, stride: int) -> nn.Module:
        if not self.projection_norm:
            return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride))
        return nn.Sequential(reference.conv1x1(inplanes, planes, stride), self.norm(planes))

    def _move_stride(self, block: nn.Module, stride: int) -> None:
        if self.stride_on is not None:
            for name in ("conv1", "conv2"):
                own = stride if name == self.stride_on else 1
                getattr(block, name).stride = (own, own)

    def _preact(self, inplanes: int, planes: int, stride: int, dilation: int, first: bool) -> nn.Module:
        if dilation != 1:
            raise ValueError(f"dilation is {dilation}, expected 1 with placement='full_preact'")
        assert isinstance(self.kind, str)
        block = _PREACT[self.kind](inplanes, planes, stride, self.norm, first, self.shortcut)
        self._move_stride(block, stride)
        return block

    def _shape_keeping(self, inplanes: int, planes: int, stride: int, dilation: int) -> nn.Module:
        what = "kind='mnist'" if self.kind == "mnist" else f"connection={self.connection!r}"
        if stride != 1 or dilation != 1:
            raise ValueError(f"stride is {stride}, dilation {dilation}, expected 1 and 1 with {what}")
        if self.kind == "mnist":
            if inplanes != planes:
                raise ValueError(f"planes is {planes}, expected {inplanes} (inplanes) with {what}")
            if self.gate:
                return GatedBlock(planes)
            block = MNISTBlock(planes)
            block.branch_scale, block.shortcut_scale = self.residual_scale, self.shortcut_scale
            return block
        assert isinstance(self.kind, str)
        shape = {} if self.kind == "basic" else {"groups": self.groups, "base_width": self.base_width}
        block = _CONCAT[self.kind](inplanes, planes, norm_layer=self.norm, **shape)
        return block if self.connection == "concat" else BottleneckConnection(block, norm_layer=self.norm)


def create(kind: str | type[nn.Module], inplanes: int, planes: int, stride: int = 1, **options: Any) -> nn.Module:
    """A block of a kind ("basic", "bottleneck", "mnist"); keywords as `BlockOptions`, and its errors.

    [N, inplanes, H, W] -> [N, planes * expansion, ceil(H/stride), ceil(W/stride)]; by `connection` other channels.
    """
    return BlockOptions(kind, **options).build(inplanes, planes, stride)
