"""What the files of single ops share: their tensors, and cases of a plain function and a fused one.

A variant gets the case's arguments and returns what the ops compute, in the same order, so that a test may compare
them. What only the fused op has, masks and the like, it leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import ConvShape, NormShape
from benchmarks.suite import BATCH, DEVICE, TYPES, Build, Case
from benchmarks.variants import DTYPES, compiled
from resnet_fused.timing import Part

EPS = 1e-5
Function = Callable[..., Any]
Shape = NormShape | ConvShape


def activation(channels: int, size: int, dtype: str) -> Tensor:
    """[BATCH, channels, size, size], channels_last."""
    t = torch.randn(BATCH, channels, size, size, device=DEVICE).to(DTYPES[dtype])
    return t.contiguous(memory_format=torch.channels_last)


def weight(conv: ConvShape, dtype: str) -> Tensor:
    """[K, C, R, S], channels_last."""
    fan = conv.channels * conv.kernel**2
    t = torch.randn(conv.filters, conv.channels, conv.kernel, conv.kernel, device=DEVICE) / math.sqrt(fan)
    return t.to(DTYPES[dtype]).contiguous(memory_format=torch.channels_last)


def shift(channels: int) -> Tensor:
    """[C] float32, around 0."""
    return torch.randn(channels, device=DEVICE)


def identity(channels: int) -> tuple[Tensor, Tensor]:
    """Mean and variance that leave a batch norm scale*x + shift."""
    return torch.zeros(channels, device=DEVICE), torch.ones(channels, device=DEVICE)


def affine(channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(scale, shift) and the `identity` with which eager PyTorch's batch norm applies them."""
    return torch.rand(channels, device=DEVICE) + 0.5, torch.randn(channels, device=DEVICE), *identity(channels)


def norm(x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """By eager PyTorch's batch norm with given statistics, whose vectors may be wider than x."""
    return F.batch_norm(x, mean, var, scale, shift, False, 0.0, 0.0)


def stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over pixels [C], as eager PyTorch's batch norm takes them in training."""
    return torch.ops.aten.batch_norm_update_stats(x, None, None, 0.0)


def stats_in_math(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same in ops that torch.compile fuses."""
    var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    return mean, var


class Graph:
    """Forward and backward of a differentiable function, as two calls."""

    def __init__(self, function: Function, inputs: Sequence[Tensor], rest: Sequence[Any], dy: Tensor) -> None:
        self._function, self._rest, self._dy = function, rest, dy
        self._inputs = [t.detach().requires_grad_() for t in inputs]
        self._y: Tensor | None = None

    def forward(self) -> Tensor:
        self._y = None
        self._y = self._function(*self._inputs, *self._rest)
        return self._y

    def backward(self) -> tuple[Tensor, ...]:
        assert self._y is not None
        return torch.autograd.grad(self._y, self._inputs, self._dy)


Arguments = Callable[[Any, str], tuple[Any, ...]]  # of a shape and a dtype


def forward_cases(
    op: str, shapes: Iterable[Shape], arguments: Arguments, variants: dict[str, Function], **about: Any
) -> list[Case]:
    """Cases without gradients. `variants` has "eager", "ours" and, where that is not eager, what "compile" compiles."""

    def make(shape: Shape, dtype: str) -> Build:
        args = arguments(shape, dtype)

        def build(variant: str) -> list[Part]:
            own = variants.get(variant, variants["eager"])
            with torch.no_grad():
                function = compiled(own) if variant == "compile" else _prepared(own, args)

            def call() -> Any:
                with torch.no_grad():
                    return function(*args)

            return [call]

        return build

    return _cases(op, shapes, make, tuple(dict.fromkeys(("eager", "compile", *variants))), **about)


def _prepared(function: Function, args: tuple[Any, ...]) -> Function:
    """A variant that is built for its arguments first has a method for that, which may raise UnavailableError."""
    prepare = getattr(function, "prepare", None)
    return function if prepare is None else prepare(*args)


def graph_cases(
    op: str, shapes: Iterable[Shape], arguments: Arguments, eager: Function, ours: Function, **about: Any
) -> list[Case]:
    """Cases with gradients; arguments: (inputs, others, dy) of `Graph`."""

    def make(shape: Shape, dtype: str) -> Build:
        args = arguments(shape, dtype)

        def build(variant: str) -> list[Part]:
            graph = Graph(compiled(eager) if variant == "compile" else eager if variant == "eager" else ours, *args)
            return [graph.forward, graph.backward]

        return build

    about = {"works": ("forward", "backward"), **about}
    return _cases(op, shapes, make, ("eager", "compile", "ours"), **about)


def _cases(
    op: str, shapes: Iterable[Shape], make: Callable[[Any, str], Build], variants: tuple[str, ...],
    works: tuple[str, ...] = ("forward",), types: Sequence[str] = TYPES, slow: bool = False,
) -> list[Case]:  # fmt: skip
    shapes = list(shapes)
    quick = shapes[0]
    return [
        Case(
            f"{op}-{shape.name}", dtype, works, variants, lambda shape=shape, dtype=dtype: make(shape, dtype),
            quick=shape == quick and dtype == types[0] and not slow, size=shape[0] * shape.size**2, about={"op": op},
        )
        for shape in shapes
        for dtype in types
    ]  # fmt: skip
