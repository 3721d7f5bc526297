"""`optimize_for_inference`: batch norms folded into weights (folded.py), and what becomes of a network (sliced.py).

Blocks that do more than the plain form (squeeze-excite, anti-aliasing) run module by module, each convolution folded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .blocks import BNReLU, ConvBNAct, FusedBlock, FusedStem, PreActBlock
from .convert import fuse_
from .folded import FoldedBlock, FoldedConv, FoldedNormReLU
from .functional import ConvBN
from .modules import conv_reason, convbn_of, global_hook_reason, hook_reason, norm_reason, relu_reason
from .sliced import eval_only


def _fold_reason(unit: ConvBN) -> str | None:
    return "a norm has no running statistics" if unit.batch_stats else None


@dataclass
class FoldReport:
    """`folded` names the modules that became folded ones; `left` says of others why not."""

    folded: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.folded)} modules folded, {len(self.left)} left as they were"]
        return "\n".join([*lines, *(f"  {name}: {reason}" for name, reason in self.left.items())])


@torch.inference_mode(False)  # the copy may be used outside of it
def optimize_for_inference(model: nn.Module, example_input: Tensor) -> nn.Module:
    """An eval-only copy of `model` with folded batch norms and packed weights; `model` itself is left as it is.

    model: a torchvision, timm or resnet_fused ResNet, fused or not; parts that are not recognised stay as they are.
    example_input: [N, C, H, W] of the model's dtype, the size to pack for; other sizes work and are packed when they
    come. The copy's `report` tells what was folded. It raises RuntimeError when it is asked to train, or given an
    input that requires grad under grad mode. Raises TypeError for a `model` that is no module, ValueError for an
    `example_input` of another shape.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected an nn.Module")
    if not isinstance(example_input, Tensor) or example_input.dim() != 4:
        raise ValueError(f"example_input is {_describe(example_input)}, expected a Tensor [N, C, H, W]")
    result = _eval_copy(model)
    fuse_(result)  # finds the blocks and stems
    report = FoldReport()
    folded: dict[nn.Module | None, nn.Module] = {}
    for name, module in list(result.named_modules()):
        if isinstance(module, FusedStem):
            _fold_stem(name, module, report)
        if replacement := _folded_module(name or "model", module, report):
            folded[module] = replacement
    result = folded.get(result, result)
    _replace_children(result, lambda child: folded.get(child, child))
    result = eval_only(result)
    result.report = report  # type: ignore[assignment]
    with torch.no_grad():
        result(example_input)  # packs
    return result


def _eval_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode, without torch.compile's wrappers and without timm's drops, which do nothing there."""

    def plain(child: Any) -> Any:
        child = _uncompiled(child)
        drops = type(child).__name__ in ("DropPath", "DropBlock2d") and type(child).__module__.startswith("timm.")
        return nn.Identity() if drops and hook_reason("", child) is None else child

    result = copy.deepcopy(_uncompiled(model)).eval().requires_grad_(False)
    _replace_children(result, plain)
    return result.eval()


def _uncompiled(model: nn.Module) -> nn.Module:
    """What torch.compile wrapped."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def _replace_children(parent: nn.Module, by: Callable[[Any], Any]) -> None:
    for name, child in parent._modules.items():
        parent._modules[name] = replacement = by(child)
        if replacement is not None:
            _replace_children(replacement, by)


def _describe(value: object) -> str:
    return f"a Tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _folded_module(name: str, module: nn.Module, report: FoldReport) -> nn.Module | None:
    """The folded form of a block or unit, or None."""
    if isinstance(module, FusedBlock):
        reason, result = _fold_block(name, module, report)
    elif isinstance(module, PreActBlock):
        reason, result = _fold_preact(module)
    elif isinstance(module, BNReLU):
        reason, bn = module.composed_reason() or hook_reason("the norm", module), module.bn
        reason = reason or _norm_fold_reason(bn)
        result = None if reason else FoldedNormReLU(bn)
    elif isinstance(module, ConvBNAct):
        reason, result = _fold_unit(module)
    else:
        return None
    if result is None:
        report.left[name] = reason or ""
    else:
        report.folded.append(name)
    return result


def _fold_block(name: str, block: FusedBlock, report: FoldReport) -> tuple[str | None, nn.Module | None]:
    if type(block).forward is not FusedBlock.forward:
        return f"{type(block).__name__} has a forward of its own", None
    down: Any = getattr(block, "downsample", None)
    projection = block.projection()
    reason = block.composed_reason() or hook_reason("the block", block)
    if reason is None:
        units = [convbn_of(conv, bn) for _, conv, _, bn in block.layers()]  # type: ignore[arg-type]
        shortcut = convbn_of(*projection) if projection else down
        for unit in [*units, *([shortcut] if isinstance(shortcut, ConvBN) else [])]:
            reason = reason or _fold_reason(unit)
        if block.placement == "bn_after_add":
            reason = reason or "its last norm is behind the sum"
    options: tuple[Any, ...] = (block.branch_scale, block.shortcut_scale, block.concatenates, block.has_shortcut)
    if block.placement == "relu_before_add":
        options += (None, "before_add")
    elif block.placement == "relu_preact":
        options += (nn.ReLU(), "none")
    if reason is None and projection is not None:
        return None, FoldedBlock(units, shortcut, *options)
    _fold_chain(_slots(f"{name}.downsample", down), report)
    if reason is None:
        return None, FoldedBlock(units, shortcut, *options)
    _fold_chain(_block_slots(name, block), report)
    return reason, None


def _fold_preact(block: PreActBlock) -> tuple[str | None, nn.Module | None]:
    """Each norm but the first is a part of the convolution in front of it."""
    reason = block.composed_reason() or hook_reason("the block", block)
    if reason is None and type(block).forward is not PreActBlock.forward:
        reason = f"{type(block).__name__} has a forward of its own"
    if reason is not None:
        return reason, None
    _, first, _, _ = next(block.layers())
    units, down = block.units_behind(), block.downsample
    for unit in units:
        reason = reason or _fold_reason(unit)
    reason = reason or (_norm_fold_reason(first) if first is not None else None)
    if reason is not None:
        return reason, None
    shortcut = convbn_of(down, nn.Identity()) if isinstance(down, nn.Conv2d) else down
    before = None if first is None else FoldedNormReLU(first)
    return None, FoldedBlock(units, shortcut, before=before, relu="none")


def _norm_fold_reason(bn: Any) -> str | None:
    return "a norm has no running statistics" if bn.running_mean is None else None


def _fold_unit(module: ConvBNAct) -> tuple[str | None, nn.Module | None]:
    reason = conv_reason("conv", module.conv) or norm_reason("bn", module.bn) or hook_reason("the unit", module)
    if reason is None:
        unit = convbn_of(module.conv, module.bn)
        reason = _fold_reason(unit)
    return (reason, None) if reason else (None, FoldedConv(unit, module.relu))


def _fold_stem(name: str, network: FusedStem, report: FoldReport) -> None:
    """conv1 (in a deep stem several layers), bn1 and the activation."""
    prefix = f"{name}." if name else ""
    conv1 = Slot(f"{prefix}conv1", network, "conv1")
    behind = [Slot(f"{prefix}{key}", network, key) for key in ("bn1", network.act_name)]
    reason = _fold_chain([*(_slots(conv1.name, network.conv1) or [conv1]), *behind], report)
    if reason is not None:
        report.left[conv1.name] = reason


class Slot(NamedTuple):
    """A module as its parent's child `key`; `name` is the whole path."""

    name: str
    parent: nn.Module
    key: str

    @property
    def module(self) -> Any:
        return self.parent._modules.get(self.key)

    def put(self, module: nn.Module) -> None:
        self.parent._modules[self.key] = module

    @property
    def passes(self) -> bool:
        """Whether nothing happens here."""
        return self.module is None or (type(self.module) is nn.Identity and hook_reason("", self.module) is None)


def _slots(name: str, sequence: Any) -> list[Slot]:
    """The layers of a plain nn.Sequential, in order; of anything else, none."""
    if not isinstance(sequence, nn.Sequential) or type(sequence).forward is not nn.Sequential.forward:
        return []
    return [] if hook_reason(name, sequence) else [Slot(f"{name}.{key}", sequence, key) for key in sequence._modules]


def _block_slots(name: str, block: FusedBlock) -> list[Slot]:
    """The main path of a block, in order, without torchvision's `relu`, which also ends the block."""
    keys: list[str] = []
    for i, (conv, _, bn, _) in enumerate(block.layers(), 1):
        last = not hasattr(block, f"conv{i + 1}")
        keys += [conv, bn] if last else [conv, bn, "drop_block", f"act{i}"]
    if block.placement == "bn_after_add":
        keys.pop()
    return [Slot(f"{name}.{key}", block, key) for key in keys]


def _fold_chain(slots: list[Slot], report: FoldReport) -> str | None:
    """Folds each convolution with the norm, and that with the ReLU, that follow at once: these become identities.

    `slots` are in the order of execution. Returns why the last convolution was not folded.
    """
    slots = [slot for slot in slots if not slot.passes]
    reason: str | None = "no convolution with a norm behind it"
    for i, (conv, norm) in enumerate(pairwise(slots)):
        if not isinstance(conv.module, nn.Conv2d):
            continue
        reason = global_hook_reason() or conv_reason(conv.key, conv.module) or norm_reason(norm.key, norm.module)
        reason = reason or _fold_reason(convbn_of(conv.module, norm.module))
        if reason is None:
            acts = [slot for slot in slots[i + 2 : i + 3] if relu_reason(slot.key, slot.module) is None]
            conv.put(FoldedConv(convbn_of(conv.module, norm.module), relu=bool(acts)))
            for slot in (norm, *acts):
                slot.put(nn.Identity())
            report.folded.append(conv.name)
    return reason
