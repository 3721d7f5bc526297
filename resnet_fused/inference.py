"""`optimize_for_inference`: batch norms folded into weights, weights packed once, one primitive a convolution.

On the CPU (float32, bfloat16) every convolution with its bias, its residual and its ReLU is one oneDNN call on packed
weights. Elsewhere the folded convolution runs through ATen. A projection block writes the projection first and lets the
last convolution add onto it in place: the sum of the dual GEMM [a | x] [W3 ; Wd] without a concatenated operand, which
neither oneDNN nor cuDNN could read from two tensors and which would have to be copied together first.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from .blocks import BNReLUMaxPool, ConvBNAct, FusedBlock
from .convert import fuse_
from .functional import ConvBN
from .modules import conv_reason, convbn_of, global_hook_reason, hook_reason, norm_reason
from .ops.aten import fused_conv, has_fused_conv
from .ops.layout import to_nhwc

_EVAL_ONLY = "is the product of optimize_for_inference: it has no batch norms left to train, and no gradients"


class _EvalOnly(nn.Module):
    """A folded module: refuses training mode and gradients instead of giving wrong ones."""

    def train(self, mode: bool = True) -> _EvalOnly:
        if mode:
            raise RuntimeError(f"{type(self).__name__} {_EVAL_ONLY}")
        super().train(False)
        return self


class FoldedConv(_EvalOnly):
    """act(conv(x) + bias + residual) with a batch norm folded into weight and bias.

    x: [N, C, H, W] of the weights' dtype; residual: [N, K, P, Q]; returns [N, K, P, Q] channels_last.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, unit: ConvBN, relu: bool) -> None:
        super().__init__()
        weight, bias = fold(unit)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.geometry = unit.geometry
        self.relu = relu
        self._packed: dict[tuple[int, ...], Tensor] = {}  # by input shape; made again after a copy or a load
        self.eval()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.run(x, residual)

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
        if has_fused_conv(x):
            if residual is not None:
                self._check_residual(x, residual)
                residual = to_nhwc(residual)
            return fused_conv(x, self.pack(x), self.bias, self.geometry, residual, self.relu, into_residual)
        y = F.conv2d(x, self.weight, self.bias, *self.geometry)
        y = y if residual is None else y + residual
        return torch.relu(y) if self.relu else y

    def _check_residual(self, x: Tensor, residual: Tensor) -> None:
        """oneDNN's sum does not check its operand."""
        expected = self.geometry.out_shape(x.shape, self.weight.shape)
        if tuple(residual.shape) != expected or residual.dtype != x.dtype:
            got = f"{list(residual.shape)} {residual.dtype}"
            raise ValueError(f"residual is {got}, expected {list(expected)} {x.dtype} (the convolution's output)")

    def pack(self, x: Tensor) -> Tensor:
        """The weight as oneDNN likes it for inputs of this shape."""
        packed = self._packed.get(tuple(x.shape))
        if packed is None:
            if torch.compiler.is_compiling():
                return self.weight
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


class FoldedBlock(_EvalOnly):
    """A residual block of folded convolutions; `shortcut` is a FoldedConv, any other module, or None (identity)."""

    def __init__(self, units: list[ConvBN], shortcut: ConvBN | nn.Module | None) -> None:
        super().__init__()
        self.convs = nn.ModuleList(FoldedConv(unit, relu=True) for unit in units)
        self.shortcut = FoldedConv(shortcut, relu=False) if isinstance(shortcut, ConvBN) else shortcut
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, K, P, Q]."""
        x = to_nhwc(x)
        shortcut: Any = self.shortcut
        residual = x if shortcut is None else shortcut(x)
        convs: list[Any] = list(self.convs)
        for conv in convs[:-1]:
            x = conv.run(x)  # past nn.Module's call, which costs as much as a small convolution's launch
        return convs[-1].run(x, residual, isinstance(shortcut, FoldedConv))


def fold(unit: ConvBN) -> tuple[Tensor, Tensor]:
    """(weight, bias) of one convolution equal to conv + batch norm with the running statistics.

    Computed in at least float32 and rounded once.
    """
    dtype = unit.weight.dtype
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    k = unit.weight.shape[0]

    def vector(t: Tensor | None, default: float) -> Tensor:
        return unit.weight.new_full((k,), default, dtype=acc) if t is None else t.detach().to(acc)

    weight, bias = unit.weight.detach().to(acc), vector(unit.bias, 0)
    if unit.has_norm:
        scale = vector(unit.gamma, 1) * torch.rsqrt(vector(unit.running_var, 1) + unit.eps)
        weight = weight * scale.view(-1, 1, 1, 1)
        bias = (bias - vector(unit.running_mean, 0)) * scale + vector(unit.beta, 0)
    return weight.to(dtype).contiguous(memory_format=torch.channels_last), bias.to(dtype)


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
    input that requires grad under grad mode.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected an nn.Module")
    if not isinstance(example_input, Tensor) or example_input.dim() != 4:
        raise ValueError(f"example_input is {_describe(example_input)}, expected a Tensor [N, C, H, W]")
    result = copy.deepcopy(model).eval().requires_grad_(False)
    fuse_(result)  # finds the blocks and stems
    report = FoldReport()
    folded: dict[nn.Module, nn.Module] = {}
    if replacement := _folded_module("model", result, report):
        result = replacement
    for name, module in list(result.named_modules()):
        _fold_stem(name, module, report)
        if replacement := _folded_module(name, module, report):
            folded[module] = replacement
    for parent in list(result.modules()):
        for name, child in parent._modules.items():
            if child in folded:
                parent._modules[name] = folded[child]
    result.report = report  # type: ignore[assignment]
    with torch.no_grad():
        result(example_input)  # packs
    return result


def _describe(value: object) -> str:
    return f"a Tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _folded_module(name: str, module: nn.Module, report: FoldReport) -> nn.Module | None:
    """The folded form of a block or unit, or None."""
    if isinstance(module, FusedBlock):
        reason, result = _fold_block(module)
    elif isinstance(module, ConvBNAct):
        reason, result = _fold_unit(module)
    else:
        return None
    if result is None:
        report.left[name] = reason or ""
    else:
        report.folded.append(name)
    return result


def _fold_block(block: FusedBlock) -> tuple[str | None, nn.Module | None]:
    units = [] if block.composed_reason() else [convbn_of(conv, bn) for _, conv, _, bn in block.layers()]  # type: ignore[arg-type]
    projection = block.projection()
    shortcut: Any = convbn_of(*projection) if projection else getattr(block, "downsample", None)
    reason = block.composed_reason() or hook_reason("the block", block)
    if type(block).forward is not FusedBlock.forward:
        reason = f"{type(block).__name__} has a forward of its own"
    for unit in [*units, *([shortcut] if projection else [])]:
        reason = reason or _fold_reason(unit)
    return (reason, None) if reason else (None, FoldedBlock(units, shortcut))


def _fold_unit(module: ConvBNAct) -> tuple[str | None, nn.Module | None]:
    reason = conv_reason("conv", module.conv) or norm_reason("bn", module.bn) or hook_reason("the unit", module)
    if reason is None:
        unit = convbn_of(module.conv, module.bn)
        reason = _fold_reason(unit)
    return (reason, None) if reason else (None, FoldedConv(unit, module.relu))


def _fold_stem(name: str, net: nn.Module, report: FoldReport) -> None:
    """conv1 + bn1 (BN + ReLU + pool) become a folded convolution with ReLU, and the pool."""
    conv, bn = getattr(net, "conv1", None), getattr(net, "bn1", None)
    if not isinstance(bn, BNReLUMaxPool) or conv is None:
        return
    where = f"{name}.conv1".lstrip(".")
    reason = global_hook_reason() or conv_reason("conv1", conv) or hook_reason("bn1", bn)
    if reason is None and bn.running_mean is None:
        reason = "bn1 has no running statistics"
    if reason is not None:
        report.left[where] = reason
        return
    net._modules["conv1"] = FoldedConv(convbn_of(conv, bn), relu=True)
    net._modules["bn1"] = nn.MaxPool2d(*bn.pool)
    report.folded.append(where)
