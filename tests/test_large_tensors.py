"""Tensors of more than 2^31 elements: the last block of every kernel, run alone in a grid and in memory of that size.

The memory is reserved and takes room only where it is written. Large tensors end with the pixels of a small one; what
the last block makes of them must be, to the last bit, what comes of the small tensor.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator

import gemm_cases
import pytest
import torch
from compiled import module
from device import Device
from gemm_cases import GEMMS, PIXELS_TILES, Gemm
from op_cases import activation
from torch import Tensor

from resnet_fused import plans
from resnet_fused.costs import Buffer, sizes_of
from resnet_fused.plans import Plan, Step

NORESERVE = 0x4000  # MAP_NORESERVE of Linux
CHANNELS = {"C": 64, "K": 64, "C2": 64}


def reserve(shape: list[int], dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written."""
    count = torch.Size(shape).numel()
    size = max(count * dtype.itemsize, mmap.PAGESIZE)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)


def run_last(step: Step, tensors: dict[str, Tensor], every: bool = False) -> None:
    """The last block of a step's grid, or every block."""
    last = step.grid[0] * step.grid[1] * step.grid[2] - 1
    module(step.source).launch(
        step.symbol, step.grid, step.block, [step.params], step.smem, race_check=False, ctas=[] if every else [last],
        buffers=[t for t in tensors.values() if t.numel()], threads=1, max_instructions=1 << 40,
    )  # fmt: skip


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# ------------------------------------------------------------------------------------------------ matrix kernels


def enlarge(gemm: Gemm, tensors: dict[str, Tensor], problem: dict[str, object]) -> dict[str, Tensor]:
    """The same vectors and weights; activations and masks of the large problem that end with those given."""
    large = {}
    for name, t in tensors.items():
        shape = gemm.shape(name, problem)
        if t.dtype == torch.int32:
            large[name] = reserve([t.shape[0], shape[0]], t.dtype)
            large[name][:, -t.shape[1] :] = t
        elif shape != list(t.shape):
            large[name] = reserve(shape, t.dtype)
            large[name][-t.shape[0] :] = t
        else:
            large[name] = t
    return large


def tail(large: Tensor, small: Tensor) -> Tensor:
    return large[:, -small.shape[1] :] if small.dtype == torch.int32 else large[-small.shape[0] :]


def with_workspace(gemm: Gemm, problem: dict[str, object], tensors: dict[str, Tensor]) -> Plan:
    plan = gemm.plan(problem, 80, tensors)
    assert plan.reason == ""
    if plan.workspace:
        tensors["workspace"] = reserve([plan.workspace], torch.float32)
    return gemm.plan(problem, 80, tensors)


@pytest.mark.parametrize("gemm", GEMMS, ids=str)
def test_matrix_kernels(gemm: Gemm) -> None:
    """With the smallest tile, whose grid is the largest. Pixels of both problems end at the same place in a tile."""
    torch.manual_seed(0)
    pixels = gemm.tiles == PIXELS_TILES  # of those the small problem is a split
    size, images, step = ({"H": 7, "W": 9}, 4, 32) if pixels else ({"H": 33, "W": 31}, 2, 256)
    tile = gemm.tile([t for t in gemm.tiles if t != "resident"][-1])
    small = gemm.problem(torch.bfloat16, N=images, **size, **CHANNELS, tile=tile)
    more = 2**31 // (size["H"] * size["W"] * 64) // step * step + step
    large = {**small, "N": images + more}
    of_small = gemm.tensors(small)
    for name in gemm.outputs.split():
        of_small[name].zero_()
    if pixels:  # pixels before those of the small problem add nothing to its sums
        for name in {"shift", "x_shift", "center", "mean", "coef_1"} & set(gemm.inputs.split()):
            of_small[name] = of_small[name].abs().neg() if "shift" in name else torch.zeros_like(of_small[name])
    of_large = enlarge(gemm, of_small, large)
    assert max(t.numel() for t in of_large.values()) > 2**31

    plan, plan_of_large = (with_workspace(gemm, p, t) for p, t in ((small, of_small), (large, of_large)))
    (first, *_), (first_of_large, *_) = plan.steps, plan_of_large.steps
    assert first.symbol == first_of_large.symbol
    run_last(first, of_small)
    run_last(first_of_large, of_large)
    if pixels:
        assert first.grid[1] == 1, "the small problem is one split"
        rows, _, _, per_split = struct.unpack_from("<4i", first_of_large.params)  # PixelsParams
        splits, sums = first_of_large.grid[1], of_small["workspace"][: 64 * 64]
        assert rows - (splits - 1) * per_split >= struct.unpack_from("<i", first.params)[0], (
            "all of it in the last split"
        )
        assert sums.any()
        assert same(of_large["workspace"][(splits - 1) * 64 * 64 : splits * 64 * 64], sums)
        return
    for name in gemm.outputs.split():
        if of_small[name].dim() > 1:
            assert of_small[name].any(), name
            assert same(tail(of_large[name], of_small[name]), of_small[name]), name
    if plan.workspace:  # the last tile's sums
        assert of_small["workspace"][-2 * 64 :].any()
        assert same(of_large["workspace"][-2 * 64 :], of_small["workspace"][-2 * 64 :])


# ------------------------------------------------------------------------------------------------------- k x k

IMAGE = {"H": 8, "W": 8, "C": 64, "K": 64, "groups": 1, "dtype": torch.bfloat16}
GEOMETRY = {f"{name}_{axis}": int(name != "padding") for name in ("stride", "dilation", "padding") for axis in "hw"}
# op: whose last block makes which results of which other buffers
CONVOLUTIONS = [
    ("conv2d", "x scale shift weight", "out"),
    ("conv2d_bn_act", "x scale shift weight out_scale out_shift residual", "y mask"),
    ("conv2d_dgrad", "dy u mask mean coef_dz coef_x coef_1 weight gate_u gate_scale gate_shift gate_mean", "dx"),
    ("conv2d_dgrad", "dy u mask mean coef_dz coef_x coef_1 weight addend addend_mask", "dx"),
    ("conv2d_wgrad", "dy x", "dw"),
    ("conv2d_wgrad", "dy u mask mean coef_dz coef_x coef_1 x", "dw"),
]


@pytest.mark.parametrize(("op", "inputs", "outputs"), CONVOLUTIONS)
def test_convolutions(op: str, inputs: str, outputs: str) -> None:
    """Of 3x3 pixels, and a wgrad of 2x1. The large batch ends with the images of the small one."""
    torch.manual_seed(0)
    taps = {"R": 2, "S": 1} if op == "conv2d_wgrad" else {"R": 3, "S": 3}
    padding = {"padding_h": taps["R"] // 2, "padding_w": taps["S"] // 2}
    problem = {**IMAGE, **taps, **GEOMETRY, **padding, "tile": 3, "relu": 1}
    problem = {name: value for name, value in problem.items() if name in fields(op)}
    if op == "conv2d_wgrad":  # an image of as many rows out as in
        problem |= {"H": 8, "padding_h": 1, "dilation_h": 2}
    more = 2**31 // (8 * 8 * 64) + 2
    results = []
    given: dict[str, Tensor] = {}
    for images in (2, more):
        sizes = {**problem, "N": images}
        tensors = {}
        for name in f"{inputs} {outputs}".split():
            shape, dtype = buffer_shape(op, name, sizes)
            tensors[name] = reserve(shape, dtype)
            if name in inputs.split():
                if images == 2:
                    given[name] = vector_of(name, shape) if len(shape) == 1 else filled(shape, dtype)
                tail(tensors[name], given[name]).copy_(given[name])
        if workspace := plans.plan(op, sizes, 80, addresses(tensors)).workspace:
            tensors["workspace"] = reserve([workspace], torch.float32)
        plan = plans.plan(op, sizes, 80, addresses(tensors))
        assert plan.reason == ""
        run_last(plan.steps[0], tensors)
        results.append((tensors, plan))
    (small, one), (large, many) = results
    assert max(t.numel() for t in large.values()) > 2**31
    assert one.steps[0].symbol == many.steps[0].symbol
    for name in outputs.split():
        if op == "conv2d_wgrad":
            assert one.steps[0].grid[1] == 1, "the small problem is one split"
            assert small["workspace"].any()
            assert same(large["workspace"][-len(small["workspace"]) :], small["workspace"])
        else:
            assert small[name].any()
            assert same(tail(large[name], small[name]), small[name]), name


def buffer_shape(op: str, name: str, problem: dict[str, object]) -> tuple[list[int], torch.dtype]:
    layout, sizes = Buffer.of(op)[name].layout, sizes_of(problem)
    shape = [sizes[letter] for letter in layout.strip("#.!")]
    if layout[0] == "#":
        return [shape[1] // 32, shape[0]], torch.int32
    return shape, torch.float32 if len(shape) == 1 else torch.bfloat16


def vector_of(name: str, shape: list[int]) -> Tensor:
    """A batch norm's backward makes 0 of zeros, which add nothing to sums."""
    return torch.zeros(shape) if name in ("mean", "coef_1") else torch.randn(shape)


# ------------------------------------------------------------------------------------------------------ tails

M_LARGE, M_SMALL, C = 2**25 + 77, 77, 64  # pixels, and channels: 2^31 elements and 4928 more
ROWS = "x dy dz dx y residual a"  # activations; "mask" are bits, other buffers vectors
TAILS = {  # op: its buffers, those it writes, and the problem beside dtype and sizes
    "bn_act": ("x scale shift residual", "y mask", {"relu": 1}),
    "relu_mask": ("y", "mask", {}),
    "bn_act_backward_reduce": ("dy mask x mean", "dz", {}),
    "bn_act_backward_apply": ("dy mask x mean coef_dz coef_x coef_1", "dx", {}),
    "gram_operand": ("x scale shift center", "a", {"relu": 1, "N": 1, "H": 1, "stride": 1}),
}


def tail_buffers(names: str, rows: int, dtype: torch.dtype, make) -> dict[str, Tensor]:
    shapes = {name: [rows, C] for name in ROWS.split()} | {"mask": [C // 32, rows]}
    return {
        name: make(shapes.get(name, [C]), torch.int32 if name == "mask" else dtype if name in shapes else torch.float32)
        for name in names.split()
    }


def filled(shape: list[int], dtype: torch.dtype) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=dtype) if dtype == torch.int32 else torch.randn(shape).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("op", TAILS)
def test_tails(op: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs, outputs, problem = TAILS[op]
    sums = {"sum_dz": torch.zeros(C), "sum_dz_xc": torch.zeros(C)} if "reduce" in op else {"mean": torch.zeros(C)}
    made = tail_buffers(inputs, M_SMALL, dtype, filled)
    results = []
    for rows in (M_SMALL, M_LARGE):
        tensors = tail_buffers(f"{inputs} {outputs}", rows, dtype, reserve)
        for name, t in made.items():
            if t.dim() == 1:
                tensors[name] = t
            else:
                tail(tensors[name], t).copy_(t)
        tensors |= {name: t for name, t in sums.items() if name in fields(op) and name not in tensors}
        sizes = {"W" if "W" in fields(op) else "M": rows, "C": C, "dtype": dtype, **problem}
        workspace = plans.plan(op, sizes, 80, addresses(tensors)).workspace
        tensors["workspace"] = reserve([max(workspace, 1)], torch.float32)
        held = {name: t for name, t in tensors.items() if name in fields(op)}
        run_last(plans.plan(op, sizes, 80, addresses(held)).steps[0], held, every=rows == M_SMALL)
        results.append({name: t for name, t in tensors.items() if name in outputs.split()})
    small, large = results
    for name, t in small.items():
        assert t.any(), name
        assert same(tail(large[name], t), t), name


def test_statistics() -> None:
    """Of the last block, whose pixels are zeros but for the last ones."""
    torch.manual_seed(0)
    x = reserve([M_LARGE, C], torch.bfloat16)
    x[-M_SMALL:] = torch.randn(M_SMALL, C).bfloat16()
    tensors = {"x": x, "mean": torch.zeros(C), "var": torch.zeros(C)}
    problem = {"dtype": torch.bfloat16, "M": M_LARGE, "C": C}
    tensors["workspace"] = reserve([plans.plan("bn_stats", problem, 80, addresses(tensors)).workspace], torch.float32)
    step = plans.plan("bn_stats", problem, 80, addresses(tensors)).steps[0]
    run_last(step, tensors)
    (per_block,) = struct.unpack_from("<q", step.params, 24)  # BnStatsParams.rows.rows_per_block
    own = x[(step.grid[0] - 1) * per_block :].double()
    assert M_SMALL < len(own) <= per_block
    mean, m2 = tensors["workspace"].view(-1, 2, C)[-1]
    torch.testing.assert_close(mean.double(), own.mean(0), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(m2.double(), (own - own.mean(0)).square().sum(0), rtol=1e-5, atol=1e-8)


def test_pool() -> None:
    torch.manual_seed(0)
    window, size = {"kernel": 3, "stride": 2, "padding": 1}, {"H": 16, "W": 16, "C": C, "dtype": torch.bfloat16}
    x, y, winners = torch.randn(1, 16, 16, C).bfloat16(), torch.zeros(1, 8, 8, C).bfloat16(), torch.zeros(1, 8, 8, C)
    small = {"x": x, "scale": torch.randn(C), "shift": torch.randn(C), "y": y, "argmax": winners.char()}
    images = 2**31 // x[0].numel() + 1
    large = {name: t if t.dim() == 1 else reserve([images, *t.shape[1:]], t.dtype) for name, t in small.items()}
    large["x"][-1] = x[0]
    for count, tensors in ((1, small), (images, large)):
        problem = {**window, **size, "N": count}
        run_last(plans.plan("bn_act_pool", problem, 80, addresses(tensors)).steps[0], tensors)
    for name in ("y", "argmax"):
        assert small[name][0, -1].any()
        assert same(large[name][-1], small[name][0]), name

    small, large = ({"dy": t["y"], "argmax": t["argmax"], "da": t["x"]} for t in (small, large))
    for count, tensors in ((1, small), (images, large)):
        tensors["da"][-1] = 0
        problem = {**window, **size, "N": count}
        run_last(plans.plan("bn_act_pool_backward", problem, 80, addresses(tensors)).steps[0], tensors)
    assert small["da"][0, -1].any()
    assert same(large["da"][-1], small["da"][0])


def fields(op: str) -> set[str]:
    return {name for name, _ in plans._PROBLEMS[op]._fields_}


def addresses(tensors: dict[str, Tensor]) -> dict[str, int]:
    return {name: t.data_ptr() for name, t in tensors.items()}


# ------------------------------------------------------------------------------------------------------ plans

HUGE = [  # pixels of the output, as N x H x W, and channels
    {"N": 1, "H": 1, "W": 2**31 - 257, "C": 8, "K": 8, "C2": 8},  # the most that there may be
    {"N": 1, "H": 1, "W": 2**31 - 257, "C": 65536, "K": 65536, "C2": 65536},
    {"N": 46340, "H": 46340, "W": 1, "C": 2048, "K": 512, "C2": 64},
    {"N": 1, "H": 1, "W": 2**31 - 256, "C": 8, "K": 8, "C2": 8},
    {"N": 2**20, "H": 2**20, "W": 2**20, "C": 8, "K": 8, "C2": 8},
    {"N": 2**15, "H": 32, "W": 32, "C": 65536, "K": 64, "C2": 8},
    {"N": 2**15, "H": 32, "W": 32, "C": 64, "K": 65536, "C2": 65536},
]


def huge_plans(gemm: Gemm) -> Iterator[tuple[dict[str, int], Plan]]:
    for sizes in HUGE:
        for arch in (80, 120):
            yield sizes, gemm.plan(gemm.problem(torch.bfloat16, **sizes), arch)


@pytest.mark.parametrize("gemm", GEMMS, ids=str)
def test_plans_of_matrix_kernels(gemm: Gemm) -> None:
    """Every number of a plan is the right one, or there is a reason why there is no plan."""
    reasons = 0
    for sizes, plan in huge_plans(gemm):
        pixels = sizes["N"] * sizes["H"] * sizes["W"]
        if plan.reason:
            reasons += 1
            assert "2^31 pixels" in plan.reason or "more than CUDA takes" in plan.reason
            # Of x there are four times as many with a stride of 2.
            assert pixels * gemm.stride**2 * 2 > 2**31
            continue
        assert plan.workspace < 2**62
        for step in plan.steps:
            assert 1 <= step.grid[0] < 2**31
            assert all(1 <= blocks < 2**16 for blocks in step.grid[1:])
        step = plan.steps[0]
        columns = sizes["C"] if "dgrad" in gemm.op or gemm.op == "gram" else sizes["K"]
        tile = step.symbol.rsplit("_", 1)[1]
        m, n = (128, 128) if tile == "resident" else map(int, tile.split("x")[:2])
        if gemm.tiles == PIXELS_TILES:
            rows, i, j, per_split = struct.unpack_from("<4i", step.params)
            assert (rows, j) == (pixels, sizes["C"])
            assert i == (sizes["C"] if gemm.op == "gram" else sizes["K"])
            assert (step.grid[1] - 1) * per_split < pixels <= step.grid[1] * per_split
            assert per_split > 0
            sums = gemm.op == "gram" or "masked" in gemm.name
            assert plan.workspace == step.grid[1] * i * (j + sums)
        else:
            assert struct.unpack_from("<2i", step.params) == (pixels, columns)  # RowsParams
            down, across = -(-pixels // m), -(-columns // n)
            assert step.grid[0] == (down if tile == "resident" else down * across)
            summed = {"mean", "sum_dz"} & set(gemm.outputs.split())
            assert plan.workspace == (down * 2 * columns if summed else 0)
    assert reasons >= 4, "the problems beyond the limits, on both architectures"


@pytest.mark.parametrize("op", [op for op in plans.OPS if op not in gemm_cases.OPS and not op.startswith("conv2d")])
def test_plans_of_tails(op: str) -> None:
    for pixels in (2**31 - 1, 2**31, 2**35 + 1):
        for channels in (8, 64, 65536):
            sizes = {"M": pixels, "N": pixels // 2**15, "H": 2**15, "W": 1, "kernel": 3, "stride": 1, "padding": 1}
            problem = {name: size for name, size in sizes.items() if name in fields(op)}
            buffers = {"mean": 4096} if "mean" in fields(op) else {}
            own = {"C": channels // 2, "K": channels // 2} if "K" in fields(op) else {"C": channels}
            plan = plans.plan(op, {**problem, **own, "dtype": torch.bfloat16}, 90, buffers)
            if plan.reason:
                assert "more than CUDA takes" in plan.reason
                continue
            assert plan.steps
            assert plan.workspace < 2**40
            for step in plan.steps:
                assert 1 <= step.grid[0] < 2**31
                assert all(1 <= blocks < 2**16 for blocks in step.grid[1:])


def test_coordinates_of_32_bits() -> None:
    """What kernels hold in 32 bits is refused where it does not fit, not cut off."""
    pool = {"dtype": torch.bfloat16, "N": 1, "C": 8, "kernel": 3, "stride": 2, "padding": 1}
    for op in ("bn_act_pool", "bn_act_pool_backward"):
        for size in ({"H": 2**31, "W": 1}, {"H": 1, "W": 2**32 + 1}):
            assert "2^31 pixels a side" in plans.plan(op, {**pool, **size}).reason
    strided = {"dtype": torch.bfloat16, "N": 1, "H": 2**32 + 1, "W": 1, "C": 8, "stride": 8}
    assert "with a stride" in plans.plan("gram_operand", strided).reason


def test_strides_beyond_the_image() -> None:
    """A stride of more than 32 bits is not cut off: it reads the first pixel of every image."""
    for gemm in GEMMS:
        if gemm.stride > 1:
            problem = {**gemm.problem(torch.bfloat16, N=3, H=1, W=1, C=8, K=8, C2=8), "stride": 2**32 + 1}
            sides = {"H2": 5, "W2": 7} if gemm.op == "expand" else {"H": 5, "W": 7}
            plan = gemm.plan({**problem, **sides})
            at = 56 if gemm.tiles != PIXELS_TILES else 32  # of PixelMap in RowsParams, PixelsParams
            assert struct.unpack_from("<3i", plan.steps[0].params, at) == (7, 5, 7), gemm


def test_ops_with_strides_beyond_the_image() -> None:
    """Of every image the first pixel, or window, on the kernels as on the CPU."""
    torch.manual_seed(0)
    device, ops = Device("emulated"), torch.ops.resnet_fused
    x = activation(3, 8, 5, 7, torch.bfloat16)
    scale, shift, weight = torch.randn(8), torch.randn(8), torch.randn(8, 8, 1, 1).bfloat16()
    for stride in (9, 2**32, 2**32 + 1):
        for op, *arguments in (
            (ops.bn_act_pool, x, scale, shift, 3, stride, 1),
            (ops.gram_operand, x, scale, shift, True, torch.zeros(8), stride),
            (ops.conv1x1, x, weight, None, None, stride, False),
        ):
            got, want = device.run(op, *arguments), op(*arguments)
            assert got[0].shape == (3, 8, 1, 1)
            torch.testing.assert_close(got[0], want[0], rtol=2e-2, atol=2e-2)
