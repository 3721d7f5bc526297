"""`fuse_` and `unfuse_`: a torchvision or timm ResNet's blocks become fused, in place, and back.

A block is converted by giving it a class that derives from its own: its parameters, buffers, hooks, identity and
state_dict stay what they were, `isinstance` still holds, and its own forward is what runs whenever the fused form
would not be the same thing (see `blocks.FusedBlock`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from torch import nn

from .blocks import BNReLUMaxPool, FusedBlock
from .checks import check_memory
from .functional import Memory
from .modules import hook_reason, relu_reason
from .ops.bn_act_pool import Pool

# Block classes whose forward is known, by name, so that neither package is imported.
_BLOCKS = {
    (module, name)
    for module in ("torchvision.models.resnet", "timm.models.resnet", "resnet_fused.reference")
    for name in ("BasicBlock", "Bottleneck")
}
_NETWORKS = {("torchvision.models.resnet", "ResNet"), ("timm.models.resnet", "ResNet")}


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


class ConvertedBlock(FusedBlock):
    """A foreign block turned fused: `original` is the class it came with."""

    original: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.original,), self.__dict__.copy()


@cache  # one class for each original
def converted_class(original: Any) -> Any:
    """The fused class in front of a block class."""
    name = f"Fused{original.__name__}"
    return type(name, (ConvertedBlock, original), {"original": original, "__module__": __name__})


def _rebuild(original: type[nn.Module]) -> nn.Module:
    """An empty converted block, for pickle and deepcopy."""
    cls: Any = converted_class(cast(Any, original))
    return cls.__new__(cls)


def _known_forward(module: nn.Module, known: set[tuple[str, str]]) -> bool:
    """Whether `module` runs the very forward of one of the known classes, in all its steps."""
    steps = ("forward", "_forward_impl", "forward_features")
    return any(
        (base.__module__, base.__qualname__) in known
        and all(getattr(type(module), step, None) is getattr(base, step, None) for step in steps)
        for base in type(module).__mro__
    )


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
            _fuse_block(name, module, memory, report)
        if _known_forward(module, _NETWORKS):
            _fuse_stem(f"{name}.bn1".lstrip("."), module, report)
    for module in model.modules():
        if type(module) is nn.Conv2d and not module.weight.is_contiguous(memory_format=torch.channels_last):
            _set_layout(module, torch.channels_last)
            report.channels_last += 1
    return report


def unfuse_(model: nn.Module) -> nn.Module:
    """The exact inverse of `fuse_`: classes, stem and weight layout as they were. Returns `model`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected an nn.Module")
    for module in list(model.modules()):
        if isinstance(module, ConvertedBlock):
            module.__class__ = module.original  # type: ignore[assignment]
            module.__dict__.pop("memory", None)
        bn = getattr(module, "bn1", None)
        if isinstance(bn, BNReLUMaxPool) and "_replaced" in bn.__dict__:
            for name, child in bn.__dict__.pop("_replaced"):
                setattr(module, name, child)
            bn.__dict__.pop("pool", None)
            bn.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
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
        block.__class__ = converted_class(original)
    assert isinstance(block, FusedBlock)
    block.memory = memory
    reason = block.composed_reason()
    if reason is None and block.projection() is None and getattr(block, "downsample", None) is not None:
        report.rows.append(ReportRow(name, kind, True, "its downsample runs as it is, its output is added"))
        return
    report.rows.append(ReportRow(name, kind, reason is None, reason or ""))


def _stem_obstacle(net: Any, act: str) -> str | None:
    """Why bn1, the activation and the pool of `net` cannot become one BNReLUMaxPool."""
    bn, pool = net.bn1, getattr(net, "maxpool", None)
    if type(bn) is not nn.BatchNorm2d:
        return f"bn1 is a {type(bn).__name__}"
    if type(pool) is not nn.MaxPool2d:
        return f"maxpool is a {type(pool).__name__}"
    kernel, sizes = pool.kernel_size, (pool.kernel_size, pool.stride, pool.padding)
    if not all(isinstance(s, int) for s in sizes) or (isinstance(kernel, int) and kernel > 11):
        return f"maxpool has kernel, stride, padding {sizes}, served are squares up to 11"
    if pool.dilation != 1 or pool.ceil_mode or pool.return_indices:
        return "maxpool has dilation, ceil_mode or return_indices"
    return relu_reason(act, getattr(net, act, None)) or hook_reason("bn1", bn) or hook_reason("maxpool", pool)


def _fuse_stem(name: str, net: Any, report: Report) -> None:
    """bn1 becomes BN + ReLU + max pool, the two others pass through: children keep their names and order."""
    if isinstance(net.bn1, BNReLUMaxPool):
        report.rows.insert(0, ReportRow(name, "BNReLUMaxPool", True, ""))
        return
    act = "relu" if hasattr(net, "relu") else "act1"
    reason = _stem_obstacle(net, act)
    if reason is None:
        pool = net.maxpool
        bn = net.bn1
        bn.__class__ = BNReLUMaxPool
        bn.pool = Pool(pool.kernel_size, pool.stride, pool.padding)
        bn.__dict__["_replaced"] = ((act, getattr(net, act)), ("maxpool", pool))
        setattr(net, act, nn.Identity())
        net.maxpool = nn.Identity()
    report.rows.insert(0, ReportRow(name, "BNReLUMaxPool", reason is None, reason or ""))
