"""The machine code of every kernel: registers, spills, the width of memory accesses, how many blocks a multiprocessor
holds, and how much of the matrix kernels' loops the tensor cores have. Other architectures than sm_80: `-m slow`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import conv2d_cases
import few_cases
import gemm_cases
import pytest
import torch
import wgrad_cases
from device import ARCHES
from gemm_cases import GEMMS, Gemm

from resnet_fused import console, data, kernels, plans
from resnet_fused.__main__ import main
from resnet_fused.kernels import Kernel
from resnet_fused.plans import Plan, Step

# Vector variants that write no activation: statistics, and bits.
WITHOUT_STORES = ("bn_stats", "relu_mask")


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("source", kernels.sources())
def test_machine_code(source: str, arch: str) -> None:
    compiled = kernels.compile_source(source, arch)
    assert compiled
    for kernel in compiled:
        assert kernel.faults == [], kernel.symbol
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
    planned = {step.symbol: (step.source, step.block[0] * step.block[1] * step.block[2]) for step in all_steps()}
    compiled = {kernel.symbol: (kernel.source, kernel.threads) for kernel in kernels.compiled("sm_80")}
    assert planned == compiled


def all_steps() -> Iterator[Step]:
    for op in plans.OPS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for channels in (64, 33):
                if op not in gemm_cases.OPS:
                    problem = {"dtype": dtype, "C": channels, **plans_sizes(op)}
                    yield from plans.plan(op, problem, 80).steps
                if op == "bn_act":
                    padded = {"residual_stride": 2, "residual_H": 112, "residual_W": 112, "residual_C": channels // 2}
                    yield from plans.plan(op, problem | padded, 80, {"residual": 4096}).steps
    yield from few_cases.all_steps()
    yield from conv2d_cases.all_steps()
    for gemm in GEMMS:
        for dtype in gemm_cases.DTYPES.values():
            for tile in gemm.tiles:
                problem = gemm.problem(dtype, tile=gemm.tile(tile), **SIZES)
                wide = [{"wide": 1}] if gemm.op == "conv1x1_wgrad" else []
                for changed in [{}, *wide]:
                    yield from gemm.plan({**problem, **changed}, 80).steps
    for dtype in wgrad_cases.DTYPES.values():
        for name in wgrad_cases.KERNELS:
            for tile in range(1, len(wgrad_cases.TILES) + 1):
                yield from wgrad_cases.plan(wgrad_cases.problem((8, 128, 56, 56), 256, dtype), name, tile).steps


def plans_sizes(op: str) -> dict[str, int]:
    names = {name for name, _ in plans._PROBLEMS[op]._fields_}
    sizes = {"M": 3136, "K": 64, "N": 1, "H": 56, "W": 56, "kernel": 3, "stride": 1, "padding": 1}
    return {name: size for name, size in sizes.items() if name in names}


# ----------------------------------------------------------------------------------------------- matrix kernels

SIZES = {"N": 8, "H": 56, "W": 56, "C": 128, "K": 256, "C2": 128}
MATRIX_KERNELS = {gemm.name: gemm for gemm in GEMMS}.values()  # once each

# Activations, weights and products go 16 bytes at a time, by LDGSTS on their way to the tensor cores. What does not:
BITS_AHEAD = ("LDGSTS", 4)  # a mask's words on their way to a prologue: rows of a mask start at any word
BITS_BESIDE = ("LDG", 4)  # a mask's words that gate what an epilogue adds
SCALES = ("LDG", 8)  # of two neighbouring columns of an accumulator
FLOATS = ("STG", 4)  # a float of a thread's, side by side: a block's sums and statistics
BITS = ("STG", 4)  # a mask's words, each of four threads
NARROW = {
    "conv1x1_fprop": {FLOATS},
    "conv1x1_fprop_affine": {FLOATS},
    "conv1x1_dgrad_add": {BITS_BESIDE},
    "conv1x1_dgrad_gate": {FLOATS},
    "conv1x1_dgrad_backward_add": {BITS_AHEAD, BITS_BESIDE},
    "conv1x1_dgrad_backward_gate": {BITS_AHEAD, FLOATS},
    "conv1x1_wgrad_masked": {BITS_AHEAD, FLOATS},
    "conv1x1_wgrad_masked_strided": {BITS_AHEAD, FLOATS},
    "conv1x1_wgrad_masked_affine": {BITS_AHEAD, FLOATS},
    "conv1x1_wgrad_backward": {BITS_AHEAD},
    "conv1x1_wgrad_backward_strided": {BITS_AHEAD},
    "conv1x1_wgrad_backward_affine": {BITS_AHEAD},
    "gram": {FLOATS},
    "gram_strided": {FLOATS},
    "expand": {BITS},
    "expand_affine": {BITS},
    "expand_dual": {BITS, SCALES},
    "expand_dgrad": {BITS_AHEAD, FLOATS},
    "expand_dgrad_projection": {BITS_AHEAD, BITS_BESIDE},
}
# Tensor-core instructions among all of a loop's, in percent, at least: what there is on sm_80 and sm_90, rounded down
# to a half. By tile, in the order of Gemm.tiles; with two phases: the first, its last tiles, the second.
SHARES = {
    "conv1x1_fprop": "54.5 51 35.5 35.5",
    "conv1x1_fprop_affine": "30 27.5 22 16.5",
    "conv1x1_dgrad_add": "50 45 34.5 31.5",
    "conv1x1_dgrad_gate": "49.5 49 33.5 33.5",
    "conv1x1_dgrad_backward_add": "11.5 9.5 6",
    "conv1x1_dgrad_backward_gate": "11.5 9 6",
    "conv1x1_wgrad": "41.5 23",
    "conv1x1_wgrad_strided": "19.5 10",
    "conv1x1_wgrad_affine": "22.5 11.5",
    "conv1x1_wgrad_masked": "25.5 13.5",
    "conv1x1_wgrad_masked_strided": "16 8.5",
    "conv1x1_wgrad_masked_affine": "19 10",
    "conv1x1_wgrad_backward": "11.5 5",
    "conv1x1_wgrad_backward_strided": "8.5 4",
    "conv1x1_wgrad_backward_affine": "9.5 4",
    "gram": "14.5 7.5",
    "gram_strided": "8.5 4.5",
    "expand": "54.5 51 38.5 35.5 42.5",
    "expand_affine": "30.5 28 22 16.5 40",
    "expand_dual": "30/30.5/56 27.5/28/51 22.5/22.5/39 16.5/16.5/35",
    "expand_dgrad": "31/31.5/29 27.5/28/26 21/21/19.5 16.5/16.5/15",
    "expand_dgrad_projection": "31/31.5/52 26/28.5/46.5 20/21.5/32 15.5/17/31",
}


@functools.cache
def machine_code(source: str, arch: str) -> dict[str, Kernel]:
    return {kernel.symbol: kernel for kernel in kernels.compile_source(source, arch)}


def versions(gemm: Gemm, arch: str) -> Iterator[tuple[str, Plan, Kernel]]:
    """By tile and element type: the tile, its plan on an architecture, and the kernel."""
    for dtype, torch_dtype in gemm_cases.DTYPES.items():
        for tile in gemm.tiles:
            problem = gemm.problem(torch_dtype, tile=gemm.tile(tile), **SIZES)
            (source, *_) = (step.source for step in gemm.plan(problem, 80).steps)  # there every tile fits
            plan = gemm.plan(problem, int(arch.removeprefix("sm_")))
            yield tile, plan, machine_code(source, arch)[f"{gemm.name}_{dtype}_{tile}"]


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("gemm", MATRIX_KERNELS, ids=str)
def test_matrix_kernels(gemm: Gemm, arch: str) -> None:
    for _, _, kernel in versions(gemm, arch):
        assert {"HMMA", "LDGSTS", "LDSM"} <= {opcode.split(".")[0] for opcode in kernel.opcodes}, kernel.symbol
        found = {access for access in kernel.accesses if access[0] in ("LDG", "STG", "LDGSTS")}
        assert {("LDGSTS", 16), ("STG", 16)} <= found, kernel.symbol
        assert {access for access in found if access[1] != 16} == NARROW.get(gemm.name, set()), kernel.symbol


# What does not fit into the 100 KB of a multiprocessor: three stages (twice as large where dy comes with u) for a block
# of 256 threads, or for two of 128. (With the mask's words alone two blocks that sum over pixels lack 2 KB.)
TOO_LARGE = {
    "rows": {"256x128x64", "resident"},
    "rows, backward": {"256x128x32", "128x64x32"},
    "pixels": set(),
    "pixels, masked": {"128x128x32"},
    "pixels, backward": {"128x128x32"},
}


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("gemm", MATRIX_KERNELS, ids=str)
def test_residency(gemm: Gemm, arch: str) -> None:
    """Two blocks of 128 threads or one of 256 on a multiprocessor; a tile too large for that is refused."""
    family = "pixels" if gemm.tiles == gemm_cases.PIXELS_TILES else "rows"
    prologue = [kind for kind in ("masked", "backward") if kind in gemm.name]
    too_large = TOO_LARGE[", ".join([family, *prologue])]
    for tile, plan, kernel in versions(gemm, arch):
        if arch == "sm_120" and tile in too_large:
            assert plan.reason.startswith("no resident kernel" if tile == "resident" else f"a tile of {tile} does not")
            assert plan.steps == ()
            continue
        assert plan.reason == "", kernel.symbol
        assert plan.steps[0].symbol == kernel.symbol
        assert kernel.blocks(plan.steps[0].smem) * kernel.threads >= 256, kernel.symbol


@pytest.mark.parametrize("arch", ARCHES[:2])
@pytest.mark.parametrize("gemm", MATRIX_KERNELS, ids=str)
def test_shares_of_the_tensor_cores(gemm: Gemm, arch: str) -> None:
    floors = dict(zip(gemm.tiles, SHARES[gemm.name].split(), strict=True))
    for tile, _, kernel in versions(gemm, arch):
        shares = [100 * tensor / count for tensor, count in kernel.loops]
        for share, floor in zip(shares, map(float, floors[tile].split("/")), strict=True):
            assert share >= floor, (kernel.symbol, shares)


# The same of k x k convolutions, by tile in the order of their cases. In a loop over taps every step counts as one that
# copies and transforms a part of the halo: of fprop's nine to a slice three do, the others skip over a third of the
# instructions. wgrad's loop is the one over taps, within a tile of pixels.
CONV_SHARES = {
    "conv2d_fprop": "21.5 21.5 12.5",
    "conv2d_fprop_strided": "20.5 20.5 12",
    "conv2d_bn_act": "21 21 12.5",
    "conv2d_bn_act_strided": "20.5 20.5 12",
    "conv2d_dgrad_add": "13.5 13.5 7.5",
    "conv2d_dgrad_gate": "13.5 13.5 7.5",
    "conv2d_wgrad": "45.5 45 45.5",
    "conv2d_wgrad_affine": "45.5 45 45.5",
    "conv2d_wgrad_backward": "45.5 45 45.5",
    "conv2d_wgrad_backward_affine": "43 45 45.5",
}


@pytest.mark.parametrize("arch", ARCHES[:2])
@pytest.mark.parametrize("name", [*conv2d_cases.KERNELS, *wgrad_cases.KERNELS])
def test_shares_of_convolutions(name: str, arch: str) -> None:
    floors = list(map(float, CONV_SHARES[name].split()))
    for dtype in gemm_cases.DTYPES.values():
        for tile, floor in enumerate(floors, 1):
            if name in wgrad_cases.KERNELS:
                problem = wgrad_cases.problem((8, 128, 56, 56), 256, dtype)
                step = wgrad_cases.plan(problem, name, tile).steps[0]
            else:
                step = conv2d_cases.plan(name, dtype, tile).steps[0]
            kernel = machine_code(step.source, arch)[step.symbol]
            assert 100 * kernel.share >= floor, (kernel.symbol, kernel.loops)


# --------------------------------------------------------------------------------------------------- the numbers


def kernel(threads: int, registers: int, shared: int = 0, arch: str = "sm_80") -> Kernel:
    return Kernel("k", "k.cu", arch, threads, registers, shared, 0, 0, {})


def test_loops() -> None:
    """Branches backwards, of which the innermost around tensor-core instructions count."""
    code = [
        (0x00, "HMMA.16816.F32.BF16", " R0, R0, R0, RZ "),
        (0x10, "MOV", " R1, 0x10 "),  # begin of the outer loop
        (0x20, "HMMA.16816.F32.BF16", " R4, R0, R2, R4 "),  # of an inner one with two branches back
        (0x30, "BRA", " 0x20 "),
        (0x40, "LDSM.16.MT88.4", " R0, [R9] "),
        (0x50, "BRA.U", " !UP0, 0x20 "),
        (0x60, "FADD", " R4, R4, R4 "),  # one without tensor cores
        (0x70, "BRA", " P1, 0x60 "),
        (0x80, "HMMA.16816.F32.BF16", " R4, R0, R2, R4 "),
        (0x90, "BRA", " 0x80 "),
        (0xA0, "BRA", " 0x10 "),
        (0xB0, "BRA", " 0xd0 "),
        (0xC0, "BRA", " 0xc0 "),
    ]
    assert kernels._loops(code) == [(1, 4), (1, 2)]
    found = Kernel("k", "k.cu", "sm_80", 256, 32, 0, 0, 0, {}, [(1, 4), (1, 2)])
    assert found.share == 0.5
    assert kernel(256, 32).share == 0


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


def test_faults() -> None:
    code = {"EXIT": 1, "LDG.E.128": 2, "HMMA.16816.F32": 4}
    good = Kernel("k", "k.cu", "sm_80", 256, 128, 0, 0, 0, code)
    assert good.faults == []
    for opcode, fault in {
        "LDL": "local",
        "ST.E": "space",
        "DFMA": "float64",
        "ATOMG.E": "atomics",
        "RED.E": "atomics",
    }.items():
        (found,) = replace(good, opcodes={**code, opcode: 1}).faults
        assert fault in found
    assert replace(good, registers=255).faults == ["255 registers"]
    assert replace(good, registers=255, loops=[(4, 8)]).faults == []
    assert replace(good, opcodes={}).faults == ["no code that could be read"]
    assert replace(good, stack=8, spills=16).faults == ["8 bytes of stack", "16 bytes of spills"]


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
    assert "local memory" in indexed.faults
    assert f"{spilling.spills} bytes of spills" in spilling.faults
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
    assert re.findall(r"\w+", header) == ["kernel", "threads", "shared", "sm_80", "sm_90", "tensor"]
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
