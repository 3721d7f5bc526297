"""The `device` fixture: cpu, emulated (the CUDA kernels on the PTX emulator, with CPU tensors) and, with a GPU, cuda.

Beside those, for ops that have a Triton kernel: interpreted, triton-sm_80, triton-sm_90 (its PTX for those on the
emulator) and, with a GPU, triton-cuda.

def test_bn_stats(device):
    mean, var = device.run(torch.ops.resnet_fused.bn_stats, x)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from compiled import module
from torch import nn

from resnet_fused import backend, kernels, plans
from resnet_fused.triton import launch as triton_launch

if TYPE_CHECKING:
    from ptx.launcher import Emulator

# Of tests that look at machine code. Each costs minutes of compilation: by default the one whose PTX the emulator runs,
# and which has room for every tile.
ARCHES = [pytest.param(arch, marks=[pytest.mark.slow] * (arch != "sm_80")) for arch in kernels.ARCHES]
DEVICES = ["cpu", "emulated", *(["cuda"] if torch.cuda.is_available() else [])]
COMPILED_TRITON = ["triton-sm_80", "triton-sm_90", *(["triton-cuda"] if torch.cuda.is_available() else [])]


def kernel_source(symbol: str) -> Path:
    """The file of csrc/ that defines a kernel: the one whose macros name the longest beginning of its symbol."""
    names = {
        name: path
        for path in kernels.CSRC.rglob("*.cu")
        for name in re.findall(r"^RESNET_FUSED_\w+\((\w+)", path.read_text(), re.MULTILINE)
        if symbol.startswith(name)
    }
    assert names, f"no file defines a kernel {symbol}"
    return names[max(names, key=len)]


@functools.cache
def _emulator() -> Emulator:
    """With the kernels of csrc/, compiled as they are launched."""
    from ptx.launcher import Emulator

    return Emulator(find=lambda symbol: module(str(kernel_source(symbol).relative_to(kernels.CSRC))))


def emulated_launches() -> list[Any]:
    """What the last emulated run launched, with what the emulator counted."""
    return list(_emulator().launches)


class Device:
    """Where the ops run."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.type = "cuda" if name.endswith("cuda") else "cpu"  # of its tensors
        self.symbols: list[str] = []  # the kernels of the last run, if emulated

    def run(self, f: Callable[..., Any], *arguments: Any, seed: int = 0) -> Any:
        """f(*arguments): tensors and modules, in tuples and dicts too, go there, and the results' tensors come back.

        What torch.empty gives is poisoned: NaN, the largest integer. Emulated, `seed` decides the order of the warps,
        and f must launch a kernel.
        """
        with _poisoned(), self._kernels(seed):
            return _moved(f(*_moved(arguments, self.type)), "cpu")

    @contextmanager
    def _kernels(self, seed: int) -> Iterator[None]:
        if self.name == "cuda":
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                yield
        elif self.name == "emulated":
            emulator = _emulator()
            emulator.seed = seed
            emulator.launches.clear()
            with emulator.attached(), plans.launcher(emulator):
                yield
            self.symbols = [launch.symbol for launch in emulator.launches]
            assert self.symbols, "no kernel was launched"
        elif self.name.startswith(("triton", "interpreted")):
            with backend.forced("triton"), self._triton(seed):
                yield
        else:
            yield

    @contextmanager
    def _triton(self, seed: int) -> Iterator[None]:
        from triton_launchers import ByTriton, TritonEmulator, interpreted  # not earlier: it imports Triton

        if self.name == "triton-cuda":
            with ByTriton():
                yield
        elif self.name == "interpreted":
            with interpreted(), ByTriton():
                yield
        else:
            emulator = TritonEmulator(int(self.name.removeprefix("triton-sm_")), seed)
            with triton_launch.launcher(emulator), ByTriton():
                yield
            self.symbols = [launch.symbol for launch in emulator.launches]
            assert self.symbols, "no kernel was launched"


@contextmanager
def _poisoned() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # this is what fills fresh memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _moved(value: Any, where: str) -> Any:
    if isinstance(value, (torch.Tensor, nn.Module)):
        return value.to(where)
    if isinstance(value, (tuple, list)):
        return type(value)([_moved(v, where) for v in value])
    if isinstance(value, dict):
        return {key: _moved(v, where) for key, v in value.items()}
    return value


def on_gpus(count: int) -> Callable[[Any], Any]:
    """Decorator of a test that needs so many GPUs: elsewhere there is no such test."""

    def keep(test: Any) -> Any:
        return pytest.mark.cuda(test) if torch.cuda.device_count() >= count else None

    return keep


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Device:
    return Device(request.param)
