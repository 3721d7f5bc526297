"""Runs the launches of an extension on the emulator: what takes the place of CUDA's launch in a test.

emulator = Emulator([compilers.nvcc(text_of_a_kernel)])
with emulator.attached(), plans.launcher(emulator):
    y = op(x)
emulator.launches[-1].stats
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from . import Module, Stats, build


@dataclass(frozen=True)
class Launched:
    """One launch that ran without a fault."""

    symbol: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    smem: int
    stats: Stats


class Emulator:
    """Finds the kernel of a launch in a set of PTX texts, and the memory that it may touch in torch's allocator.

    Within `attached()` every block that torch has allocated on the host, to the byte, is what kernels may access.
    A launch is any object with symbol (str or bytes), grid, block, smem, params (an address) and params_size: the
    kernel's single by-value parameter.
    """

    def __init__(
        self, texts: Iterable[str] = (), seed: int = 0, find: Callable[[str], Module] | None = None, **options: Any
    ) -> None:
        """find: the module with a kernel that `texts` do not have; options: those of Module.launch."""
        self.seed, self.options, self._find = seed, options, find
        self.launches: list[Launched] = []
        self._kernels: dict[str, Module] = {}
        for text in texts:
            self._load(Module(text))
        self._tracker: Any = None

    @contextmanager
    def attached(self) -> Iterator[Emulator]:
        """Follows torch's host allocations of this thread, beginning with those of the tensors that exist."""
        self._tracker = build.load_allocations().Tracker()
        for tensor in gc.get_objects():
            if (
                issubclass(type(tensor), torch.Tensor)
                and tensor.device.type == "cpu"
                and tensor.layout == torch.strided
            ):
                self._add(tensor)
        self._tracker.start()
        try:
            yield self
        finally:
            self._tracker.stop()
            self._tracker = None

    def _add(self, tensor: torch.Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
            address, size = storage.data_ptr(), storage.nbytes()
        except (RuntimeError, NotImplementedError):  # a fake or wrapped tensor has no memory
            return
        if address and size:
            self._tracker.add(address, size)

    def _load(self, module: Module) -> None:
        self._kernels |= dict.fromkeys(module.kernels, module)

    def __call__(self, launch: Any) -> None:
        if self._tracker is None:
            raise RuntimeError("launches run only within attached()")
        symbol = launch.symbol.decode() if isinstance(launch.symbol, bytes) else launch.symbol
        if symbol not in self._kernels and self._find:
            self._load(self._find(symbol))
        if symbol not in self._kernels:
            raise KeyError(f"no kernel {symbol} among the PTX of this emulator")
        grid, block = tuple(launch.grid), tuple(launch.block)
        stats = self._kernels[symbol].launch(
            symbol,
            grid,
            block,
            [ctypes.string_at(launch.params, launch.params_size)],
            smem=launch.smem,
            seed=self.seed + len(self.launches),
            buffers=self._tracker.live(),
            **self.options,
        )
        self.launches.append(Launched(symbol, grid, block, launch.smem, stats))
