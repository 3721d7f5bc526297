"""A PTX emulator: runs the PTX of a CUDA kernel on CPU tensors, with checks that no GPU makes.

    module = Module(ptx_text)
    stats = module.launch("kernel", grid=(4,), block=(128,), args=[x, y, n], smem=0)

See README.md beside this file for what is emulated, what is checked and what is not.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from . import build

_native = build.load_emulator()
SyntaxError = _native.SyntaxError  # PTX that is not understood, with its line

_SHARED_KIB = {75: 64, 80: 163, 86: 99, 87: 163, 88: 99, 89: 99, 120: 99, 121: 99}  # what a block can have; else 227
Argument = torch.Tensor | int | float | bytes | bytearray | None


class Fault(RuntimeError):  # noqa: N818  (the word of the field)
    """What a kernel did wrong, and where.

    kind: "out-of-bounds", "misaligned", "race", "uninitialized", "pending" (touches what is still under way),
    "unwritten", "unfenced", "divergent-barrier", "divergent-warp", "deadlock", "limit", "trap", ...
    what, kernel; line and text of the PTX; cta and thread as (x, y, z); address.
    """

    def __init__(
        self,
        kind: str,
        what: str,
        kernel: str,
        line: int,
        text: str,
        cta: Sequence[int],
        thread: Sequence[int],
        address: int,
    ) -> None:
        self.kind, self.what, self.kernel, self.line, self.text = kind, what, kernel, line, text.strip()
        self.cta, self.thread, self.address = tuple(cta), tuple(thread), address
        where = f"kernel {kernel}"
        if line:
            where += f", PTX line {line}: '{self.text}', CTA {self.cta}, thread {self.thread}"
        super().__init__(f"{kind}: {what} ({where}, address 0x{address:x})")


@dataclass(frozen=True)
class Stats:
    """What one launch did. Instructions and requests are counted per warp."""

    flops: int  # of tensor cores: 2 m n k for each product
    instructions: dict[str, int]  # by category
    lines: dict[int, int]  # by line of the PTX
    global_load_requests: int
    global_load_sectors: int  # the 32-byte sectors of each request, added up
    global_store_requests: int
    global_store_sectors: int
    shared_requests: int
    shared_wavefronts: int
    shared_conflicts: int  # wavefronts beyond the fewest possible
    buffers: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> unique sectors read, written

    @property
    def sectors_read(self) -> int:
        """Unique 32-byte sectors of global memory that were read: what DRAM has to deliver at least."""
        return sum(read for read, _ in self.buffers.values())

    @property
    def sectors_written(self) -> int:
        return sum(written for _, written in self.buffers.values())

    @property
    def sectors_per_load(self) -> float:
        return self.global_load_sectors / max(self.global_load_requests, 1)

    @property
    def sectors_per_store(self) -> float:
        return self.global_store_sectors / max(self.global_store_requests, 1)


def poison_(tensor: torch.Tensor) -> torch.Tensor:
    """Fills a tensor, and the gaps between its elements, with ones: NaN in every floating format, -1 as an integer."""
    elements = _extent(tensor) // tensor.element_size()
    tensor.data.as_strided((elements,), (1,)).view(torch.uint8).fill_(255)
    return tensor


def _pack(argument: Argument, size: int) -> bytes:
    """One kernel parameter of `size` bytes."""
    if argument is None:
        return bytes(size)
    if isinstance(argument, torch.Tensor):
        if size != 8:
            raise TypeError(f"a tensor for a parameter of {size} bytes")
        return struct.pack("<Q", argument.data_ptr())
    if isinstance(argument, (bytes, bytearray)):
        if len(argument) != size:
            raise TypeError(f"a struct of {len(argument)} bytes for a parameter of {size} bytes")
        return bytes(argument)
    if isinstance(argument, float):
        return struct.pack("<f" if size == 4 else "<d", argument)
    return (int(argument) & ((1 << (8 * size)) - 1)).to_bytes(size, "little")


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first to the last element, whatever the strides."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _three(size: int | Sequence[int]) -> list[int]:
    sizes = [size] if isinstance(size, int) else list(size)
    return [*sizes, 1, 1, 1][:3]


class Module:
    """The kernels of one PTX text. Raises ptx.SyntaxError, with the line, for what it does not understand."""

    def __init__(self, text: str) -> None:
        self._module = _native.Module(text)
        self.kernels: list[str] = self._module.kernels()

    def launch(
        self,
        symbol: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Argument] = (),
        smem: int = 0,
        seed: int = 0,
        race_check: bool = True,
        *,
        outputs: Iterable[torch.Tensor] = (),
        buffers: Iterable[torch.Tensor | tuple[int, int]] = (),
        check_uninitialized: bool = True,
        threads: int | None = None,
        max_instructions: int = 1 << 27,
        allow_same_values: bool = False,
        ctas: Sequence[int] = (),
    ) -> Stats:
        """Runs the whole grid on host memory; raises Fault at the first thing that goes wrong.

        args: CPU tensors (their pointers), numbers, None (a null pointer) and bytes (a by-value struct). Fewer than the
        kernel has are filled up with zeros. The kernel may touch the bytes of the tensors among args, outputs and
        buffers, and nothing else; a buffer may also be (address, bytes). What is in `outputs` must be written in full.
        seed: of the order in which warps run. smem: dynamic shared memory in bytes. ctas: only these blocks, by their
        number x + grid[0] * (y + grid[1] * z): for grids too large to be run as a whole. allow_same_values: it is no
        race if warps write to shared memory what is there already; in Triton they do, where a layout repeats elements.
        """
        grid, block = _three(grid), _three(block)
        self._check_limits(symbol, block, smem)
        params = self._module.params(symbol)
        if len(args) > len(params):
            raise TypeError(f"{symbol} takes {len(params)} parameters, got {len(args)}")
        packed = bytearray()
        for argument, (offset, size) in zip([*args, *[None] * (len(params) - len(args))], params, strict=True):
            packed.extend(bytes(offset - len(packed)) + _pack(argument, size))
        specs = [
            (t.data_ptr(), _extent(t), f"arg{i}", False) for i, t in enumerate(args) if isinstance(t, torch.Tensor)
        ]
        known = {spec[0]: spec[2] for spec in specs}
        for i, t in enumerate(outputs):
            specs.append((t.data_ptr(), _extent(t), known.get(t.data_ptr(), f"output{i}"), True))
        for i, b in enumerate(buffers):
            address, size = b if isinstance(b, tuple) else (b.data_ptr(), _extent(b))
            specs.append((address, size, known.get(address, f"buffer{i}"), False))
        fault, counters = self._module.launch(
            symbol,
            grid,
            block,
            smem,
            bytes(packed),
            specs,
            seed,
            race_check,
            check_uninitialized,
            threads or os.cpu_count() or 1,
            max_instructions,
            allow_same_values,
            list(ctas),
        )
        if fault is not None:
            raise Fault(**fault)
        return Stats(**counters)

    def _check_limits(self, symbol: str, block: Sequence[int], smem: int) -> None:
        required, most, static = self._module.limits(symbol)
        count = block[0] * block[1] * block[2]
        if not 0 < count <= 1024 or (required and count != required) or (most and count > most):
            limit = f"exactly {required}" if required else f"at most {most or 1024}"
            raise ValueError(f"{symbol}: a block of {count} threads, but it takes {limit}")
        target = self._module.target()
        available = _SHARED_KIB.get(target, 227) * 1024
        if static + smem > available:
            raise ValueError(
                f"{symbol}: {static + smem} bytes of shared memory, sm_{target} has {available} for a block"
            )


def seeds(n: int = 3) -> Iterable[int]:
    """A few seeds for a test: several orders of the warps show what one may hide."""
    return itertools.islice(itertools.count(), n)
