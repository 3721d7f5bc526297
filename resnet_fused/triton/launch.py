"""Where every Triton kernel is launched: on its tensors' GPU, interpreted, or by what takes the place of both."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

# (kernel, grid, args, constexprs, num_warps, num_stages), as in `launch`
Launcher = Callable[[Any, tuple[int, ...], Sequence[Any], Mapping[str, Any], int, int], None]


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    args: Sequence[Tensor | int | float | None],
    constexprs: Mapping[str, Any],
    num_warps: int = 4,
    num_stages: int = 2,
) -> None:
    """Runs a kernel's `grid` (up to three numbers) of programs on the current stream of its tensors' device.

    args: the kernel's arguments in their order; None is a pointer that is not there, which the kernel knows when it is
    compiled. constexprs: those that it is compiled for, by name. A grid without programs launches nothing.
    """
    if all(grid):
        _launcher(kernel, grid, args, constexprs, num_warps, num_stages)


def _by_triton(
    kernel: Any, grid: tuple[int, ...], args: Sequence[Any], constexprs: Mapping[str, Any], num_warps: int,
    num_stages: int,
) -> None:  # fmt: skip
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # Triton takes the current one
        kernel[grid](*args, **constexprs, num_warps=num_warps, num_stages=num_stages)


_launcher: Launcher = _by_triton
_wanted = threading.local()


def config_wanted() -> int:
    """The number, from 1, of the config that products are to run with; 0: their default."""
    return getattr(_wanted, "config", 0)


@contextmanager
def wanted_config(number: int) -> Iterator[None]:
    """Within the block this thread's products run with their config of this number; they raise IndexError where it does
    not exist."""
    before, _wanted.config = config_wanted(), number
    try:
        yield
    finally:
        _wanted.config = before


def arch_of(x: Tensor) -> int:
    """The compute capability, times ten, that x's kernels are compiled for; interpreted, one is as good as another."""
    if not x.is_cuda:
        return getattr(_launcher, "cc", 80)
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def launcher_replaced() -> bool:
    """Whether kernels run elsewhere than where their tensors are: within `launcher`."""
    return _launcher is not _by_triton


@contextmanager
def launcher(replacement: Launcher) -> Iterator[None]:
    """Within the block every launch, of ops on CPU tensors too, goes to `replacement`."""
    global _launcher
    before, _launcher = _launcher, replacement
    try:
        yield
    finally:
        _launcher = before
