"""The plans, and every kernel of the tails: the PTX that nvcc emits, run by the emulator as its plan says.

The matrix kernels run in the tests of their ops and in test_gemm_traffic.py; here are their plans.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import gemm_cases
import pytest
import torch
from gemm_cases import GEMMS, Gemm
from ptx import Module, compilers
from torch import Tensor

from resnet_fused import plans
from resnet_fused.kernels import MULTIPROCESSORS

CSRC = Path(__file__).parents[1] / "csrc"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Ragged in every way: fewer channels than a panel, scalar and 16-byte variants, several panels, several blocks of rows.
SHAPES = [(3, 1, 1, 8), (2, 5, 7, 3), (1, 9, 15, 16), (2, 6, 11, 33), (3, 7, 9, 72), (1, 5, 5, 264)]

ops = torch.ops.resnet_fused


@functools.cache
def module(source: str) -> Module:
    text = (CSRC / source).read_text()
    return Module(compilers.nvcc(text, flags=(f"-I{CSRC}", "-O3")))


def emulate(op: str, problem: Mapping[str, object], buffers: dict[str, Tensor | None], outputs: str) -> None:
    """Runs the plan's steps on the emulator. `outputs` must be written in full, and nothing else may be touched."""
    present = {name: t for name, t in buffers.items() if t is not None}
    addresses = {name: t.data_ptr() for name, t in present.items()}
    planned = plans.plan(op, problem, 80, addresses)
    assert planned.reason == ""
    if "workspace" in {name for name, _ in plans._PROBLEMS[op]._fields_}:
        present["workspace"] = torch.empty(planned.workspace)
        addresses["workspace"] = present["workspace"].data_ptr()
        planned = plans.plan(op, problem, 80, addresses)
    for name in [*outputs.split(), *({"workspace"} & present.keys())]:
        present[name].untyped_storage().fill_(255)  # NaN, -1
    for i, step in enumerate(planned.steps):
        last = i == len(planned.steps) - 1
        written = [present[name] for name in outputs.split()] if last and len(planned.steps) == 1 else []
        stats = module(step.source).launch(
            step.symbol, step.grid, step.block, [step.params], step.smem, outputs=written, buffers=present.values()
        )
        assert stats.shared_conflicts == 0, step.symbol
    for name in outputs.split():
        if present[name].is_floating_point():
            assert not present[name].isnan().any(), f"{op} left a part of {name} unwritten"


def activation(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    """[N, C, H, W], channels_last, from (N, H, W, C)."""
    return torch.randn(shape).to(dtype).permute(0, 3, 1, 2)


def matrix(x: Tensor) -> dict[str, object]:
    return {"dtype": x.dtype, "M": x.numel() // x.size(1), "C": x.size(1)}


def vector(x: Tensor) -> Tensor:
    return torch.randn(x.size(1))


def assert_same(got: Tensor, expected: Tensor) -> None:
    """Up to the order of float32 sums and a rounding of the type; bits and taps exactly."""
    if not got.is_floating_point():
        # one pre-activation in a few thousand lies within rounding of 0, where a fused multiply-add may differ
        assert (got != expected).sum() <= got.numel() // 1000
        return
    eps = torch.finfo(got.dtype).eps
    scale = expected.double().abs().max() if got.dim() == 1 else expected.double().abs() + 1
    assert ((got.double() - expected.double()).abs() <= 8 * eps * scale).all()


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=SHAPES, ids=str)
def x(request: pytest.FixtureRequest, dtype: torch.dtype) -> Tensor:
    return activation(request.param, dtype)


def test_bn_stats(x: Tensor) -> None:
    x = (2 * x + 3).to(x.dtype)
    mean, var = torch.empty(x.size(1)), torch.empty(x.size(1))
    emulate("bn_stats", matrix(x), {"x": x, "mean": mean, "var": var}, "mean var")
    wide = x.double()
    assert_same(mean, wide.mean((0, 2, 3)))
    assert_same(var, wide.var((0, 2, 3), unbiased=False))


def test_bn_stats_far_from_zero() -> None:
    x = activation((2, 20, 20, 32), torch.float32) + 1000
    mean, var = torch.empty(32), torch.empty(32)
    emulate("bn_stats", matrix(x), {"x": x, "mean": mean, "var": var}, "mean var")
    expected = x.double().var((0, 2, 3), unbiased=False)
    assert ((var - expected).abs() <= 1e-5 * expected).all()


@pytest.mark.parametrize("residual", ["none", "plain", "affine"])
def test_bn_act(x: Tensor, residual: str) -> None:
    scale, shift = vector(x), vector(x)
    r = None if residual == "none" else torch.randn_like(x)
    rs, rt = (vector(x), vector(x)) if residual == "affine" else (None, None)
    y, mask = ops.bn_act(x, scale, shift, r, rs, rt, True, True)
    expected = y.clone(), mask.clone()
    buffers = {"x": x, "scale": scale, "shift": shift, "residual": r, "residual_scale": rs, "residual_shift": rt}
    emulate("bn_act", {**matrix(x), "relu": 1}, {**buffers, "y": y, "mask": mask}, "y mask")
    assert_same(y, expected[0])
    assert_same(mask, expected[1])


def test_relu_mask_is_exact(x: Tensor) -> None:
    mask = ops.relu_mask(x)
    expected = mask.clone()
    emulate("relu_mask", matrix(x), {"y": x, "mask": mask}, "mask")
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("gate", ["mask", "recompute", "none"])
def test_bn_act_backward(x: Tensor, gate: str) -> None:
    dy, mean = torch.randn_like(x), vector(x)
    mask = ops.relu_mask(torch.randn_like(x)) if gate == "mask" else None
    scale, shift = (vector(x), vector(x)) if gate == "recompute" else (None, None)
    given = {"dy": dy, "mask": mask, "scale": scale, "shift": shift, "x": x, "mean": mean}

    dz, sum_dz, sum_dz_xc = ops.bn_act_backward_reduce(dy, mask, x, scale, shift, mean, True)
    expected = dz.clone(), sum_dz.clone(), sum_dz_xc.clone()
    outputs = {"dz": dz, "sum_dz": sum_dz, "sum_dz_xc": sum_dz_xc}
    emulate("bn_act_backward_reduce", matrix(x), {**given, **outputs}, "dz sum_dz sum_dz_xc")
    assert_same(dz, expected[0])
    magnitude = (expected[0].double().abs() * (1 + (x.double() - mean.view(-1, 1, 1)).abs())).sum((0, 2, 3))
    for got, sums in zip((sum_dz, sum_dz_xc), expected[1:], strict=True):
        assert ((got - sums).abs() <= 1e-6 * magnitude).all()

    coefficients = [vector(x), vector(x), vector(x)]
    dx = ops.bn_act_backward_apply(dy, mask, x, scale, shift, mean, *coefficients)
    expected_dx = dx.clone()
    names = dict(zip(("coef_dz", "coef_x", "coef_1"), coefficients, strict=True))
    emulate("bn_act_backward_apply", matrix(x), {**given, **names, "dx": dx}, "dx")
    assert_same(dx, expected_dx)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("relu", [False, True])
def test_gram_operand(x: Tensor, stride: int, relu: bool) -> None:
    scale, shift = (vector(x), vector(x)) if relu else (None, None)
    center = vector(x)
    a, mean = ops.gram_operand(x, scale, shift, relu, center, stride)
    expected = a.clone()
    n, c, h, w = x.shape
    problem = {"dtype": x.dtype, "relu": relu, "N": n, "H": h, "W": w, "C": c, "stride": stride}
    buffers = {"x": x, "scale": scale, "shift": shift, "center": center, "a": a, "mean": mean}
    emulate("gram_operand", problem, buffers, "a mean")
    assert_same(a, expected)
    assert_same(mean, a.double().mean((0, 2, 3)))


@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0), (5, 3, 2)], ids=str)
def test_bn_act_pool(x: Tensor, window: tuple[int, int, int]) -> None:
    kernel, stride, padding = window
    n, c, h, w = x.shape
    if min(h, w) + 2 * padding < kernel:
        window = kernel, stride, padding = 1, 1, 0
    problem = {"dtype": x.dtype, "N": n, "H": h, "W": w, "C": c}
    problem |= {"kernel": kernel, "stride": stride, "padding": padding}
    scale, shift = vector(x), vector(x)
    y, argmax = ops.bn_act_pool(x, scale, shift, *window)
    expected = y.clone(), argmax.clone()
    buffers = {"x": x, "scale": scale, "shift": shift, "y": y, "argmax": argmax}
    emulate("bn_act_pool", problem, buffers, "y argmax")
    assert_same(y, expected[0])
    assert_same(argmax, expected[1])

    da = ops.bn_act_pool_backward(y, argmax, h, w, *window)
    expected_da = da.clone()
    emulate("bn_act_pool_backward", problem, {"dy": y, "argmax": argmax, "da": da}, "da")
    assert_same(da, expected_da)


# ---------------------------------------------------------------------------------------- the plans themselves

TAILS = [op for op in plans.OPS if op not in gemm_cases.OPS and not op.startswith("conv2d")]


def problem_of(op: str, dtype: torch.dtype = torch.bfloat16, channels: int = 64) -> dict[str, object]:
    sizes = {name for name, _ in plans._PROBLEMS[op]._fields_}
    every = {"M": 3136, "K": channels, "N": 1, "H": 56, "W": 56, "kernel": 3, "stride": 1, "padding": 1, "relu": 1}
    return {"dtype": dtype, "C": channels, **{name: v for name, v in every.items() if name in sizes}}


@pytest.mark.parametrize("op", TAILS)
def test_reasons(op: str) -> None:
    assert "float64" in plans.plan(op, problem_of(op, torch.float64)).reason
    assert "7.5" in plans.plan(op, problem_of(op), arch=75).reason
    assert "channels" in plans.plan(op, problem_of(op, channels=100_000)).reason
    assert plans.plan(op, problem_of(op, torch.float64)).steps == ()


@pytest.mark.parametrize("op", TAILS)
def test_variants(op: str) -> None:
    def first(*args: object, **buffers: int) -> str:
        return plans.plan(op, problem_of(op, *args), buffers=buffers).steps[0].symbol

    activation = "dy" if "backward" in op else "y" if op == "relu_mask" else "x"
    name = {"concat_act": "concat_act_copy", "concat_act_backward": "bn_act_backward_reduce"}.get(op, op)
    assert first(torch.bfloat16, 64) == f"{name}_bf16_v8"
    assert first(torch.float16, 64, **{activation: 4096}) == f"{name}_f16_v8"
    assert first(torch.float16, 64, **{activation: 4098}) == f"{name}_f16"
    assert first(torch.float32, 100) == f"{name}_f32_v4"
    assert first(torch.bfloat16, 100) == f"{name}_bf16"


def test_unknown_names() -> None:
    with pytest.raises(KeyError, match="bn_conv"):
        plans.plan("bn_conv", {})
    with pytest.raises(KeyError, match="colour"):
        plans.plan("bn_stats", {"colour": 1})


def test_no_rows() -> None:
    assert plans.plan("bn_act", {"dtype": torch.float32, "M": 0, "C": 8}).steps == ()
    sums = plans.plan("bn_act_backward_reduce", {"dtype": torch.float32, "M": 0, "C": 8}, buffers={"mean": 64})
    assert [step.symbol for step in sums.steps] == ["sum_partials"]
    assert "rows" in plans.plan("bn_stats", {"dtype": torch.float32, "M": 0, "C": 8}).reason


def test_large_tensors_keep_64_bits() -> None:
    planned = plans.plan("bn_stats", {"dtype": torch.float16, "M": 2**33, "C": 64})
    first, last = planned.steps
    assert first.grid[0] <= 1024
    assert planned.workspace == first.grid[0] * 2 * 64
    assert (2**33).to_bytes(8, "little") in first.params
    assert last.symbol == "bn_stats_finalize"


def test_ops_launch_their_plans() -> None:
    """The op asks the launcher for what the plan says, with its tensors' addresses."""
    seen = []

    def record(launch: plans.Launch) -> None:
        seen.append((launch.symbol.decode(), tuple(launch.grid), tuple(launch.block), launch.params_size))

    x = activation((2, 6, 6, 24), torch.float16)
    with plans.launcher(record):
        ops.bn_stats(x)
    steps = plans.plan("bn_stats", matrix(x)).steps
    assert seen == [(s.symbol, s.grid, s.block, len(s.params)) for s in steps]


def test_launcher_errors_come_through() -> None:
    def refuse(launch: plans.Launch) -> None:
        raise ZeroDivisionError(launch.symbol.decode())

    x = activation((2, 6, 6, 24), torch.float16)
    with pytest.raises(ZeroDivisionError, match="bn_stats_f16_v8"), plans.launcher(refuse):
        ops.bn_stats(x)
    assert ops.bn_stats(x)[0].isfinite().all()  # the CPU's own again


def test_steps_run_by_themselves() -> None:
    """As the op launches them; what fails has its name."""
    x = activation((2, 6, 6, 24), torch.float16)
    steps = plans.plan("bn_stats", matrix(x)).steps
    seen = []

    def record(launch: plans.Launch) -> None:
        params = ctypes.string_at(launch.params, launch.params_size)
        seen.append((launch.symbol.decode(), tuple(launch.grid), tuple(launch.block), launch.smem, params))

    with plans.launcher(record):
        plans.run(steps, None)
    assert seen == [(s.symbol, s.grid, s.block, s.smem, s.params) for s in steps]

    def refuse(launch: plans.Launch) -> None:
        raise ZeroDivisionError(launch.symbol.decode())

    with pytest.raises(ZeroDivisionError, match="bn_stats_f16_v8"), plans.launcher(refuse):
        plans.run(steps, None)
    with pytest.raises(RuntimeError, match=r"cudaGetDevice|without CUDA"):
        plans.run(steps, 0)


def test_float64_stays_on_the_cpu() -> None:
    with plans.launcher(lambda launch: pytest.fail("launched")):
        ops.bn_stats(activation((2, 6, 6, 24), torch.float64))


# ---------------------------------------------------------------------------------- plans of the matrix kernels

SMALL = {"N": 2, "H": 9, "W": 9, "C": 64, "K": 128, "C2": 64}


def reason(gemm: Gemm, arch: int = 80, dtype: torch.dtype = torch.bfloat16, **changed: int) -> str:
    plan = gemm.plan(gemm.problem(dtype, **{**SMALL, **changed}), arch)
    assert bool(plan.reason) == (plan.steps == ())
    return plan.reason


@pytest.mark.parametrize("gemm", GEMMS, ids=str)
def test_matrix_reasons(gemm: Gemm) -> None:
    assert reason(gemm) == ""
    assert "bfloat16 and float16" in reason(gemm, dtype=torch.float32)
    assert "bfloat16 and float16" in reason(gemm, dtype=torch.float64)
    assert "7.5" in reason(gemm, 75)
    assert "12 channels are not a multiple of 8" in reason(gemm, C=12)
    assert "1 to 65536 channels, got 100000" in reason(gemm, C=100_000)
    assert "2^31 pixels" in reason(gemm, N=2**21, H=33, W=32)
    for missing in set(gemm.menu) - set(gemm.tiles):
        wanted = "resident kernel" if missing == "resident" else f"tile of {missing} does not fit"
        assert wanted in reason(gemm, tile=gemm.tile(missing), C=128)


@pytest.mark.parametrize("tile", [9, -1])
@pytest.mark.parametrize("gemm", GEMMS, ids=str)
def test_unknown_tiles(gemm: Gemm, tile: int) -> None:
    assert f"tile {tile} does not exist" in reason(gemm, tile=tile)


@pytest.mark.parametrize("gemm", GEMMS, ids=str)
def test_matrix_operands_start_aligned(gemm: Gemm) -> None:
    """16 bytes, of all that is read or written so; what is not are bits, and what a second kernel writes."""
    problem = gemm.problem(torch.bfloat16, **SMALL)
    tensors = gemm.tensors(problem)
    matrices = [name for name, t in tensors.items() if t.dtype == torch.bfloat16]
    assert matrices
    for name in matrices:
        addresses = {other: t.data_ptr() + 8 * (other == name) for other, t in tensors.items()}
        assert "multiple of 16 bytes" in plans.plan(gemm.op, problem, 80, addresses).reason, name


def refused(op: str, gemm: str, stride: int = 1, without: str = "", given: str = "", **changed: int) -> str:
    """The reason for the operands of a kernel, but for some."""
    found = next(g for g in GEMMS if g.name == gemm)
    names = {*found.inputs.split(), *found.outputs.split(), *given.split()} - set(without.split())
    problem = {**found.problem(torch.bfloat16, **SMALL), **changed, "stride": stride}
    return plans.plan(op, problem, 80, dict.fromkeys(names, 4096)).reason


def test_operands_that_do_not_go_together() -> None:
    assert "gate takes stride 1" in refused("conv1x1_dgrad", "conv1x1_dgrad_gate", stride=2)
    assert "stride 1" in refused("conv1x1_wgrad", "conv1x1_wgrad_affine", stride=2)
    assert "stride 1" in refused("expand_dgrad", "expand_dgrad", stride=2)
    assert "not of du" in refused("conv1x1_wgrad", "conv1x1_wgrad_backward", given="sum_dz")
    assert "scale and shift" in refused("expand", "expand_dual", stride=2, without="scale shift")


def test_no_pixels() -> None:
    for gemm in GEMMS:
        empty = gemm.plan(gemm.problem(torch.bfloat16, **{**SMALL, "N": 0}))
        assert empty.steps == ()
        # Sums over no pixels are the caller's business; without them there is nothing to do.
        sums = gemm.op in ("conv1x1_wgrad", "gram") or {"mean", "sum_dz"} & set(gemm.outputs.split())
        assert ("no pixels" in empty.reason) == bool(sums), gemm


class Unit(NamedTuple):
    """A 1x1 convolution of ResNet-50: from c to k channels, size*size pixels of its output."""

    c: int
    k: int
    size: int
    stride: int
    c2: int = 8  # of the projection's operand where this one is added to a projection


def units() -> Iterator[Unit]:
    for width, size, before in ((64, 56, 64), (128, 28, 256), (256, 14, 512), (512, 7, 1024)):
        stride = 1 if width == 64 else 2
        yield Unit(before, width, size * stride, 1)  # the first block's
        yield Unit(4 * width, width, size, 1)  # the others'
        yield Unit(width, 4 * width, size, 1, before)
        yield Unit(before, 4 * width, size, stride)  # the projection


@pytest.mark.parametrize("arch", [80, 90, 120])
@pytest.mark.parametrize("batch", [256, 1])
@pytest.mark.parametrize("gemm", GEMMS, ids=str)
def test_resnet50(gemm: Gemm, batch: int, arch: int) -> None:
    """Every unit has a plan, by a tile that the kernel has and that fits, over all of the output."""
    chosen = [unit for unit in units() if gemm.op == "expand" or unit.stride == gemm.stride]
    assert chosen
    for unit in chosen:
        sizes = {"N": batch, "H": unit.size, "W": unit.size, "C": unit.c, "K": unit.k, "C2": unit.c2}
        plan = gemm.plan(gemm.problem(torch.float16, **sizes), arch)
        assert plan.reason == "", unit
        step = plan.steps[0]
        name, tile = step.symbol.rsplit("_", 1)
        assert name == f"{gemm.name}_f16"
        assert tile in gemm.tiles, unit
        threads, shared = 32 * step.block[1], MULTIPROCESSORS[f"sm_{arch}"].shared
        assert 256 // threads * (step.smem + 1024) <= shared, unit
        rows = batch * unit.size**2
        if gemm.tiles == gemm_cases.PIXELS_TILES:
            check_splits(gemm, unit, rows, tile, step, plan.workspace)
        else:
            check_tiles(gemm, unit, rows, tile, step, plan.workspace)


def check_tiles(gemm: Gemm, unit: Unit, rows: int, tile: str, step: plans.Step, workspace: int) -> None:
    """Tiles cover the output; sums of a tile's rows are small beside them."""
    columns = unit.c if "dgrad" in gemm.op else unit.k
    m, n = (128, 128) if tile == "resident" else map(int, tile.split("x")[:2])
    down, across = -(-rows // m), -(-columns // n)
    if tile == "resident":
        assert step.grid[0] == down
        assert 1 <= step.grid[1] <= across
        assert step.grid[1] == 1 or step.grid[0] < 256, "columns are divided only where there are few rows"
    else:
        assert step.grid == (down * across, 1, 1)
    sums = {"mean", "sum_dz"} & set(gemm.outputs.split())
    assert workspace == (down * 2 * columns if sums else 0)


def check_splits(gemm: Gemm, unit: Unit, rows: int, tile: str, step: plans.Step, workspace: int) -> None:
    """Splits cover the pixels; what they write and read again is a tenth of the operands, or blocks are few."""
    i, j = (unit.c, unit.c) if gemm.op == "gram" else (unit.k, unit.c)
    side = int(tile.split("x")[0])
    down, across = -(-i // side), -(-j // side)
    tiles, splits = step.grid[:2]
    assert tiles == (down * (down + 1) // 2 if gemm.op == "gram" else down * across)
    (per_split,) = struct.unpack_from("<i", step.params, 12)
    assert per_split % 32 == 0
    assert (splits - 1) * per_split < rows <= splits * per_split
    sums = gemm.op == "gram" or "masked" in gemm.name
    assert workspace == splits * i * (j + sums)
    assert splits == 1 or tiles * splits <= 512
    partial, operands = 2 * 4 * splits * i * j, 2 * rows * (i + j)
    assert partial <= operands / 10 or tiles * splits <= 128 or splits == 1


@pytest.mark.parametrize(
    ("name", "arch", "tiles"),
    [  # by stage, at batch 256: of the convolution at a block's end, or at its begin
        ("conv1x1_fprop", 80, "128x64x32 256x128x64 256x128x64 256x128x64"),
        ("conv1x1_fprop", 120, "128x64x32 256x128x32 256x128x32 256x128x32"),
        ("conv1x1_dgrad_backward_add", 80, "256x128x32 256x128x32 256x128x32 256x128x32"),
        ("conv1x1_dgrad_backward_add", 120, "128x128x32 128x128x32 128x128x32 128x128x32"),
        ("conv1x1_wgrad", 80, "64x64x32 128x128x32 128x128x32 128x128x32"),
        ("conv1x1_wgrad_backward", 120, "64x64x32 64x64x32 64x64x32 64x64x32"),
        ("expand_affine", 80, "resident resident resident 256x128x64"),
        ("expand_affine", 120, "resident 128x128x32 256x128x32 256x128x32"),
        ("expand_dual", 80, "128x128x32 256x128x64 256x128x64 256x128x64"),
        ("expand_dgrad", 80, "128x64x32 256x128x64 256x128x64 256x128x64"),
        ("expand_dgrad", 120, "128x64x32 256x128x32 256x128x32 256x128x32"),
        ("gram", 90, "64x64x32 128x128x32 128x128x32 128x128x32"),
    ],
)
def test_chosen_tiles(name: str, arch: int, tiles: str) -> None:
    gemm = next(gemm for gemm in GEMMS if gemm.name == name)
    of_stages = list(units())[2 if "expand" in name or name == "gram" else 1 :: 4]
    found = []
    for unit in of_stages:
        sizes = {"N": 256, "H": unit.size, "W": unit.size, "C": unit.c, "K": unit.k, "C2": unit.c2}
        found.append(gemm.plan(gemm.problem(torch.bfloat16, **sizes), arch).steps[0].symbol.rsplit("_", 1)[1])
    assert found == tiles.split()


@pytest.mark.parametrize("gemm", GEMMS, ids=str)
def test_matrices_of_more_than_2_31_elements(gemm: Gemm) -> None:
    for sizes in (
        {"N": 4096, "H": 56, "W": 56, "C": 256, "K": 1024, "C2": 256},
        {**SMALL, "N": 2**20, "H": 22, "W": 22},
    ):
        plan = gemm.plan(gemm.problem(torch.bfloat16, **sizes))
        assert plan.reason == ""
        assert sizes["N"] * sizes["H"] * sizes["W"] * min(sizes["C"], sizes["K"]) > 2**31
        assert all(0 < blocks < 2**31 for step in plan.steps for blocks in step.grid)
        assert all(blocks < 2**16 for step in plan.steps for blocks in step.grid[1:])


def test_divisions_by_multiplication() -> None:
    """What kernels compute with a plan's Divider, for every 31-bit number near a multiple of the divisor."""
    gemm = next(gemm for gemm in GEMMS if gemm.name == "conv1x1_fprop" and gemm.stride == 2)
    sizes = [*range(1, 300), *(2**i + j for i in range(9, 15) for j in (-1, 0, 1)), 1000, 12345]
    for size in sizes:
        plan = gemm.plan(gemm.problem(torch.bfloat16, N=1, H=size, W=7, C=8, K=8))
        stride, height, width, *dividers = struct.unpack_from("<3i6I", plan.steps[0].params, 56)  # RowsParams.map
        assert (stride, (height + 1) // 2, (width + 1) // 2) == (2, size, 7)
        for (divisor, multiplier, shift), expected in zip((dividers[:3], dividers[3:]), (size, 7), strict=True):
            assert divisor == expected
            most = 2**31 // divisor
            for multiple, off in itertools.product((1, 2, 3, most // 2, most - 1, most), (-1, 0, 1, divisor // 2)):
                n = min(max(multiple * divisor + off, 0), 2**31 - 1)
                quotient = n if divisor == 1 else (n * multiplier >> 32) >> shift
                assert quotient == n // divisor, (n, divisor)
