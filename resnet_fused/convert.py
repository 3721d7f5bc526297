"""`fuse_` and `unfuse_`: a torchvision or timm ResNet's blocks become fused, in place, and back.

A block is converted by giving it a class that derives from its own: its parameters, buffers, hooks, identity and
state_dict stay what they were, `isinstance` still holds, and its own forward is what runs whenever the fused form
would not be the same thing (see `blocks.FusedBlock`). So is a network, for its stem (see `blocks.FusedStem`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from .blocks import FusedBlock, FusedStem, PreActBlock
from .checks import check_memory
from .functional import Memory

# Block classes whose forward is known, by name, so that neither package is imported.
_BLOCKS = {
    (module, name)
    for module in ("torchvision.models.resnet", "timm.models.resnet", "resnet_fused.reference")
    for name in ("BasicBlock", "Bottleneck")
}


@dataclass(frozen=True)
class ReportRow:
    """What became of one module."""

    name: str
    kind: str
    fused: bool
    reason: str


@dataclass
class Report:
    """What `fuse_` did: `str(report)` is a table; `rows` holds one entry for each block and stem."""

    memory: str
    rows: list[ReportRow] = field(default_factory=list)
    channels_last: int = 0

    @property
    def fused(self) -> list[ReportRow]:
        return [row for row in self.rows if row.fused]

    @property
    def composed(self) -> list[ReportRow]:
        return [row for row in self.rows if not row.fused]

    def __str__(self) -> str:
        head = (
            f"{len(self.fused)} of {len(self.rows)} blocks and stems fused (memory={self.memory!r}); "
            f"{self.channels_last} convolution weights turned to channels_last"
        )
        width = max((len(row.name) for row in self.rows), default=0)
        lines = [
            f"  {row.name:<{width}}  {row.kind:<14}  {'fused' if row.fused else 'composed'}  {row.reason}".rstrip()
            for row in self.rows
        ]
        return "\n".join([head, *lines])


class Converted(nn.Module):
    """A module given another class: `original` is the one it came with, `mixin` what stands in front of it."""

    original: type[nn.Module]
    mixin: type[nn.Module]
    prefix = "Fused"  # of the class's name

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.mixin, self.original), self.__dict__.copy()


class ConvertedBlock(Converted, FusedBlock):
    """A BasicBlock or Bottleneck."""


class ConvertedNetwork(Converted, FusedStem):
    """A ResNet: its own forward runs on behind the fused stem."""

    def behind_stem(self, step: str, x: Tensor) -> Tensor:
        """The original's method `step`, whose first four modules are the stem."""
        behind = Behind(self, ("conv1", "bn1", self.act_name, "maxpool"))
        return getattr(self.original, step)(behind, self.stem(x))


class TorchvisionNetwork(ConvertedNetwork):
    def _forward_impl(self, x: Tensor) -> Tensor:
        return self.behind_stem("_forward_impl", x)


class TimmNetwork(ConvertedNetwork):
    @property
    def act_name(self) -> str:
        return "act1"

    def forward_features(self, x: Tensor) -> Tensor:
        return self.behind_stem("forward_features", x)


class Behind:
    """A network as its own methods see it once its modules `passing` have run: these pass on what they get."""

    def __init__(self, network: nn.Module, passing: tuple[str, ...]) -> None:
        self._network, self._passing = network, passing

    def __getattr__(self, name: str) -> Any:
        return _pass if name in self._passing else getattr(self._network, name)


class _Pass:
    """A module, or a sequence of modules, that does nothing."""

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def __iter__(self) -> Iterator[nn.Module]:  # timm's checkpointing chains the modules of its stages
        return iter(())


_pass = _Pass()


@cache  # one class for each original
def converted_class(mixin: Any, original: Any) -> Any:
    """The class `original` with `mixin`, a Converted, in front of it."""
    names = {"original": original, "mixin": mixin, "__module__": __name__}
    return type(f"{mixin.prefix}{original.__name__}", (mixin, original), names)


def _rebuild(mixin: type[nn.Module], original: type[nn.Module]) -> nn.Module:
    """An empty converted module, for pickle and deepcopy."""
    cls: Any = converted_class(cast(Any, mixin), cast(Any, original))
    return cls.__new__(cls)


def _known_forward(module: nn.Module, known: set[tuple[str, str]]) -> bool:
    """Whether `module` runs the very forward of one of the known classes, in all its steps."""
    steps = ("forward", "_forward_impl", "forward_features")
    return any(
        (base.__module__, base.__qualname__) in known
        and all(getattr(type(module), step, None) is getattr(base, step, None) for step in steps)
        for base in type(module).__mro__
    )


_NETWORKS = {
    ("torchvision.models.resnet", "ResNet"): TorchvisionNetwork,
    ("timm.models.resnet", "ResNet"): TimmNetwork,
}


def fuse_(model: nn.Module, memory: Memory = "lean") -> Report:
    """Make every ResNet block and stem of `model` fused, in place; parameters and buffers are shared, not copied.

    model: any module that holds torchvision's or timm's BasicBlock / Bottleneck (ResNet, ResNeXt, wide ResNet).
    memory: "lean" keeps least for backward, "fast" also keeps the last unit's raw output.
    Weights of convolutions turn to channels_last (same values, same Parameter objects). Blocks with more than the
    plain form (squeeze-excite, anti-aliasing, drop path, hooks ...) run as before; the returned report says which
    and why. Raises ValueError for another `memory`, TypeError for something that is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected an nn.Module")
    check_memory(memory)
    report = Report(memory)
    for name, module in list(model.named_modules()):
        if isinstance(module, FusedBlock) or _known_forward(module, _BLOCKS):
            _fuse_block(name or "model", module, memory, report)
        if isinstance(module, PreActBlock):
            module.memory = memory
            reason = module.composed_reason()
            report.rows.append(ReportRow(name or "model", type(module).__name__, reason is None, reason or ""))
        _fuse_stem(f"{name}.bn1".lstrip("."), module, report)
    for module in model.modules():
        if type(module) is nn.Conv2d and not module.weight.is_contiguous(memory_format=torch.channels_last):
            _set_layout(module, torch.channels_last)
            report.channels_last += 1
    return report


def unfuse_(model: nn.Module) -> nn.Module:
    """The exact inverse of `fuse_`: classes, stem and weight layout as they were.

    model: any module, fused or not; parameters and buffers keep their values, dtypes and identity. Returns `model`.
    Raises TypeError for something that is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected an nn.Module")
    for module in list(model.modules()):
        if isinstance(module, ConvertedBlock | ConvertedNetwork):
            module.__class__ = module.original  # type: ignore[assignment]
            module.__dict__.pop("memory", None)
        if isinstance(module, nn.Conv2d) and module.__dict__.pop("_was_contiguous", False):
            module.weight.data = module.weight.data.contiguous()
    return model


def _set_layout(conv: nn.Conv2d, layout: torch.memory_format) -> None:
    conv.__dict__["_was_contiguous"] = conv.weight.is_contiguous()
    conv.weight.data = conv.weight.data.contiguous(memory_format=layout)


def _fuse_block(name: str, block: nn.Module, memory: Memory, report: Report) -> None:
    kind = type(block).__name__
    if not isinstance(block, FusedBlock):
        original: Any = type(block)
        block.__class__ = converted_class(ConvertedBlock, original)
    assert isinstance(block, FusedBlock)
    block.memory = memory
    reason = block.composed_reason()
    report.rows.append(ReportRow(name, kind, reason is None, reason or block.shortcut_note()))


def _fuse_stem(name: str, network: nn.Module, report: Report) -> None:
    """The network's forward will run bn1, the activation and the pool as one; `name` is bn1's."""
    for known, mixin in _NETWORKS.items():
        if not isinstance(network, FusedStem) and _known_forward(network, {known}):
            original: Any = type(network)
            network.__class__ = converted_class(mixin, original)
    if isinstance(network, FusedStem):
        reason = network.stem_reason()
        report.rows.insert(0, ReportRow(name, network.stem_kind, reason is None, reason or ""))
