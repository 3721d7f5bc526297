"""`ops`: torch.ops.resnet_fused, each op run by who is chosen for it. What composes blocks of ops calls them here.

Outside of a GPU, and of what takes its place in tests, there is nothing to choose: an op's CPU implementation runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .. import backend, plans
from ..backend import Choice
from ..triton import launch as triton_launch

_cuda, _triton = torch.ops.resnet_fused, torch.ops.resnet_fused_triton
Chooser = Callable[[str, tuple[Any, ...]], Choice]

COMPOSED: dict[str, Callable[..., Any]] = {}  # by op of the matrix kernels: ATen's convolutions and the fused tails
_listeners: list[Callable[[str, tuple[Any, ...]], None]] = []
_chooser: Chooser | None = None


class _Op:
    """One op; called with positional arguments only."""

    __slots__ = ("_name", "_own")

    def __init__(self, name: str) -> None:
        self._name, self._own = name, getattr(_cuda, name)

    def __call__(self, *args: Any) -> Any:
        for listener in _listeners:
            listener(self._name, args)
        if on_kernels(args):
            return run(self._name, args, chosen(self._name, args))
        return self._own(*args)


class _Ops:
    def __getattr__(self, name: str) -> _Op:
        return _Op(name)  # not kept here: torch.compile refuses an attribute that is set as it traces


ops: Any = _Ops()


def on_kernels(args: tuple[Any, ...]) -> bool:
    """Whether these arguments are on a GPU, or where a test runs the kernels."""
    first = args[0]
    return first.is_cuda or plans.launcher_replaced() or triton_launch.launcher_replaced()


def backends_of(name: str) -> tuple[str, ...]:
    """Those that have op `name`."""
    exists = {"cuda": True, "triton": hasattr(_triton, name), "aten": name in COMPOSED}
    return tuple(backend for backend, there in exists.items() if there)


def chosen(name: str, args: tuple[Any, ...]) -> Choice:
    """Who runs an op on these arguments, on a GPU."""
    wanted = backend.current()
    if wanted == "auto":
        return _chooser(name, args) if _chooser is not None and args[0].is_cuda else Choice("cuda")
    there = wanted in backends_of(name) and not (wanted == "triton" and args[0].dtype == torch.float64)
    return Choice(wanted if there else "cuda")


def run(name: str, args: tuple[Any, ...], choice: Choice) -> Any:
    """An op as chosen."""
    if choice.backend == "aten":
        return COMPOSED[name](*args)
    if choice.backend == "triton":
        with triton_launch.wanted_config(choice.variant):
            return getattr(_triton, name)(*args)
    if not choice.variant:
        return getattr(_cuda, name)(*args)
    with plans.wanted_tile(choice.variant):
        return getattr(_cuda, name)(*args)


def choose_by(chooser: Chooser) -> None:
    """What "auto" asks from now on."""
    global _chooser
    _chooser = chooser


@contextmanager
def listening(listener: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Within the block `listener` is told of every op that is called: its name and arguments."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
