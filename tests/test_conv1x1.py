"""conv1x1, conv1x1_dgrad and conv1x1_wgrad on every device: by the tolerance rule, and each element."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device import Device
from op_cases import acc_of, activation, nhwc, ops, vector
from pointwise_cases import (
    BACKWARD,
    DENSE,
    HALVES,
    Arguments,
    activated,
    assert_close,
    assert_dense,
    assert_refused,
    backward,
    compare,
    dgrad,
    dtypes,
    empty,
    gated,
    mask_of,
    masked,
    scale,
    strided,
    summed,
    weight,
)
from torch import Tensor
from torch.nn import functional as F

# [N, C, H, W] and K: pixels that fill no tile, channels that fill none or are fewer than any has, several splits.
PROBLEMS = [
    ((1, 8, 1, 1), 8),
    ((3, 24, 7, 9), 40),
    ((1, 8, 3, 5), 264),
    ((2, 72, 13, 11), 136),
    ((5, 40, 11, 13), 72),
    ((2, 264, 17, 16), 72),
    ((2, 136, 31, 19), 8),
]
STRIDES = (1, 2)


# ------------------------------------------------------------------------------------------------ plain PyTorch


def conv1x1(x, weight, scale, shift, stride, stats) -> tuple[Tensor, ...]:
    out = F.conv2d(activated(x, scale, shift), weight, stride=stride)
    if not stats:
        return out, empty(x), empty(x)
    wide = out.to(acc_of(x.dtype))
    return out, wide.mean((0, 2, 3)), wide.var((0, 2, 3), unbiased=False)


def conv1x1_dgrad(
    weight, height, width, stride, addend, addend_mask, gate_u, gate_scale, gate_shift, gate_mean, **prologue
) -> tuple[Tensor, ...]:
    dx = dgrad(backward(**prologue), weight, height, width, stride)
    if gate_u is not None:
        return summed(gated(dx, gate_u, gate_scale, gate_shift), gate_u, gate_mean)
    if addend is not None:
        dx = dx + masked(addend, addend_mask)
    return dx, empty(dx), empty(dx)


def conv1x1_wgrad(x, x_scale, x_shift, stride, wide, sums, **prologue) -> tuple[Tensor, ...]:
    du, a = backward(**prologue), activated(x, x_scale, x_shift)
    dw = torch.nn.grad.conv2d_weight(a, (du.shape[1], a.shape[1], 1, 1), du, stride=stride)
    acc = acc_of(x.dtype)
    return dw.to(acc) if wide else dw, du.to(acc).sum((0, 2, 3)) if sums else empty(x)


# ---------------------------------------------------------------------------------------------------- arguments


def forward_arguments(shape, k, dtype, affine=True, stride=1, stats=True) -> Arguments:
    c = shape[1]
    prologue = (scale(c, dtype), vector(c, dtype)) if affine else (None, None)
    x = activation(*shape, dtype)
    return {
        "x": x,
        "weight": weight(k, c, dtype),
        "scale": prologue[0],
        "shift": prologue[1],
        "stride": stride,
        "stats": stats,
    }


def backward_arguments(shape, k, dtype, prologue: str, stride: int) -> Arguments:
    """prologue: "none", "mask" (dy * mask), "bn" (the batch norm's backward), "bn mask" or "bn gate"."""
    n, _, h, w = shape
    out = (n, k, strided(h, stride), strided(w, stride))
    given: Arguments = dict.fromkeys(BACKWARD) | {"dy": activation(*out, dtype)}
    if prologue.endswith("mask"):
        given["mask"] = mask_of(*out)
    if prologue.startswith("bn"):
        given |= {name: vector(k, dtype) for name in ("mean", "coef_dz", "coef_x", "coef_1")}
        given["u"] = activation(*out, dtype)
    if prologue == "bn gate":
        given |= {"scale": scale(k, dtype), "shift": vector(k, dtype)}
    return given


def dgrad_arguments(shape, k, dtype, prologue="bn gate", stride=1, end="gate") -> Arguments:
    """end: "none", "add", "add mask" or "gate"."""
    c = shape[1]
    names = ("addend", "addend_mask", "gate_u", "gate_scale", "gate_shift", "gate_mean")
    given = backward_arguments(shape, k, dtype, prologue, stride) | dict.fromkeys(names)
    given |= {"weight": weight(k, c, dtype), "height": shape[2], "width": shape[3], "stride": stride}
    if end.startswith("add"):
        given["addend"] = activation(*shape, dtype)
    if end == "add mask":
        given["addend_mask"] = mask_of(*shape)
    if end == "gate":
        given |= {"gate_u": activation(*shape, dtype), "gate_scale": scale(c, dtype)}
        given |= {"gate_shift": vector(c, dtype), "gate_mean": vector(c, dtype)}
    return given


def wgrad_arguments(shape, k, dtype, prologue="bn gate", stride=1, affine=False, wide=False, sums=False) -> Arguments:
    c = shape[1]
    given = backward_arguments(shape, k, dtype, prologue, stride)
    given |= {"x": activation(*shape, dtype), "x_scale": None, "x_shift": None}
    if affine:
        given |= {"x_scale": scale(c, dtype), "x_shift": vector(c, dtype)}
    return given | {"stride": stride, "wide": wide, "sums": sums}


# -------------------------------------------------------------------------------------------------------- fprop


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("shape", "k"), PROBLEMS, ids=str)
def test_fprop(shape, k: int, affine: bool, stride: int, device: Device) -> None:
    for dtype in dtypes(device):
        runs = compare(device, ops.conv1x1, conv1x1, lambda t: forward_arguments(shape, k, t, affine, stride), dtype)
        for _, (out, mean, var) in ((a, got.values()) for a, got in runs):
            assert_dense(out)
            # Statistics are those of what is stored.
            assert_close(mean, out.double().mean((0, 2, 3)), 1e-5)
            assert_close(var, out.double().var((0, 2, 3), unbiased=False), 1e-5)


def test_fprop_without_statistics(device: Device) -> None:
    for dtype in dtypes(device):
        compare(device, ops.conv1x1, conv1x1, lambda t: forward_arguments((3, 24, 7, 9), 40, t, stats=False), dtype)


@pytest.mark.parametrize("pixels", [(1, 1), (7, 9), (31, 17)])
@pytest.mark.parametrize(("dtype", "ratio"), [(torch.bfloat16, 64), (torch.float16, 1000)])
def test_statistics_far_from_zero(dtype: torch.dtype, ratio: int, pixels: tuple[int, int], device: Device) -> None:
    """One input channel makes every output's mean, `ratio` standard deviations from 0."""
    x = activation(2, 24, *pixels, dtype)
    x[:, 0] = 1
    w = weight(40, 24, dtype)
    w[:, 0] = ratio * torch.randn(40, 1, 1).sign()
    out, mean, var = device.run(ops.conv1x1, x, w, None, None, 1, True)
    wide = out.double()
    assert_close(mean, wide.mean((0, 2, 3)), 1e-6)
    assert_close(var, wide.var((0, 2, 3), unbiased=False), 1e-4)


def test_any_channels_on_the_cpu() -> None:
    cpu = Device("cpu")
    for dtype in dtypes(cpu):
        compare(cpu, ops.conv1x1, conv1x1, lambda t: forward_arguments((2, 3, 5, 7), 33, t, True, 2), dtype)
        compare(cpu, ops.conv1x1_dgrad, conv1x1_dgrad, lambda t: dgrad_arguments((2, 3, 5, 7), 33, t), dtype)
        compare(cpu, ops.conv1x1_wgrad, conv1x1_wgrad, lambda t: wgrad_arguments((2, 3, 5, 7), 33, t), dtype)


def test_weights_of_every_dense_layout(device: Device) -> None:
    """[K, C, 1, 1] is one thing in memory, whatever the strides of its last dimensions say."""
    x, w = activation(2, 24, 5, 7, torch.bfloat16), weight(40, 24, torch.bfloat16)
    wanted = device.run(ops.conv1x1, x, w, None, None, 1, False)[0]
    for other in (nhwc(w), w.as_strided(w.shape, (24, 1, 5, 7))):
        assert torch.equal(device.run(ops.conv1x1, x, other, None, None, 1, False)[0], wanted)


def test_nan_passes_the_prologue(device: Device) -> None:
    x, w = activation(2, 24, 5, 7, torch.bfloat16), weight(40, 24, torch.bfloat16)
    x[1, 3, 2, 4] = float("nan")
    out = device.run(ops.conv1x1, x, w, torch.ones(24), torch.zeros(24), 1, False)[0]
    assert torch.equal(out.isnan().any(1), x.isnan().any(1))
    assert out.isnan().sum() == 40


# -------------------------------------------------------------------------------------------------------- dgrad


@pytest.mark.parametrize("end", ["none", "add", "add mask", "gate"])
@pytest.mark.parametrize("prologue", ["none", "bn", "bn mask", "bn gate"])
@pytest.mark.parametrize(("shape", "k"), PROBLEMS[2:4], ids=str)
def test_dgrad(shape, k: int, prologue: str, end: str, device: Device) -> None:
    for dtype in dtypes(device):
        runs = compare(
            device, ops.conv1x1_dgrad, conv1x1_dgrad, lambda t: dgrad_arguments(shape, k, t, prologue, 1, end), dtype
        )
        for a, (dx, *sums) in ((a, got.values()) for a, got in runs):
            assert_dense(dx)
            if end == "gate":  # sums are those of what is stored
                wanted = summed(dx.double(), a["gate_u"].double(), a["gate_mean"].double())[1:]
                for got, want, terms in zip(sums, wanted, (dx, 3 * dx), strict=True):
                    assert (got.double() - want).abs().max() <= 1e-6 * terms.double().abs().sum((0, 2, 3)).max()


@pytest.mark.parametrize(("shape", "k"), PROBLEMS, ids=str)
def test_dgrad_of_every_problem(shape, k: int, device: Device) -> None:
    for dtype in dtypes(device):
        compare(device, ops.conv1x1_dgrad, conv1x1_dgrad, lambda t: dgrad_arguments(shape, k, t), dtype)
        compare(
            device, ops.conv1x1_dgrad, conv1x1_dgrad, lambda t: dgrad_arguments(shape, k, t, "bn mask", 1, "add"), dtype
        )


@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("end", ["none", "add", "add mask"])
@pytest.mark.parametrize("pixels", [(7, 9), (8, 5), (1, 6), (2, 2), (3, 1)], ids=str)
def test_strided_dgrad_fills_what_lies_between(pixels, end: str, stride: int, device: Device) -> None:
    shape = (3, 40, *pixels)
    for dtype in dtypes(device):
        for prologue in ("none", "bn mask"):
            ((a, got), _) = compare(
                device, ops.conv1x1_dgrad, conv1x1_dgrad,
                lambda t, prologue=prologue: dgrad_arguments(shape, 72, t, prologue, stride, end), dtype,
            )  # fmt: skip
            read = torch.zeros(pixels, dtype=torch.bool)
            read[::stride, ::stride] = True
            between = (
                torch.zeros_like(a["dy"]).new_zeros(shape) if end == "none" else masked(a["addend"], a["addend_mask"])
            )
            assert torch.equal(got["0"][:, :, ~read], between[:, :, ~read])


# -------------------------------------------------------------------------------------------------------- wgrad


@pytest.mark.parametrize("operand", ["plain", "affine", "strided"])
@pytest.mark.parametrize("prologue", ["none", "mask", "bn", "bn mask", "bn gate"])
@pytest.mark.parametrize(("shape", "k"), PROBLEMS[1:4], ids=str)
def test_wgrad(shape, k: int, prologue: str, operand: str, device: Device) -> None:
    stride = 2 if operand == "strided" else 1

    def make(dtype: torch.dtype) -> Arguments:
        return wgrad_arguments(shape, k, dtype, prologue, stride, operand == "affine")

    for dtype in dtypes(device):
        for _, got in compare(device, ops.conv1x1_wgrad, conv1x1_wgrad, make, dtype):
            assert got["0"].is_contiguous()


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("operand", ["plain", "affine", "strided"])
@pytest.mark.parametrize(("shape", "k"), PROBLEMS, ids=str)
def test_wide_wgrad_and_sums(shape, k: int, operand: str, masks: bool, device: Device) -> None:
    """Pass W: in the accumulation type neither the product nor the sums are rounded before the end."""
    stride = 2 if operand == "strided" else 1

    def make(dtype: torch.dtype) -> Arguments:
        return wgrad_arguments(
            shape, k, dtype, "mask" if masks else "none", stride, operand == "affine", wide=True, sums=True
        )

    for dtype in dtypes(device):
        for a, got in compare(device, ops.conv1x1_wgrad, conv1x1_wgrad, make, dtype):
            dz = masked(a["dy"], a["mask"]).double()
            assert_close(got["1"], dz.sum((0, 2, 3)), 1e-5)
            if operand != "affine":  # rounding of what is exact else
                x = a["x"].double()[:, :, ::stride, ::stride]
                assert_close(got["0"].flatten(1), torch.einsum("nkhw,nchw->kc", dz, x), 1e-5)


# -------------------------------------------------------------------------------------------------------- errors


X = activation(2, 8, 5, 7, torch.bfloat16)
V, V16 = torch.ones(8), torch.ones(16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X.contiguous()}, "x has shape .* " + DENSE),
        ({"x": X[0]}, r"x has shape \[8, 5, 7\], expected 4 dimensions"),
        ({"weight": torch.zeros(16, 8, 1, 1)}, "weight has dtype float32, expected bfloat16"),
        ({"weight": torch.zeros(16, 4, 1, 1).bfloat16()}, r"weight has shape \[16, 4, 1, 1\], expected \[K, 8, 1, 1\]"),
        ({"weight": torch.zeros(16, 8, 3, 3).bfloat16()}, r"weight has shape \[16, 8, 3, 3\], expected \[K, 8, 1, 1\]"),
        ({"weight": torch.zeros(8, 16, 1, 1).bfloat16().transpose(0, 1)}, "weight has strides .* a dense tensor"),
        ({"scale": None}, "shift is given without scale"),
        ({"shift": None}, "scale is given without shift"),
        ({"scale": V.half()}, "scale has dtype float16, expected float32"),
        ({"scale": V16}, r"scale has shape \[16\], expected \[8\]"),
        ({"shift": V16[::2]}, r"shift has strides \[2\].*expected a contiguous tensor"),
        ({"stride": 0}, "stride is 0, expected at least 1"),
    ],
)
def test_fprop_errors(changes: dict[str, Any], message: str, device: Device) -> None:
    arguments = {"x": X, "weight": weight(16, 8, X.dtype), "scale": V, "shift": V, "stride": 1, "stats": True}
    assert_refused(device, ops.conv1x1, arguments, changes, "conv1x1: " + message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": None}, "u is given without mean"),
        ({"u": None}, "mean is given without u"),
        ({"u": X}, r"u has shape \[2, 8, 5, 7\], expected \[2, 16, 5, 7\]"),
        ({"mask": mask_of(2, 40, 5, 7)}, r"mask has shape \[2, 70\], expected \[1, 70\]"),
        ({"mask": mask_of(2, 16, 5, 7)}, "mask is given with scale"),
        ({"scale": None}, "shift is given without scale"),
        ({"coef_x": V}, r"coef_x has shape \[8\], expected \[16\]"),
        ({"weight": weight(24, 8, X.dtype)}, r"weight has shape \[24, 8, 1, 1\], expected \[16, C, 1, 1\]"),
        ({"height": 6}, "dy has shape .* which is not the output's for height 6, width 7 and stride 1"),
        ({"stride": 2}, "dy has shape .* which is not the output's for height 5, width 7 and stride 2"),
        ({"addend": X}, "addend is given with gate_u"),
        ({"addend_mask": mask_of(2, 8, 5, 7)}, "addend_mask is given without addend"),
        ({"gate_mean": None}, "gate_u is given without gate_mean"),
        ({"gate_u": X.half()}, "gate_u has dtype float16, expected bfloat16"),
        ({"gate_scale": V16}, r"gate_scale has shape \[16\], expected \[8\]"),
        ({"gate_u": X.contiguous()}, "gate_u has shape .* " + DENSE),
        ({"stride": 0}, "stride is 0, expected at least 1"),
    ],
)
def test_dgrad_errors(changes: dict[str, Any], message: str, device: Device) -> None:
    assert_refused(
        device, ops.conv1x1_dgrad, dgrad_arguments(X.shape, 16, X.dtype), changes, "conv1x1_dgrad: " + message
    )


def test_gate_takes_no_stride(device: Device) -> None:
    arguments = dgrad_arguments((2, 8, 5, 7), 16, X.dtype, "bn", 1) | {"height": 9, "width": 13, "stride": 2}
    arguments["gate_u"] = activation(2, 8, 9, 13, X.dtype)
    assert_refused(device, ops.conv1x1_dgrad, arguments, {}, "conv1x1_dgrad: stride is 2, expected 1 with gate_u")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sums": True}, "sums is True with u"),
        ({"x": X.half()}, "x has dtype float16, expected bfloat16"),
        ({"x": activation(2, 8, 5, 6, X.dtype)}, r"x has shape \[2, 8, 5, 6\], of which stride 1 does not make dy's"),
        ({"stride": 2}, "x has shape .* of which stride 2 does not make dy's"),
        ({"x": X.contiguous()}, "x has shape .* " + DENSE),
        ({"x_scale": None}, "x_shift is given without x_scale"),
        ({"x_scale": V16}, r"x_scale has shape \[16\], expected \[8\]"),
        ({"mask": mask_of(2, 16, 5, 7)}, "mask is given with scale"),
    ],
)
def test_wgrad_errors(changes: dict[str, Any], message: str, device: Device) -> None:
    arguments = wgrad_arguments(X.shape, 16, X.dtype, affine=True)
    assert_refused(device, ops.conv1x1_wgrad, arguments, changes, "conv1x1_wgrad: " + message)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_kernels_refuse_other_channels(dtype: torch.dtype) -> None:
    emulated = Device("emulated")
    calls = (
        (ops.conv1x1, forward_arguments((2, 12, 5, 7), 16, dtype)),
        (ops.conv1x1_dgrad, dgrad_arguments((2, 16, 5, 7), 12, dtype)),
        (ops.conv1x1_wgrad, wgrad_arguments((2, 12, 5, 7), 16, dtype)),
    )
    for op, arguments in calls:
        assert_refused(emulated, op, arguments, {}, "12 channels are not a multiple of 8")


def test_kernels_want_aligned_tensors() -> None:
    emulated = Device("emulated")
    arguments = forward_arguments((2, 8, 5, 7), 16, torch.bfloat16)
    shifted = torch.zeros(1 + X.numel(), dtype=X.dtype)[1:].view(2, 5, 7, 8).permute(0, 3, 1, 2)
    assert_refused(
        emulated, ops.conv1x1, arguments, {"x": shifted}, "a tensor does not start at a multiple of 16 bytes"
    )
    late = torch.zeros(9)[1:]
    assert_refused(emulated, ops.conv1x1, arguments, {"scale": late}, "scale does not start at a multiple of 16 bytes")
