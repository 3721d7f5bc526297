"""conv2d and conv2d_wgrad of few channels, an image's, on every device: by the tolerance rule, and each element."""

from __future__ import annotations

from typing import Any

import few_cases
import pytest
import torch
from device import ARCHES, Device
from op_cases import acc_of, activation, nhwc, ops, vector
from pointwise_cases import (
    HALVES,
    Arguments,
    assert_close,
    assert_dense,
    assert_refused,
    columns,
    compare,
    dtypes,
    empty,
    gated,
    mask_of,
    masked,
    scale,
)
from torch import Tensor
from torch.nn import functional as F

from resnet_fused import kernels
from resnet_fused.ops.aten import Geometry, conv_backward

STEM, CIFAR, MNIST = [2, 2, 3, 3], [1, 1, 1, 1], [1, 1, 2, 2]  # strides and paddings

# [N, C, H, W], K, [R, S], strides and paddings: tiles across lines and images, channels that fill no tile of the
# output, kernels larger than the image, lines of one pixel, paddings beyond the kernel.
PROBLEMS = [
    ((1, 3, 1, 1), 8, (7, 7), STEM),
    ((3, 3, 7, 9), 64, (7, 7), STEM),
    ((2, 3, 33, 17), 72, (7, 7), STEM),
    ((3, 3, 16, 16), 16, (3, 3), CIFAR),
    ((2, 3, 33, 17), 40, (3, 3), CIFAR),
    ((5, 1, 14, 14), 24, (5, 5), MNIST),
    ((2, 2, 7, 9), 136, (5, 3), [2, 1, 1, 2]),
    ((2, 4, 9, 5), 16, (4, 6), [1, 2, 0, 5]),
    ((40, 1, 3, 1), 8, (2, 1), [1, 1, 0, 0]),
    ((3, 5, 9, 11), 24, (3, 3), [2, 2, 1, 1]),
    ((2, 7, 13, 8), 16, (7, 7), [1, 1, 3, 3]),
    ((2, 6, 8, 13), 8, (6, 7), [2, 2, 2, 3]),
    ((2, 3, 6, 6), 8, (1, 1), [2, 2, 0, 0]),
]


def geometry(where: list[int]) -> list[int]:
    return [*where, 1, 1, 1]


def weight(k: int, c: int, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return nhwc((torch.randn(k, c, *size) / (c * size[0] * size[1]) ** 0.5).to(dtype))


# ------------------------------------------------------------------------------------------------ plain PyTorch


def conv2d(x, weight, scale, shift, geometry, stats) -> tuple[Tensor, ...]:
    out = F.conv2d(x, weight, None, geometry[:2], geometry[2:4])
    if not stats:
        return out, empty(x), empty(x)
    wide = out.to(acc_of(x.dtype))
    return out, wide.mean((0, 2, 3)), wide.var((0, 2, 3), unbiased=False)


def conv2d_wgrad(
    dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, x, x_scale, x_shift, kernel_size, geometry
) -> tuple[Tensor]:  # fmt: skip
    du = masked(dy, mask)
    if u is not None:
        if scale is not None:
            du = gated(du, u, scale, shift)
        du = (columns(coef_dz) * du + columns(coef_x) * (u - columns(mean)) + columns(coef_1)).to(dy.dtype)
    shape = (dy.shape[1], x.shape[1], *kernel_size)
    return (torch.nn.grad.conv2d_weight(x, shape, du, geometry[:2], geometry[2:4]),)


def wgrad_op(**arguments: Any) -> tuple[Tensor]:
    return (ops.conv2d_wgrad(**arguments),)


# ---------------------------------------------------------------------------------------------------- arguments


def forward_arguments(shape, k, size, where, dtype, stats=True) -> Arguments:
    given: Arguments = {"x": activation(*shape, dtype), "weight": weight(k, shape[1], size, dtype)}
    return given | {"scale": None, "shift": None, "geometry": geometry(where), "stats": stats}


def wgrad_arguments(shape, k, size, where, dtype, prologue: str) -> Arguments:
    """prologue: "none", or the batch norm's backward: "bn", "bn mask" or "bn gate"."""
    n, _, h, w = shape
    out = (n, k, *((i + 2 * p - r) // s + 1 for i, r, s, p in zip((h, w), size, where[:2], where[2:], strict=True)))
    names = ("mask", "u", "scale", "shift", "mean", "coef_dz", "coef_x", "coef_1")
    given: Arguments = {"dy": activation(*out, dtype)} | dict.fromkeys(names)
    if prologue == "bn mask":
        given["mask"] = mask_of(*out)
    if prologue.startswith("bn"):
        given |= {name: vector(k, dtype) for name in ("mean", "coef_dz", "coef_x", "coef_1")}
        given["u"] = activation(*out, dtype)
    if prologue == "bn gate":
        given |= {"scale": scale(k, dtype), "shift": vector(k, dtype)}
    given |= {"x": activation(*shape, dtype), "x_scale": None, "x_shift": None}
    return given | {"kernel_size": list(size), "geometry": geometry(where)}


# -------------------------------------------------------------------------------------------------------- fprop


@pytest.mark.parametrize(("shape", "k", "size", "where"), PROBLEMS, ids=str)
def test_fprop(shape, k: int, size, where, device: Device) -> None:
    for dtype in dtypes(device):
        runs = compare(device, ops.conv2d, conv2d, lambda t: forward_arguments(shape, k, size, where, t), dtype)
        for _, (out, mean, var) in ((a, got.values()) for a, got in runs):
            assert_dense(out)
            # Statistics are those of what is stored.
            assert_close(mean, out.double().mean((0, 2, 3)), 1e-5)
            assert_close(var, out.double().var((0, 2, 3), unbiased=False), 1e-5)


def test_fprop_without_statistics(device: Device) -> None:
    for dtype in dtypes(device):
        compare(
            device, ops.conv2d, conv2d,
            lambda t: forward_arguments((3, 3, 7, 9), 40, (7, 7), STEM, t, stats=False), dtype,
        )  # fmt: skip


def test_a_block_walks_over_tiles() -> None:
    """Of many pixels a block has several tiles, the last block fewer."""
    step, _ = few_cases.KERNELS[1].plan(torch.bfloat16, batch=100).steps
    assert step.grid == (2450, 1, 1)  # of 9800 tiles


@pytest.mark.parametrize(("dtype", "ratio"), [(torch.bfloat16, 64), (torch.float16, 1000)])
def test_statistics_far_from_zero(dtype: torch.dtype, ratio: int, device: Device) -> None:
    """The middle tap of one channel makes every output's mean, `ratio` standard deviations from 0."""
    x, w = activation(2, 3, 17, 9, dtype), weight(40, 3, (3, 3), dtype)
    x[:, 0] = 1
    w[:, 0] = 0
    w[:, 0, 1, 1] = ratio * torch.randn(40).sign()
    out, mean, var = device.run(ops.conv2d, x, w, None, None, geometry(CIFAR), True)
    wide = out.double()
    assert_close(mean, wide.mean((0, 2, 3)), 1e-6)
    assert_close(var, wide.var((0, 2, 3), unbiased=False), 1e-4)


@pytest.mark.parametrize(("shape", "k", "size", "where"), [PROBLEMS[i] for i in (2, 4, 5, 10, 11)], ids=str)
def test_nan_reaches_the_windows_that_hold_it(shape, k: int, size, where, device: Device) -> None:
    """Chunks hold taps beside a window: times zero, a NaN there would still be one. (So it is in some of oneDNN's.)"""
    x, w = activation(*shape, torch.bfloat16), weight(k, shape[1], size, torch.bfloat16)
    x[1, shape[1] - 1, shape[2] // 2, shape[3] // 2] = float("nan")
    x[0, 0, 0, shape[3] - 1] = float("inf")
    out = device.run(ops.conv2d, x, w, None, None, geometry(where), False)[0]
    wide = (x, w) if device.name == "cpu" else (x.double(), w.double())
    wanted = conv2d(*wide, None, None, geometry(where), False)[0]
    assert torch.equal(out.isnan(), wanted.isnan())
    assert torch.equal(out.isinf(), wanted.isinf())


# -------------------------------------------------------------------------------------------------------- wgrad


@pytest.mark.parametrize("prologue", ["none", "bn gate"])
@pytest.mark.parametrize(("shape", "k", "size", "where"), PROBLEMS, ids=str)
def test_wgrad(shape, k: int, size, where, prologue: str, device: Device) -> None:
    for dtype in dtypes(device):
        for _, got in compare(
            device, wgrad_op, conv2d_wgrad,
            lambda t: wgrad_arguments(shape, k, size, where, t, prologue), dtype,
        ):  # fmt: skip
            assert_dense(got["0"])


@pytest.mark.parametrize("prologue", ["bn", "bn mask"])
@pytest.mark.parametrize(("shape", "k", "size", "where"), [PROBLEMS[i] for i in (2, 6, 9)], ids=str)
def test_wgrad_prologues(shape, k: int, size, where, prologue: str, device: Device) -> None:
    for dtype in dtypes(device):
        compare(device, wgrad_op, conv2d_wgrad, lambda t: wgrad_arguments(shape, k, size, where, t, prologue), dtype)


# ------------------------------------------------------------------------------------------------ any order, refusals


def test_results_do_not_depend_on_the_order_of_warps() -> None:
    emulated = Device("emulated")
    shape, k, size, where = PROBLEMS[2]
    forward = forward_arguments(shape, k, size, where, torch.bfloat16)
    backward = wgrad_arguments(shape, k, size, where, torch.bfloat16, "bn gate")
    runs = [
        (
            *emulated.run(lambda a: ops.conv2d(**a), forward, seed=seed),
            emulated.run(lambda a: ops.conv2d_wgrad(**a), backward, seed=seed),
        )
        for seed in (1, 2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": activation(2, 12, 9, 9, torch.bfloat16)}, "1 to 7 channels or a multiple of 8, got 12"),
        ({"scale": torch.ones(3), "shift": torch.ones(3)}, "3 channels as they are, without scale and shift"),
        ({"geometry": [1, 3, 1, 1, 1, 1, 1]}, "strides 1 and 2, got 1 and 3"),
        ({"geometry": [1, 1, 1, 1, 2, 1, 1]}, "no dilation"),
        ({"weight": weight(16, 3, (9, 3), torch.bfloat16)}, "up to 7x7 taps, got 9x3"),
        ({"weight": weight(12, 3, (3, 3), torch.bfloat16)}, "12 channels are not a multiple of 8"),
    ],
)
def test_kernels_refuse(changes: dict[str, Any], message: str) -> None:
    arguments = forward_arguments((2, 3, 9, 9), 16, (3, 3), CIFAR, torch.bfloat16)
    if "x" in changes:
        changes = changes | {"weight": weight(16, 12, (3, 3), torch.bfloat16)}
    assert_refused(Device("emulated"), ops.conv2d, arguments, changes, message)


def test_kernels_refuse_groups() -> None:
    x, w = activation(2, 2, 9, 9, torch.bfloat16), weight(16, 1, (3, 3), torch.bfloat16)
    arguments = {"x": x, "weight": w, "scale": None, "shift": None, "geometry": [1, 1, 1, 1, 1, 1, 2], "stats": True}
    assert_refused(Device("emulated"), ops.conv2d, arguments, {}, "no kernel takes 2 channels in groups")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_wgrad_refuses(dtype: torch.dtype) -> None:
    arguments = wgrad_arguments((2, 3, 9, 9), 16, (3, 3), CIFAR, dtype, "bn")
    changes = {"x_scale": torch.ones(3), "x_shift": torch.ones(3)}
    assert_refused(Device("emulated"), ops.conv2d_wgrad, arguments, changes, "3 channels as they are")
    empty_batch = wgrad_arguments((0, 3, 9, 9), 16, (3, 3), CIFAR, dtype, "bn")
    assert_refused(Device("emulated"), ops.conv2d_wgrad, empty_batch, {}, "no pixels to sum over")


# ------------------------------------------------------------------------------------------------- machine code

# Tensor-core instructions among all of the main loop's, in percent, at least, on sm_80 and sm_90.
SHARES = {
    "conv2d_few_fprop_4x1": 40,
    "conv2d_few_fprop_4x2": 48,
    "conv2d_few_fprop_8": 27.5,
    "conv2d_few_wgrad_4": 9,
    "conv2d_few_wgrad_8": 15.5,
    "conv2d_few_wgrad_backward_4": 7.5,
    "conv2d_few_wgrad_backward_8": 11.5,
}
# An image's pixels start at any element, and its weights' gradients end at any: single ones.
NARROW = {("LDG", 2), ("STG", 4)}


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("few", few_cases.KERNELS, ids=str)
def test_machine_code(few: few_cases.Few, arch: str) -> None:
    """Accesses are 16 bytes but for those of the image and of sums; 256 threads or more on a multiprocessor, or 128
    where weights of eight channels a tap are 58 KB."""
    for suffix, dtype in few_cases.DTYPES.items():
        plan = few.plan(dtype, int(arch.removeprefix("sm_")))
        if few.name == "conv2d_few_wgrad_backward_8" and arch == "sm_120":
            assert plan.reason.endswith("more than compute capability 12.0 has")
            continue
        assert plan.reason == ""
        step = plan.steps[0]
        (kernel,) = (k for k in kernels.compile_source(step.source, arch) if k.symbol == step.symbol)
        assert kernel.symbol == f"{few.name}_{suffix}"
        assert kernel.spills == kernel.stack == 0
        assert {"HMMA", "LDSM"} <= {opcode.split(".")[0] for opcode in kernel.opcodes}
        found = {access for access in kernel.accesses if access[0] in ("LDG", "STG", "LDGSTS")}
        ahead = {("LDGSTS", 4)} if few.backward else set()  # a mask's words
        assert {access for access in found if access[1] != 16} == NARROW | ahead, kernel.symbol
        assert ("STG" if few.op == "conv2d" else "LDGSTS", 16) in found
        least = 128 if few.name == "conv2d_few_fprop_8" else 256
        assert kernel.blocks(step.smem) * kernel.threads >= least, kernel.symbol
        if arch != "sm_120":
            assert 100 * kernel.share >= SHARES[few.name], (kernel.symbol, kernel.loops)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_wgrad_of_taps_beside_the_image(size: int, dtype: torch.dtype) -> None:
    """They get no gradient, and not what was in memory, which oneDNN's wgrad may leave there."""
    where = Geometry((2, 2), (3, 3), (1, 1), 1)
    x, w = activation(2, 8, size, size, dtype), torch.randn(16, 8, 7, 7).to(dtype)
    dy = activation(*where.out_shape(x.shape, w.shape), dtype)
    wanted = torch.nn.grad.conv2d_weight(x.double(), w.shape, dy.double(), 2, 3)
    got = Device("cpu").run(lambda: conv_backward(dy, x, w, where, False, True)[1])
    assert_close(got, wanted, 2 * torch.finfo(dtype).eps)
    assert torch.equal(got == 0, wanted == 0)
