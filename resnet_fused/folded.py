"""Batch norms folded into weights: a convolution, a norm on its own and a whole block, for inference alone.

On the CPU (float32, bfloat16) every convolution with its bias, its residual and its ReLU is one oneDNN call on packed
weights. Elsewhere the folded convolution runs through ATen. A projection block writes the projection first and lets the
last convolution add onto it in place: the sum of the dual GEMM [a | x] [W3 ; Wd] without a concatenated operand, which
neither oneDNN nor cuDNN could read from two tensors and which would have to be copied together first.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy

from .checks import broadcasts
from .functional import ConvBN, vector
from .modules import NotScripted, traced_as_leaf
from .ops.aten import fused_conv, has_fused_conv
from .ops.layout import acc_dtype, to_nhwc
from .reference import PaddedShortcut, scaled

EVAL_ONLY = "is the product of optimize_for_inference: it has no batch norms left to train, and no gradients"


class NeverTrains(nn.Module):
    """Refuses training mode before anything has changed."""

    def train(self, mode: bool = True) -> NeverTrains:
        if mode:
            raise RuntimeError(f"{type(self).__name__} {EVAL_ONLY}")
        super().train(False)
        return self


class EvalOnly(NotScripted, NeverTrains):
    """A folded module: refuses training mode and gradients instead of giving wrong ones."""


class FoldedConv(EvalOnly):
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
        self._packed: dict[tuple[int, ...], Tensor] = {}  # by input shape; made again after a copy
        self._packed_from: tuple[Tensor, int] | None = None  # the weight and its version
        self.eval()

    @property
    def channels(self) -> int:
        """How many its input has."""
        return self.weight.shape[1] * self.geometry.groups

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return traced_as_leaf(self, x, residual) if isinstance(x, Proxy) else self.run(x, residual)

    def run(self, x: Tensor, residual: Tensor | None = None, into_residual: bool = False) -> Tensor:
        """The call itself; `into_residual` allows to write over `residual`."""
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"x requires grad, but {type(self).__name__} {EVAL_ONLY}; use torch.no_grad()")
        if forward_ad._current_level >= 0:
            raise RuntimeError(f"forward-mode differentiation, but {type(self).__name__} {EVAL_ONLY}")
        if x.dtype != self.weight.dtype:
            raise RuntimeError(f"x is {x.dtype}, expected {self.weight.dtype} (that of the weights)")
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x has shape {list(x.shape)}, expected [N, {self.channels}, H, W]")
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
        """The weight as oneDNN likes it for inputs of this shape; a weight replaced or changed in place is seen."""
        weight = self.weight
        version = 0 if weight.is_inference() else weight._version
        if self._packed_from is None or self._packed_from[0] is not weight or self._packed_from[1] != version:
            self._packed, self._packed_from = {}, (weight, version)
        packed = self._packed.get(tuple(x.shape))
        if packed is None:
            stride, padding, dilation, groups = self.geometry
            reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # its stub lacks the input's shape
            with torch.inference_mode(False):
                packed = reorder(weight.to_mkldnn(), padding, stride, dilation, groups, x.shape)
            if len(self._packed) >= 8:  # a few sizes in turn, each of up to two slices; more would only hold memory
                self._packed.clear()
            self._packed[tuple(x.shape)] = packed
        return packed

    def _apply(self, fn: Any, recurse: bool = True) -> FoldedConv:
        self._packed, self._packed_from = {}, None
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": {}, "_packed_from": None}


class FoldedNormReLU(EvalOnly):
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


class FoldedBlock(EvalOnly):
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
