"""The machine code of every kernel, for three architectures: registers, spills and the width of memory accesses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from resnet_fused import console, data, kernels, plans
from resnet_fused.__main__ import main
from resnet_fused.kernels import Kernel

UNITS = [(source, arch) for source in kernels.sources() for arch in kernels.ARCHES]
# Vector variants that write no activation: statistics, and bits.
WITHOUT_STORES = ("bn_stats", "relu_mask")


@pytest.mark.parametrize(("source", "arch"), UNITS)
def test_machine_code(source: str, arch: str) -> None:
    compiled = kernels.compile_source(source, arch)
    assert compiled
    for kernel in compiled:
        assert (kernel.stack, kernel.spills) == (0, 0), kernel.symbol
        assert kernel.registers < 255, kernel.symbol
        names = {opcode.split(".")[0] for opcode in kernel.opcodes}
        assert "EXIT" in names, "the disassembly was read"
        assert not names & {"LDL", "STL"}, f"{kernel.symbol} has local memory"
        assert not names & {"LD", "ST"}, f"{kernel.symbol} has accesses to an unknown space"
        assert not names & {"DADD", "DMUL", "DFMA", "DSETP"}, f"{kernel.symbol} has float64 arithmetic"
        assert not re.search(r"\b(ATOM|RED)G?\b", " ".join(names)), f"{kernel.symbol} has atomics"
        if re.search(r"_v[48]$", kernel.symbol):
            check_vector_accesses(kernel)


def check_vector_accesses(kernel: Kernel) -> None:
    """Activations go 16 bytes at a time: nothing is narrower than the 4 bytes of coefficients, masks and sums."""
    found = kernel.accesses
    assert found["LDG", 16], kernel.symbol
    assert found["STG", 16] or kernel.symbol.startswith(WITHOUT_STORES), kernel.symbol
    narrow = {access: n for access, n in found.items() if access[0] in ("LDG", "STG") and access[1] < 4}
    assert not narrow, kernel.symbol


def test_plans_and_kernels_match() -> None:
    """Every kernel is planned and every planned kernel is there, in the file and for the block that the plan says."""
    planned = {}
    for op in plans.OPS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for channels in (64, 33):
                problem = {"dtype": dtype, "C": channels, **plans_sizes(op)}
                for step in plans.plan(op, problem, 80).steps:
                    planned[step.symbol] = (step.source, step.block[0] * step.block[1] * step.block[2], step.smem)
    compiled = {kernel.symbol: (kernel.source, kernel.threads, 0) for kernel in kernels.compiled("sm_80", jobs=2)}
    assert planned == compiled


def plans_sizes(op: str) -> dict[str, int]:
    names = {name for name, _ in plans._PROBLEMS[op]._fields_}
    sizes = {"M": 3136, "N": 1, "H": 56, "W": 56, "kernel": 3, "stride": 1, "padding": 1}
    return {name: size for name, size in sizes.items() if name in names}


def kernel(threads: int, registers: int, shared: int = 0, arch: str = "sm_80") -> Kernel:
    return Kernel("k", "k.cu", arch, threads, registers, shared, 0, 0, {})


@pytest.mark.parametrize(
    ("case", "smem", "warps"),
    [
        (kernel(256, 32), 0, 64),
        (kernel(256, 33), 0, 48),  # registers come by 256 a warp: 40 each
        (kernel(256, 255), 0, 8),
        (kernel(1024, 46), 0, 32),
        (kernel(1024, 64, arch="sm_120"), 0, 32),
        (kernel(256, 32, arch="sm_120"), 0, 48),
        (kernel(32, 32), 0, 32),  # blocks
        (kernel(32, 32, arch="sm_86"), 0, 16),
        (kernel(256, 32, 48 * 1024), 0, 24),  # 3 blocks of 49 KiB in 164
        (kernel(256, 32, 40 * 1024, "sm_90"), 59 * 1024, 16),  # 2 blocks of 100 KiB in 228
        (kernel(256, 32, arch="sm_120"), 99 * 1024, 8),
    ],
    ids=str,
)
def test_occupancy(case: Kernel, smem: int, warps: int) -> None:
    assert case.occupancy(smem) == warps / kernels.MULTIPROCESSORS[case.arch].warps


def test_occupancy_of_an_unknown_architecture() -> None:
    with pytest.raises(ValueError, match="sm_75 are not known"):
        kernel(256, 32, arch="sm_75").occupancy()


def test_access_widths() -> None:
    code = {"LDG.E.128.CONSTANT": 3, "LDG.E.U16": 2, "LDG.E": 1, "STG.E.64": 4, "LDS.U8": 5, "LDC.64": 6, "LEA": 7}
    accesses = Kernel("k", "k.cu", "sm_80", 256, 32, 0, 0, 0, code).accesses
    assert accesses == {("LDG", 16): 3, ("LDG", 2): 2, ("LDG", 4): 1, ("STG", 8): 4, ("LDS", 1): 5}


# ------------------------------------------------------------------------------------- the tool, on a small project

SOURCE = r"""
extern "C" __global__ void __launch_bounds__(1024, 2) spilling(const float* x, float* y) {
  float v[64];
#pragma unroll
  for (int k = 0; k < 64; ++k) v[k] = x[k * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < 64; ++k) y[k * 1024 + threadIdx.x] = v[63 - k] * v[k];
}
extern "C" __global__ void __launch_bounds__(128) indexed(const float4* x, float* y, int i) {
  __shared__ float shared[128];
  float v[32];
  for (int k = 0; k < 32; ++k) v[k] = y[k];
  for (int k = 0; k < i; ++k) v[k * i & 31] *= v[k & 31];
  shared[threadIdx.x] = x[threadIdx.x].y + v[i + 1 & 31];
  __syncthreads();
  y[threadIdx.x] = shared[127 - threadIdx.x] + v[i + 2 & 31];
}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(kernels, "CSRC", tmp_path / "csrc")
    monkeypatch.setattr(kernels, "CACHE", tmp_path / "build")
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/bad.cu").write_text(SOURCE)
    return tmp_path


def test_bad_kernels_show_and_results_are_kept(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    indexed, spilling = sorted(kernels.compiled("sm_80"), key=lambda k: k.symbol)
    assert (indexed.threads, spilling.threads) == (128, 1024)
    assert (indexed.shared, indexed.stack) == (512, 128)
    assert indexed.accesses["LDL", 4]
    assert spilling.registers <= 32
    assert spilling.spills > 0
    assert spilling.occupancy() == 1

    real = kernels._compile
    monkeypatch.setattr(kernels, "_compile", lambda *arguments: pytest.fail("compiled again"))
    assert sorted(kernels.compiled("sm_80"), key=lambda k: k.symbol) == [indexed, spilling]
    monkeypatch.setattr(kernels, "_compile", real)
    (project / "csrc/bad.cu").write_text(SOURCE.replace("128", "96"))
    assert {k.threads for k in kernels.compiled("sm_80")} == {96, 1024}


@pytest.mark.parametrize("rich", [True, False])
def test_info_lists_kernels(
    rich: bool, project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not rich:

        def missing(*arguments: object) -> None:
            raise data.MissingPackageError("no rich")

        monkeypatch.setattr(console, "require", missing)
    assert main(["info", "--kernels", "sm_80", "sm_90"]) == 0
    out = capsys.readouterr().out
    (header,) = (line for line in out.splitlines() if "sm_90" in line)
    assert re.findall(r"\w+", header) == ["kernel", "threads", "shared", "sm_80", "sm_90"]
    rows = [re.findall(r"[\w%]+", line) for line in out.splitlines() if re.search(r"spilling|indexed", line)]
    assert [row[:3] for row in rows] == [["indexed", "128", "512"], ["spilling", "1024", "0"]]
    assert rows[1][3:] == ["32", "100%", "32", "100%"]
    assert ("┃" in out) == rich


def test_errors_are_one_line(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_with(message: str) -> None:
        assert main(["info", "--kernels", "sm_80"]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1

    (project / "csrc/bad.cu").write_text("nonsense;")
    fails_with("nvcc failed")
    monkeypatch.setattr(kernels, "_tools", kernels._tools.__wrapped__)
    monkeypatch.setattr(kernels, "find_cuda_home", lambda torch_cuda: (project, "a toolkit"))
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    fails_with("no cuobjdump")
    monkeypatch.setattr(kernels, "find_cuda_home", lambda torch_cuda: (None, "no nvcc found"))
    fails_with("no CUDA compiler (no nvcc found)")
    (project / "csrc/bad.cu").unlink()
    fails_with("no kernel sources")
