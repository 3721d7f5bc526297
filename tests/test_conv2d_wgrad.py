"""conv2d_wgrad on every device: any geometry, by the tolerance rule and each element; and its kernels."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import wgrad_cases
from compiled import module
from device import ARCHES, Device
from op_cases import activation, ops, vector
from pointwise_cases import BACKWARD, Arguments, activated, assert_refused, backward, compare, dtypes, mask_of, scale
from ptx import Stats
from torch import Tensor
from wgrad_cases import TILES

from resnet_fused import kernels, plans
from resnet_fused.plans import Step

SECTOR = 32

# [N, C, H, W], K, kernel, and the geometry: stride, padding, dilation (two each), groups.
Problem = tuple[tuple[int, int, int, int], int, tuple[int, int], list[int]]


def problem(shape, k: int, kernel=(3, 3), stride=1, padding=None, dilation=1, groups=1) -> Problem:
    """Integers stand for both directions; the default padding keeps the size at stride 1."""
    two = [(v, v) if isinstance(v, int) else v for v in (stride, dilation)]
    if padding is None:
        padding = tuple((size - 1) * d // 2 for size, d in zip(kernel, two[1], strict=True))
    padding = (padding, padding) if isinstance(padding, int) else padding
    return shape, k, kernel, [*two[0], *padding, *two[1], groups]


# Pixels that fill no stage, channels that fill no tile, several tiles and splits; then every geometry.
PROBLEMS = [
    problem((1, 8, 1, 1), 8),
    problem((3, 24, 7, 9), 40),
    problem((2, 72, 13, 11), 136),
    problem((5, 40, 11, 13), 72),
    problem((1, 136, 31, 19), 8),
]
GEOMETRIES = [
    problem((2, 24, 9, 7), 40, padding=0),
    problem((2, 24, 1, 1), 8, padding=2),
    problem((2, 24, 2, 5), 8, padding=(3, 2)),
    problem((3, 40, 8, 8), 24, padding=4),
    problem((2, 24, 13, 11), 40, dilation=2),
    problem((2, 24, 13, 11), 40, dilation=(3, 2), padding=(1, 4)),
    problem((3, 24, 13, 11), 40, stride=2),
    problem((3, 72, 14, 16), 40, stride=2),
    problem((2, 24, 9, 12), 16, stride=2, padding=0),
    problem((2, 24, 9, 12), 16, stride=2, dilation=2),
    problem((2, 24, 13, 11), 16, stride=(1, 2)),
    problem((2, 24, 13, 11), 16, stride=(3, 2), padding=(0, 3)),
    problem((2, 24, 7, 9), 40, (1, 3)),
    problem((2, 24, 7, 9), 40, (3, 1)),
    problem((2, 24, 7, 9), 40, (2, 2), padding=1),
    problem((2, 24, 7, 9), 40, (1, 1), padding=1),
    problem((2, 24, 9, 13), 16, (5, 5)),
    problem((2, 24, 9, 13), 16, (5, 5), stride=2),
    problem((2, 24, 8, 10), 16, (7, 7)),
    problem((1, 8, 15, 13), 8, (7, 7), stride=2),
    problem((2, 24, 8, 10), 16, (1, 7)),
    problem((1, 8, 12, 3), 8, (11, 2)),
    problem((2, 16, 9, 7), 16, groups=2),
    problem((2, 96, 9, 7), 192, groups=2),
    problem((2, 128, 9, 7), 128, groups=8),
    problem((2, 72, 9, 7), 96, groups=3),
    problem((2, 160, 7, 5), 80, stride=2, groups=5),
    problem((1, 144, 7, 5), 288, groups=2),
]
PROLOGUES = ["none", "bn", "bn mask", "bn gate"]


def name(p: Problem) -> str:
    shape, k, kernel, geometry = p
    return "-".join("x".join(map(str, numbers)) for numbers in (shape, [k], kernel, geometry))


def conv2d_wgrad(x, x_scale, x_shift, kernel_size, geometry, **prologue) -> tuple[Tensor, ...]:
    du, a = backward(**prologue), activated(x, x_scale, x_shift)
    stride, padding, dilation, groups = geometry[:2], geometry[2:4], geometry[4:6], geometry[6]
    weight = a.new_empty(du.shape[1], a.shape[1] // groups, *kernel_size)  # only its shape is read
    given = (stride, padding, dilation, False, (0, 0), groups, (False, True, False))
    return (torch.ops.aten.convolution_backward(du, a, weight, None, *given)[1],)


def op(**given) -> tuple[Tensor]:
    return (ops.conv2d_wgrad(**given),)


def arguments(p: Problem, dtype: torch.dtype, prologue: str = "bn gate", affine: bool = True) -> Arguments:
    """prologue: "none", "bn" (the batch norm's backward), "bn mask" or "bn gate"."""
    shape, k, kernel, g = p
    n, c, *size = shape
    out = [(h + 2 * g[2 + i] - g[4 + i] * (kernel[i] - 1) - 1) // g[i] + 1 for i, h in enumerate(size)]
    given: Arguments = dict.fromkeys(BACKWARD) | {"dy": activation(n, k, *out, dtype)}
    if prologue.endswith("mask"):
        given["mask"] = mask_of(n, k, *out)
    if prologue.startswith("bn"):
        given |= {v: vector(k, dtype) for v in ("mean", "coef_dz", "coef_x", "coef_1")}
        given["u"] = activation(n, k, *out, dtype)
    if prologue == "bn gate":
        given |= {"scale": scale(k, dtype), "shift": vector(k, dtype)}
    given |= {"x": activation(*shape, dtype), "x_scale": None, "x_shift": None}
    if affine:
        given |= {"x_scale": scale(c, dtype), "x_shift": vector(c, dtype)}
    return given | {"kernel_size": list(kernel), "geometry": g}


def check(device: Device, p: Problem, prologue: str, affine: bool) -> None:
    for dtype in dtypes(device):
        for _, got in compare(device, op, conv2d_wgrad, lambda t: arguments(p, t, prologue, affine), dtype):
            assert got["0"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("prologue", PROLOGUES)
@pytest.mark.parametrize("p", PROBLEMS, ids=name)
def test_wgrad(p: Problem, prologue: str, affine: bool, device: Device) -> None:
    check(device, p, prologue, affine)


@pytest.mark.parametrize(("prologue", "affine"), [("none", False), ("bn mask", True)])
@pytest.mark.parametrize("p", GEOMETRIES, ids=name)
def test_every_geometry(p: Problem, prologue: str, affine: bool, device: Device) -> None:
    check(device, p, prologue, affine)


def test_any_channels_on_the_cpu() -> None:
    cpu = Device("cpu")
    check(cpu, problem((2, 3, 9, 7), 33), "bn gate", True)
    check(cpu, problem((2, 6, 9, 7), 9, (5, 5), stride=2, groups=3), "bn mask", True)


def test_runs_are_equal(device: Device) -> None:
    """Whatever the order of the warps."""
    given = arguments(problem((3, 40, 17, 19), 24), torch.bfloat16)
    first, second = (device.run(lambda a: ops.conv2d_wgrad(**a), given, seed=seed) for seed in (0, 1))
    assert torch.equal(first, second)


# ---------------------------------------------------------------------------------------------------- the kernels


def run(q: dict[str, Any], kernel: str, tile: int, seed: int = 0) -> tuple[dict[str, Tensor], list[tuple[Step, Stats]]]:
    torch.manual_seed(seed)
    tensors = wgrad_cases.tensors(q, kernel)
    plan = wgrad_cases.plan(q, kernel, tile, 80, tensors)
    assert plan.reason == ""
    tensors["workspace"] = torch.full((plan.workspace,), torch.nan)
    steps = []
    for i, step in enumerate(wgrad_cases.plan(q, kernel, tile, 80, tensors).steps):
        stats = module(step.source).launch(
            step.symbol, step.grid, step.block, [step.params], step.smem, seed + i, buffers=tensors.values()
        )
        steps.append((step, stats))
    return tensors, steps


@pytest.mark.parametrize("dtype", wgrad_cases.DTYPES)
@pytest.mark.parametrize("kernel", wgrad_cases.KERNELS)
def test_tiles_agree(kernel: str, dtype: str) -> None:
    q = wgrad_cases.problem((1, 136, 17, 19), 72, wgrad_cases.DTYPES[dtype])
    expected = None
    for tile, name in reversed(list(enumerate(TILES, 1))):
        tensors, steps = run(q, kernel, tile)
        assert steps[0][0].symbol == f"{kernel}_{dtype}_{name}"
        got = tensors["dw"].double()
        expected = got if expected is None else expected
        assert (got - expected).norm() <= torch.finfo(tensors["dw"].dtype).eps * expected.norm(), name


@pytest.mark.parametrize(
    ("size", "dilation", "tile"), [((1, 60, 70), 22, t) for t in (1, 2, 3)] + [((2, 40, 40), 10, 1)]
)
def test_fewer_rows_of_the_kernel_at_a_time(size: tuple[int, int, int], dilation: int, tile: int) -> None:
    """Where the rows between a kernel's first and last do not fit: more batches, the same result."""
    n, h, w = size
    q = wgrad_cases.problem((n, 8, h, w), 8, torch.bfloat16, dilation=dilation, padding=dilation)
    tensors, steps = run(q, "conv2d_wgrad", tile)
    assert steps[0][0].grid[0] > 1
    dy, x = (tensors[name].double().view(n, h, w, 8).permute(0, 3, 1, 2) for name in ("dy", "x"))
    wanted = torch.nn.grad.conv2d_weight(x, (8, 8, 3, 3), dy, padding=dilation, dilation=dilation)
    wanted = wanted.permute(0, 2, 3, 1).flatten(1)
    assert (tensors["dw"].double() - wanted).norm() <= 0.003 * wanted.norm()


@pytest.mark.parametrize(("kernel", "tile"), [(k, t) for k in wgrad_cases.KERNELS for t in range(1, len(TILES) + 1)])
def test_memory(kernel: str, tile: int) -> None:
    """Each operand comes from memory once, partial sums go there and back once, and no banks conflict."""
    for shape, k in (((2, 64, 14, 14), 64), ((1, 136, 13, 11), 72), ((4, 40, 7, 7), 24)):
        q = wgrad_cases.problem(shape, k, torch.bfloat16)
        tensors, steps = run(q, kernel, tile)
        read: Counter[str] = Counter()
        written: Counter[str] = Counter()
        for step, stats in steps:
            assert stats.shared_conflicts == 0, (step.symbol, shape)
            for number, name in enumerate(tensors):
                sectors = stats.buffers.get(f"buffer{number}", (0, 0))
                read[name] += sectors[0]
                written[name] += sectors[1]
        for name, t in tensors.items():
            first, end = t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()
            sectors = (end - 1) // SECTOR - first // SECTOR + 1
            assert read[name] == (0 if name == "dw" else sectors), (name, shape)
            assert written[name] == (sectors if name in ("dw", "workspace") else 0), (name, shape)
        assert not tensors["dw"].isnan().any()


def test_reads_from_l2() -> None:
    """A block reads its tile of dy, and of x besides that what its first rows share with the split before."""
    q = wgrad_cases.problem((4, 128, 28, 28), 128, torch.bfloat16)
    _, ((step, stats), _) = run(q, "conv2d_wgrad", 1)
    pixels, splits = 4 * 28 * 28, step.grid[1]
    assert step.grid[0] == 4  # of 64 x 64 channels
    operand = pixels * 64 * 2 // SECTOR
    shared = splits * 4 * 28 * 64 * 2 // SECTOR  # at most four rows
    assert stats.global_load_sectors <= 4 * (2 * operand + shared)
    assert stats.sectors_per_store == 16


@pytest.mark.parametrize(
    ("kernel", "least"),
    [
        ("conv2d_wgrad", 30),
        ("conv2d_wgrad_affine", 24),
        ("conv2d_wgrad_backward", 22),
        ("conv2d_wgrad_backward_affine", 18),
    ],
)
def test_share_of_the_tensor_cores(kernel: str, least: int) -> None:
    """Of the instructions that more pixels take, in percent; registers are moved in PTX only."""
    counts = []
    for images in (3, 9):
        q = wgrad_cases.problem((images, 64, 7, 7), 64, torch.bfloat16)
        _, ((step, stats), _) = run(q, kernel, 1)
        assert step.grid == (1, 1, 1)
        every = sum(n for kind, n in stats.instructions.items() if kind != "move")
        counts.append((stats.instructions["mma"], every))
    (mma, every), (more_mma, more) = counts
    assert 100 * (more_mma - mma) / (more - every) >= least


@pytest.mark.parametrize("arch", ARCHES)
def test_machine_code(arch: str) -> None:
    found = {kernel.symbol: kernel for kernel in kernels.compile_source(wgrad_cases.SOURCE, arch)}
    assert len(found) == len(wgrad_cases.KERNELS) * len(TILES) * len(wgrad_cases.DTYPES)
    for symbol, kernel in found.items():
        assert (kernel.stack, kernel.spills) == (0, 0), symbol
        assert {"HMMA", "LDGSTS", "LDSM"} <= {opcode.split(".")[0] for opcode in kernel.opcodes}, symbol
        accesses = {access for access in kernel.accesses if access[0] in ("LDG", "STG", "LDGSTS")}
        words = {("LDGSTS", 4)} if "backward" in symbol else set()  # of the mask
        assert {("LDGSTS", 16), ("STG", 16)} <= accesses, symbol
        assert {access for access in accesses if access[1] != 16} == words, symbol


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("arch", [80, 86, 90, 120])
def test_common_problems_fit(arch: int) -> None:
    for kernel in wgrad_cases.KERNELS:
        for shape, k, geometry in (
            ((256, 64, 56, 56), 64, {}),
            ((256, 128, 56, 56), 128, {"stride": 2}),
            ((256, 256, 28, 28), 256, {"stride": 2}),
            ((256, 512, 7, 7), 512, {}),
            ((256, 256, 56, 56), 256, {"groups": 32}),
            ((16, 64, 224, 224), 64, {}),
            ((8, 2048, 33, 33), 256, {"dilation": 12, "padding": 12}),
            ((64, 96, 112, 112), 96, {"kernel": (7, 7), "padding": 3, "stride": 2}),
        ):
            plan = wgrad_cases.plan(wgrad_cases.problem(shape, k, torch.bfloat16, **geometry), kernel, 0, arch)
            assert plan.reason == "", (kernel, shape, geometry)
            step = plan.steps[0]
            assert step.smem <= (163 if arch in (80, 90) else 99) * 1024
            assert plan.workspace * 4 <= 2**28


def test_a_problem_that_fits_nowhere() -> None:
    q = wgrad_cases.problem((1, 64, 8, 10_000), 64, torch.bfloat16)
    reason = wgrad_cases.plan(q, "conv2d_wgrad").reason
    assert reason == ("conv2d_wgrad: rows of 10000 pixels do not fit into the shared memory of compute capability 8.0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"C": 12}, "the kernels take 1 to 7 channels or a multiple of 8, got 12"),
        ({"K": 20}, "20 channels are not a multiple of 8"),
        ({"groups": 4}, "4 channels are not a multiple of 8"),
        ({"dtype": torch.float32}, "the kernels take bfloat16 and float16"),
        ({"N": 0}, "no pixels to sum over"),
        ({"N": 2**26, "H": 64}, "2^31 pixels or more"),
        ({"R": 0}, "there is nothing to convolve"),
        ({"R": 9, "S": 11}, "the kernel is larger than the image"),
        ({"stride_w": 17}, "strides are 1 to 16 across"),
        ({"tile": 4}, "tile 4 does not exist, there are 3"),
    ],
)
def test_what_the_plan_refuses(changes: dict[str, Any], message: str) -> None:
    q = wgrad_cases.problem((2, 16, 5, 7), 16, torch.bfloat16) | changes
    assert message in plans.plan(wgrad_cases.OP, q, 80, dict.fromkeys(("dy", "x", "dw"), 4096)).reason


X = activation(2, 16, 9, 7, torch.bfloat16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": None}, "u is given without mean"),
        ({"u": None, "mean": None, "coef_dz": None, "coef_x": None, "coef_1": None}, "scale is given without u"),
        ({"mask": mask_of(2, 8, 9, 7)}, "mask is given with scale"),
        ({"x": X.half()}, "x has dtype float16, expected bfloat16"),
        ({"x": X[:, :, :8]}, "x has shape"),
        ({"x_scale": None}, "x_shift is given without x_scale"),
        ({"kernel_size": [3]}, r"kernel_size is \[3\], expected two integers from 1"),
        ({"kernel_size": [5, 3]}, "dy has shape .* expected the convolution's output"),
        ({"geometry": [1, 1, 1]}, r"geometry is \[1, 1, 1\], expected stride, padding and dilation"),
        ({"geometry": [1, 1, 1, 1, 1, 1, 3]}, "geometry is .* whose 3 groups divide not both"),
    ],
)
def test_errors(changes: dict[str, Any], message: str, device: Device) -> None:
    given = arguments(problem(tuple(X.shape), 8), X.dtype)
    assert_refused(device, ops.conv2d_wgrad, given, changes, "conv2d_wgrad: " + message)
