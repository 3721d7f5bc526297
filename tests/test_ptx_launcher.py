"""The emulator behind a launch function: torch's allocations are the memory that kernels may touch."""

from __future__ import annotations

import ctypes
import struct
from types import SimpleNamespace

import ptx
import pytest
import torch
from ptx import compilers
from ptx.launcher import Emulator

SOURCE = r"""
struct Params { const float* x; float* y; long long n; };
extern "C" __global__ void scale(const Params p) {
  for (long long i = blockIdx.x * blockDim.x + threadIdx.x; i < p.n; i += gridDim.x * blockDim.x) p.y[i] = 2 * p.x[i];
}
"""


@pytest.fixture
def emulator():
    return Emulator([compilers.nvcc(SOURCE)])


def scale(emulator: Emulator, x: torch.Tensor, y: torch.Tensor, n: int) -> None:
    """What an extension's launch function would be called with."""
    params = ctypes.create_string_buffer(struct.pack("<QQq", x.data_ptr(), y.data_ptr(), n), 24)
    emulator(
        SimpleNamespace(
            symbol=b"scale", grid=(2, 1, 1), block=(64, 1, 1), smem=0, params=ctypes.addressof(params), params_size=24
        )
    )


def test_tensors_from_before_and_within(emulator):
    x = torch.randn(1000)
    with emulator.attached():
        y = torch.empty(1000)
        scale(emulator, x, y, 1000)
        scale(emulator, x[200:], y[100:], 800)  # views reach as far as their storage
    assert torch.equal(y[:100], 2 * x[:100])
    assert torch.equal(y[100:900], 2 * x[200:])
    first = emulator.launches[0]
    assert (first.symbol, first.grid, first.block) == ("scale", (2, 1, 1), (64, 1, 1))
    assert first.stats.sectors_read == first.stats.sectors_written == 125


def test_tensors_of_any_layout():
    y = ptx.poison_(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    assert y.isnan().all()
    module = ptx.Module(compilers.nvcc(SOURCE))
    strided = torch.arange(20.0)[::2]  # the kernel may touch the gaps between elements, and nothing past the last one
    for n, fits in ((19, True), (20, False)):
        params = struct.pack("<QQq", strided.data_ptr(), y.data_ptr(), n)
        if fits:
            module.launch("scale", 1, 32, [params], buffers=[strided, y])
        else:
            with pytest.raises(ptx.Fault, match="past the end of buffer 'buffer0' of 76 bytes"):
                module.launch("scale", 1, 32, [params], buffers=[strided, y])


def test_bounds_are_those_of_the_allocation(emulator):
    x = torch.randn(100)
    with emulator.attached():
        y, spare = torch.empty(99), torch.empty(10_000)
        with pytest.raises(ptx.Fault) as info:
            scale(emulator, x, y, 100)
        assert info.value.kind == "out-of-bounds"
        assert info.value.address == y.data_ptr() + 4 * 99
        address = spare.data_ptr()
        del spare
        with pytest.raises(ptx.Fault, match="out-of-bounds"):
            scale(emulator, SimpleNamespace(data_ptr=lambda: address), y, 99)  # freed memory


def test_unknown_kernels_and_no_attachment(emulator):
    with pytest.raises(RuntimeError, match="within attached"):
        scale(emulator, torch.empty(1), torch.empty(1), 1)
    with emulator.attached(), pytest.raises(KeyError, match="no kernel other"):
        emulator(SimpleNamespace(symbol="other", grid=(1, 1, 1), block=(1, 1, 1), smem=0, params=0, params_size=0))
