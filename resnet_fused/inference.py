"""`optimize_for_inference`: batch norms folded into weights, weights packed once, one primitive a convolution.

On the CPU (float32, bfloat16) every convolution with its bias, its residual and its ReLU is one oneDNN call on packed
weights. Elsewhere the folded convolution runs through ATen. A projection block writes the projection first and lets the
last convolution add onto it in place: the sum of the dual GEMM [a | x] [W3 ; Wd] without a concatenated operand, which
neither oneDNN nor cuDNN could read from two tensors and which would have to be copied together first.

Blocks that do more than the plain form (squeeze-excite, anti-aliasing) run module by module, each convolution folded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy

from .blocks import BNReLU, ConvBNAct, FusedBlock, FusedStem, PreActBlock
from .checks import broadcasts
from .convert import Converted, ConvertedNetwork, converted_class, fuse_
from .functional import ConvBN, vector
from .modules import (
    NotScripted,
    conv_reason,
    convbn_of,
    global_hook_reason,
    hook_reason,
    norm_reason,
    relu_reason,
    traced_as_leaf,
)
from .ops.aten import fused_conv, has_fused_conv
from .ops.layout import acc_dtype, to_nhwc
from .reference import PaddedShortcut, scaled

_EVAL_ONLY = "is the product of optimize_for_inference: it has no batch norms left to train, and no gradients"


class _EvalOnly(NotScripted, nn.Module):
    """A folded module: refuses training mode and gradients instead of giving wrong ones."""

    def train(self, mode: bool = True) -> _EvalOnly:
        if mode:  # before anything has changed
            raise RuntimeError(f"{type(self).__name__} {_EVAL_ONLY}")
        super().train(False)
        return self


class FoldedConv(_EvalOnly):
    """act(factor * (conv(x) + bias) + residual) with a batch norm and the factor folded into weight and bias.

    x: [N, C, H, W] of the weights' dtype; residual: [N, K, P, Q]; returns [N, K, P, Q] channels_last.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, unit: ConvBN, relu: bool, factor: float = 1.0) -> None:
        super().__init__()
        weight, bias = fold(unit, factor)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.geometry = unit.geometry
        self.relu = relu
        self._packed: dict[tuple[int, ...], Tensor] = {}  # by input shape; made again after a copy or a load
        self.eval()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return traced_as_leaf(self, x, residual) if isinstance(x, Proxy) else self.run(x, residual)

    def run(self, x: Tensor, residual: Tensor | None = None, into_residual: bool = False) -> Tensor:
        """The call itself; `into_residual` allows to write over `residual`."""
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"x requires grad, but {type(self).__name__} {_EVAL_ONLY}; use torch.no_grad()")
        if forward_ad._current_level >= 0:
            raise RuntimeError(f"forward-mode differentiation, but {type(self).__name__} {_EVAL_ONLY}")
        if x.dtype != self.weight.dtype:
            raise RuntimeError(f"x is {x.dtype}, expected {self.weight.dtype} (that of the weights)")
        channels = self.weight.shape[1] * self.geometry.groups
        if x.dim() != 4 or x.shape[1] != channels:
            raise ValueError(f"x has shape {list(x.shape)}, expected [N, {channels}, H, W]")
        x = to_nhwc(x)
        residual = residual if residual is None else self._residual(x, residual)
        # Packed weights are opaque to torch.compile and torch.jit.trace: those get plain convolutions.
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()) and has_fused_conv(x):
            return fused_conv(x, self.pack(x), self.bias, self.geometry, residual, self.relu, into_residual)
        y = F.conv2d(x, self.weight, self.bias, *self.geometry)
        y = y if residual is None else y + residual
        return torch.relu(y) if self.relu else y

    def _residual(self, x: Tensor, residual: Tensor) -> Tensor:
        """`residual` in the convolution's output shape, checked: oneDNN's sum does not."""
        expected = self.geometry.out_shape(x.shape, self.weight.shape)
        if not broadcasts(tuple(residual.shape), expected) or residual.dtype != x.dtype:
            got = f"{list(residual.shape)} {residual.dtype}"
            raise ValueError(f"residual is {got}, expected {list(expected)} {x.dtype} (the convolution's output)")
        return to_nhwc(residual if residual.shape == expected else residual.expand(expected))

    def pack(self, x: Tensor) -> Tensor:
        """The weight as oneDNN likes it for inputs of this shape."""
        packed = self._packed.get(tuple(x.shape))
        if packed is None:
            stride, padding, dilation, groups = self.geometry
            reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # its stub lacks the input's shape
            with torch.inference_mode(False):
                packed = reorder(self.weight.to_mkldnn(), padding, stride, dilation, groups, x.shape)
            if len(self._packed) >= 4:  # a few sizes in turn; more would only hold memory
                self._packed.clear()
            self._packed[tuple(x.shape)] = packed
        return packed

    def _apply(self, fn: Any, recurse: bool = True) -> FoldedConv:
        self._packed = {}
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packed = {}
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": {}}


class FoldedNormReLU(_EvalOnly):
    """relu(scale*x + shift) in one pass, a batch norm with given statistics; x: [N, C, H, W]."""

    scale: Tensor
    shift: Tensor

    def __init__(self, bn: Any) -> None:
        super().__init__()
        like, c = bn.running_mean, bn.running_mean.numel()
        scale = vector(bn.weight, 1, like, c) * torch.rsqrt(vector(bn.running_var, 1, like, c) + bn.eps)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", vector(bn.bias, 0, like, c) - vector(like, 0, like, c) * scale)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return traced_as_leaf(self, x)
        affine = (t.to(acc_dtype(x.dtype)) for t in (self.scale, self.shift))
        return torch.ops.resnet_fused.bn_act(to_nhwc(x), *affine, None, None, None, True, False)[0]


class FoldedBlock(_EvalOnly):
    """A residual block of folded convolutions.

    `shortcut` is a FoldedConv, any other module, or None (identity). `before`, if any, is in front of the chain and of
    a projection. `relu`: the last one is behind the sum ("end"), in front of it ("before_add"), or not there ("none").
    """

    def __init__(
        self,
        units: list[ConvBN],
        shortcut: ConvBN | nn.Module | None,
        branch_scale: float = 1.0,
        shortcut_scale: float = 1.0,
        concatenates: bool = False,
        has_shortcut: bool = True,
        before: nn.Module | None = None,
        relu: str = "end",
    ) -> None:
        super().__init__()
        self.concatenates, self.has_shortcut = concatenates, has_shortcut
        self.before, self.relu = before, relu
        factors = [1.0] * (len(units) - 1) + [branch_scale]
        self.convs = nn.ModuleList(
            FoldedConv(unit, unit is not units[-1] or relu != "none", factor)
            for unit, factor in zip(units, factors, strict=True)
        )
        folds = isinstance(shortcut, ConvBN)
        self.shortcut = FoldedConv(shortcut, False, shortcut_scale) if isinstance(shortcut, ConvBN) else shortcut
        self.shortcut_scale = 1.0 if folds else shortcut_scale
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, K, P, Q]."""
        if isinstance(x, Proxy):
            return traced_as_leaf(self, x)
        x = to_nhwc(x)
        if self.concatenates:
            return torch.cat([x, self._chain(x)], 1)
        start = x if self.before is None else self.before(x)
        if not self.has_shortcut:
            return self._chain(start)
        shortcut: Any = self.shortcut
        residual = x
        if shortcut is not None:
            residual = shortcut(x if isinstance(shortcut, PaddedShortcut) else start)
        residual = scaled(residual, self.shortcut_scale)
        if self.relu == "before_add":
            return self._chain(start) + residual
        return self._chain(start, residual, isinstance(shortcut, FoldedConv))

    def _chain(self, x: Tensor, residual: Tensor | None = None, into_residual: bool = False) -> Tensor:
        convs: list[Any] = list(self.convs)
        for conv in convs[:-1]:
            x = conv.run(x)  # past nn.Module's call, which costs as much as a small convolution's launch
        return convs[-1].run(x, residual, into_residual)


@torch.no_grad()
def fold(unit: ConvBN, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """(weight, bias) of one convolution equal to factor * (conv + batch norm with the running statistics).

    Computed in at least float32 and rounded once.
    """
    like, k = unit.weight, unit.weight.shape[0]
    bias = vector(unit.bias, 0, like, k)
    weight = unit.weight.to(bias.dtype)
    if unit.has_norm:
        scale = vector(unit.gamma, 1, like, k) * torch.rsqrt(vector(unit.running_var, 1, like, k) + unit.eps)
        weight = weight * scale.view(-1, 1, 1, 1)
        bias = (bias - vector(unit.running_mean, 0, like, k)) * scale + vector(unit.beta, 0, like, k)
    weight, bias = scaled(weight, factor), scaled(bias, factor)
    return weight.to(like.dtype).contiguous(memory_format=torch.channels_last), bias.to(like.dtype)


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
    result = _eval_only(result)
    result.report = report  # type: ignore[assignment]
    with torch.no_grad():
        result(example_input)  # packs
    return result


class OptimizedModel(Converted):
    """What `optimize_for_inference` returns: refuses training mode before any part of it has changed."""

    prefix = "Optimized"

    def train(self, mode: bool = True) -> OptimizedModel:
        if mode:
            raise RuntimeError(f"{type(self).__name__} {_EVAL_ONLY}")
        super().train(False)
        return self


def _eval_only(model: nn.Module) -> nn.Module:
    """`model` as an OptimizedModel; networks, whose stems are folded now, get their own class back."""
    for module in model.modules():
        if isinstance(module, ConvertedNetwork) or (module is model and isinstance(module, Converted)):
            module.__class__ = module.original  # type: ignore[assignment]
    if not isinstance(model, _EvalOnly):
        original: Any = type(model)
        model.__class__ = converted_class(OptimizedModel, original)
    return model.eval()


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
