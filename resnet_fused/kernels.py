"""What the compiler makes of the CUDA kernels, for any architecture and without a GPU.

    for kernel in compiled("sm_90"):
        kernel.symbol, kernel.registers, kernel.spills, kernel.occupancy(), kernel.accesses["LDG", 16], kernel.share

Registers, shared memory and spills are what ptxas reports; instructions and loops are those of the disassembled machine
code.
PTX and results are kept under build/, by the hash of all that they depend on.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import torch

from ._toolchain import find_cuda_home

ARCHES = ("sm_80", "sm_90", "sm_120")
ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "kernels"
_OWN_SOURCE = Path(__file__).read_bytes()  # as it was loaded: what is kept is what this code makes of the kernels

# setup.py's, but for the host compiler's
FLAGS = ("-O3", "-std=c++17", "-Werror", "all-warnings")
_PTXAS = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
# address, opcode with all suffixes, operands
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;\n]*)", re.MULTILINE)
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}  # suffixes of memory instructions; others have 4


@dataclass(frozen=True)
class Multiprocessor:
    """What blocks share; of all architectures: 65536 registers, in four parts, handed out to warps 256 at a time."""

    warps: int
    blocks: int
    shared: int  # bytes; every block takes 1 KiB beside its own


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(64, 32, 164 * 1024),
    "sm_86": Multiprocessor(48, 16, 100 * 1024),
    "sm_89": Multiprocessor(48, 24, 100 * 1024),
    "sm_90": Multiprocessor(64, 32, 228 * 1024),
    "sm_100": Multiprocessor(64, 32, 228 * 1024),
    "sm_120": Multiprocessor(48, 24, 100 * 1024),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel as compiled for one architecture. Sizes in bytes."""

    symbol: str
    source: str  # file in csrc/
    arch: str
    threads: int  # most in a block
    registers: int  # of a thread
    shared: int  # static, of a block
    stack: int  # local memory of a thread
    spills: int  # stored and loaded
    opcodes: dict[str, int]  # of the machine code, with all suffixes: {"LDG.E.128.CONSTANT": 4, ...}
    # Innermost loops with tensor-core instructions, in order: how many of those, and instructions of all kinds.
    loops: list[tuple[int, int]] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Tensor-core instructions among all in the best of the loops; 0 if there are none."""
        return max((tensor / count for tensor, count in self.loops), default=0.0)

    @property
    def accesses(self) -> Counter[tuple[str, int]]:
        """Accesses to memory in the machine code, by instruction (LDG, STG, LDS, STS, LDL, STL, ...) and bytes."""
        counts: Counter[tuple[str, int]] = Counter()
        for opcode, count in self.opcodes.items():
            name, *suffixes = opcode.split(".")
            if re.fullmatch(r"(LD|ST)[GSL]?|LDGSTS|ATOM[GS]?|REDG?", name):
                counts[name, next((_WIDTHS[s] for s in suffixes if s in _WIDTHS), 4)] += count
        return counts

    @property
    def faults(self) -> list[str]:
        """What no kernel may have: spills, local memory, accesses to an unknown space, float64 arithmetic, atomics."""
        names = {opcode.split(".")[0] for opcode in self.opcodes}
        found = {
            f"{self.stack} bytes of stack": self.stack > 0,
            f"{self.spills} bytes of spills": self.spills > 0,
            "local memory": bool(names & {"LDL", "STL"}),
            "accesses to an unknown space": bool(names & {"LD", "ST"}),
            "float64 arithmetic": bool(names & {"DADD", "DMUL", "DFMA", "DSETP"}),
            "atomics": any(re.fullmatch(r"(ATOM|RED)[GS]?", name) for name in names),
            # With 128 accumulators a thread matrix kernels may use all that there are.
            f"{self.registers} registers": self.registers >= 255 and not self.loops,
            "no code that could be read": "EXIT" not in names,
        }
        return [fault for fault, is_there in found.items() if is_there]

    def blocks(self, smem: int = 0) -> int:
        """Blocks of `threads` that a multiprocessor holds; `smem` is dynamic shared memory.

        Raises ValueError for an architecture whose limits are not known here.
        """
        if self.arch not in MULTIPROCESSORS:
            raise ValueError(f"the limits of {self.arch} are not known, only those of {', '.join(MULTIPROCESSORS)}")
        limits = MULTIPROCESSORS[self.arch]
        warps = _round_up(self.threads, 32) // 32
        by_registers = 65536 // 4 // _round_up(32 * self.registers, 256) * 4 // warps
        by_shared = limits.shared // _round_up(self.shared + smem + 1024, 128)
        return min(limits.blocks, limits.warps // warps, by_registers, by_shared)

    def occupancy(self, smem: int = 0) -> float:
        """The share of a multiprocessor's warps that those blocks fill. Raises as `blocks` does."""
        blocks = self.blocks(smem)
        return blocks * (_round_up(self.threads, 32) // 32) / MULTIPROCESSORS[self.arch].warps


class CompilerError(OSError):
    """There is nothing to compile, nothing to compile with, or a tool failed; the message says which."""


def compiled(arch: str = "sm_80", jobs: int | None = None) -> list[Kernel]:
    """All kernels of csrc/ for an architecture. jobs: compilers at a time; by default MAX_JOBS, else the CPUs.

    Raises CompilerError.
    """
    return _compile_all([arch], jobs)[0]


def _compile_all(arches: Sequence[str], jobs: int | None = None) -> list[list[Kernel]]:
    """All kernels for each architecture, from one pool: no compiler idles while an architecture's last file is done."""
    jobs = jobs or int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [[pool.submit(compile_source, source, arch) for source in sources()] for arch in arches]
        try:
            return [[kernel for file in files for kernel in file.result()] for files in waiting]
        except BaseException:
            pool.shutdown(cancel_futures=True)  # one error is enough
            raise


def sources() -> list[str]:
    """The CUDA files of csrc/. Raises CompilerError in an installation without sources."""
    found = sorted(str(path.relative_to(CSRC)) for path in CSRC.rglob("*.cu"))
    if not found:
        raise CompilerError(f"no kernel sources at {CSRC}: this looks at a checkout, not at an installed wheel")
    return found


def compile_source(source: str, arch: str) -> list[Kernel]:
    """The kernels of one file of csrc/."""
    text = _kept(source, arch, ".json", lambda: json.dumps([asdict(kernel) for kernel in _compile(source, arch)]))
    return [
        Kernel(**{**fields, "loops": [(tensor, count) for tensor, count in fields["loops"]]})
        for fields in json.loads(text)
    ]


def ptx(source: str, arch: str) -> str:
    """The PTX of one file of csrc/: the first half of its compilation, and what the tests' emulator runs."""

    def make() -> str:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "kernels.ptx"
            _output([_tools()[0], *FLAGS, f"-I{CSRC}", f"-arch={arch}", "-ptx", CSRC / source, "-o", out])
            return out.read_text()

    return _kept(source, arch, ".ptx", make)


def _kept(source: str, arch: str, suffix: str, make: Callable[[], str]) -> str:
    """What `make` makes of a file, once: of several processes that want it one is at it, the others wait."""
    key = hashlib.sha256("\n".join([source, arch, _tools()[2], *FLAGS]).encode())
    key.update(_OWN_SOURCE)
    for path in _with_headers(CSRC / source):
        key.update(path.read_bytes())
    kept = CACHE / f"{Path(source).stem}-{arch}-{key.hexdigest()[:16]}{suffix}"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with kept.with_suffix(f"{suffix}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not kept.exists():
                partial = kept.with_suffix(f"{suffix}.partial")
                partial.write_text(make())
                partial.replace(kept)
    return kept.read_text()


def _with_headers(path: Path) -> list[Path]:
    """The file and what it includes of csrc/, directly or not."""
    found, left = {path}, [path]
    while left:
        for name in re.findall(r'#include "([^"]+)"', left.pop().read_text()):
            new = {header for header in [CSRC / name] if header.exists()} - found
            found |= new
            left += new
    return sorted(found)


def _compile(source: str, arch: str) -> list[Kernel]:
    nvcc, cuobjdump, _ = _tools()
    ptx_text = ptx(source, arch)
    with tempfile.TemporaryDirectory() as folder:
        file, cubin = Path(folder) / "kernels.ptx", Path(folder) / "kernels.cubin"
        file.write_text(ptx_text)
        report = _output([nvcc, *FLAGS, f"-arch={arch}", "-Xptxas", "-v", "-cubin", file, "-o", cubin])
        code = _output([cuobjdump, "-sass", cubin])
    return read(source, arch, report, ptx_text, code)


def read(source: str, arch: str, report: str, ptx_text: str, code: str) -> list[Kernel]:
    """The kernels of a file from what ptxas -v reports, their PTX, and their code as cuobjdump -sass prints it."""
    sizes = re.findall(r"\.entry (\w+)\([^{]*?\.(?:max|req)ntid ([\d, ]+)", ptx_text)
    threads = {name: _product(dims) for name, dims in sizes}
    parts = re.split(r"^\s*Function : (\w+)$", code, flags=re.MULTILINE)
    machine_code = {
        name: [(int(address, 16), opcode, operands) for address, opcode, operands in _INSTRUCTION.findall(body)]
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }
    return [
        Kernel(
            symbol=found["symbol"],
            source=source,
            arch=arch,
            threads=threads.get(found["symbol"], 1024),  # CUDA's own limit
            registers=int(found["registers"]),
            shared=int(shared[1]) if (shared := re.search(r"(\d+) bytes smem", found["rest"])) else 0,
            stack=int(found["stack"]),
            spills=int(found["stores"]) + int(found["loads"]),
            opcodes=dict(sorted(Counter(opcode for _, opcode, _ in machine_code[found["symbol"]]).items())),
            loops=_loops(machine_code[found["symbol"]]),
        )
        for found in _PTXAS.finditer(report)
    ]


def _loops(code: Sequence[tuple[int, str, str]]) -> list[tuple[int, int]]:
    """Kernel.loops of (address, opcode, operands): a loop is what a branch backwards jumps over, from its target on."""
    ends: dict[int, int] = {}  # by their first address
    for address, opcode, operands in code:
        if opcode.split(".")[0] == "BRA" and (target := re.search(r"\b0x([0-9a-f]+)", operands)):
            begin = int(target[1], 16)
            if begin <= address:
                ends[begin] = address  # of several branches to one target the last
    bodies = {
        (begin, end): [opcode.split(".")[0] for address, opcode, _ in code if begin <= address <= end]
        for begin, end in sorted(ends.items())
    }
    found = {loop: (sum(name.endswith("MMA") for name in body), len(body)) for loop, body in bodies.items()}
    found = {loop: counts for loop, counts in found.items() if counts[0]}
    inner = [(b, e) for b, e in found if not any(b <= b2 and e2 <= e and (b, e) != (b2, e2) for b2, e2 in found)]
    return [found[loop] for loop in inner]


def table(arches: Sequence[str] = ARCHES) -> tuple[list[str], Iterator[list[str]]]:
    """Columns, and a row for each kernel: registers, static shared memory and the occupancy that these leave by
    architecture (a plan's dynamic shared memory may lower it), and the share of the tensor cores in its main loop.

    Raises as `compiled` and `Kernel.occupancy` do.
    """
    by_arch = [sorted(kernels, key=lambda kernel: kernel.symbol) for kernels in _compile_all(arches)]
    return ["kernel", "threads", "shared", *arches, "tensor"], (
        [
            versions[0].symbol,
            str(versions[0].threads),
            str(versions[0].shared),
            *(f"{kernel.registers}  {kernel.occupancy():4.0%}" for kernel in versions),
            " ".join(f"{kernel.share:.0%}" for kernel in versions if kernel.loops),
        ]
        for versions in zip(*by_arch, strict=True)
    )


@cache
def _tools() -> tuple[Path, Path, str]:
    """nvcc, cuobjdump (the toolkit's or Triton's) and nvcc's version."""
    home, why = find_cuda_home(torch.version.cuda)
    if home is None:
        raise CompilerError(f"no CUDA compiler ({why})")
    triton = importlib.util.find_spec("triton")
    roots = (triton.submodule_search_locations if triton else None) or ()
    folders = [home / "bin", *(Path(root) / "backends/nvidia/bin" for root in roots)]
    found = shutil.which("cuobjdump", path=os.pathsep.join(map(str, folders)))
    if found is None:
        raise CompilerError(f"no cuobjdump in {home / 'bin'}; `pip install triton` brings one")
    nvcc = home / "bin/nvcc"
    return nvcc, Path(found), _output([nvcc, "--version"])


def _output(command: Sequence[str | Path]) -> str:
    """stdout and stderr."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise CompilerError(f"{Path(command[0]).name} failed: {done.stdout.strip()}")
    return done.stdout


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _product(dims: str) -> int:
    x, y, z = (*map(int, dims.split(",")), 1, 1)[:3]
    return x * y * z
