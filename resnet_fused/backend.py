"""Who runs an op: this package's CUDA kernels, its Triton kernels, or ATen's convolutions with the fused tails.

    RESNET_FUSED_BACKEND=auto|cuda|triton|aten    in the environment, for the whole process
    with backend.forced("triton"): ...            within a block, for every thread

"auto" takes what `tune` measured to be the quickest for an op on these shapes, and where nothing was measured what
`choice.py` expects to be. The others take what they say wherever it exists.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, cast, get_args

Backend = Literal["auto", "cuda", "triton", "aten"]
LEAN_PLANS = ("gram", "recompute")  # of an end unit that keeps no raw output: see planner.py
VARIABLE = "RESNET_FUSED_BACKEND"


class Choice(NamedTuple):
    """Who runs an op, and which of its plans: a tile's number (cuda) or a config's (triton), 0 being the default."""

    backend: str  # "cuda", "triton" or "aten"
    variant: int = 0

    def __str__(self) -> str:
        return f"{self.backend}:{self.variant}" if self.variant else self.backend

    @classmethod
    def parse(cls, text: str) -> Choice:
        """The inverse of str. Raises ValueError."""
        backend, _, variant = text.partition(":")
        if backend not in get_args(Backend)[1:] or (variant and not variant.isdigit()):
            raise ValueError(f"{text!r} is no choice, expected cuda, cuda:<tile>, triton, triton:<config> or aten")
        return cls(backend, int(variant or 0))


def check(name: str, value: str) -> Backend:
    if value not in get_args(Backend):
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(get_args(Backend))}")
    return cast(Backend, value)


_current: Backend | None = None  # not asked for yet


def current() -> Backend:
    """The one in force. Raises ValueError for what the environment has, if that is none."""
    global _current
    if _current is None:
        _current = check(VARIABLE, os.environ.get(VARIABLE) or "auto")
    return _current


@contextmanager
def forced(backend: Backend) -> Iterator[None]:
    """Within the block `backend` is in force."""
    global _current
    before, _current = current(), check("backend", backend)
    try:
        yield
    finally:
        _current = before


_fuses = True


def fuses() -> bool:
    """Whether fused blocks run fused."""
    return _fuses


@contextmanager
def unfused() -> Iterator[None]:
    """Within it every fused block, unit and stem, of every thread, runs as the plain PyTorch that it stands for."""
    global _fuses
    before, _fuses = _fuses, False
    try:
        yield
    finally:
        _fuses = before
