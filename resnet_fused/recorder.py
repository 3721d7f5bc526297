"""Where `explain` listens: the fused ops report every call to the innermost active recording."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch

from .ops.pointwise import matrix_kernels_take


class Pass(NamedTuple):
    """A step that is one pass over its tensors and has no plan: which plan column it belongs to, and what it does."""

    plan: str  # "fused", or "aten" where the pass is an op of PyTorch's with nothing beside it to fuse
    what: str


class Call(NamedTuple):
    """One call of a fused op."""

    x_shape: tuple[int, ...]
    dtype: torch.dtype
    units: tuple  # the ConvBN units of the main path
    shortcut: object
    spec: object  # the BlockSpec, PreActSpec, Pool or Pass; None where plain PyTorch ran
    reason: str | None  # why plain PyTorch ran
    kernels: bool  # whether the matrix kernels take x
    device: torch.device


_calls: ContextVar[list[Call] | None] = ContextVar("resnet_fused_calls", default=None)


@contextmanager
def recording() -> Iterator[list[Call]]:
    """The list that fused ops append their calls to, inside the context."""
    calls: list[Call] = []
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)


def record(x, units, shortcut, spec, reason: str | None) -> None:
    """Report a call; free when nobody records."""
    if torch.compiler.is_compiling():
        return
    calls = _calls.get()
    if calls is not None:
        where = (matrix_kernels_take(x), x.device)
        calls.append(Call(tuple(x.shape), x.dtype, tuple(units), shortcut, spec, reason, *where))
