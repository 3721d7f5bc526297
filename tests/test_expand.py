"""expand and expand_dgrad on every device: by the tolerance rule, and each element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from device import Device
from op_cases import activation, bits, ops, vector
from pointwise_cases import (
    DENSE,
    HALVES,
    Arguments,
    activated,
    assert_close,
    assert_dense,
    assert_refused,
    columns,
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

# [N, C, H, W] of x, K and C2: operands of one, two, three and more tiles of k, ragged last masks' panels.
PROBLEMS = [
    ((1, 8, 1, 1), 8, 8),
    ((3, 24, 7, 9), 40, 72),
    ((1, 8, 3, 5), 264, 40),
    ((2, 40, 13, 11), 136, 8),
    ((2, 72, 11, 13), 72, 24),
    ((5, 136, 9, 7), 24, 264),
    ((2, 264, 17, 16), 72, 136),
]


# ------------------------------------------------------------------------------------------------ plain PyTorch


def expand(
    x, scale, shift, weight, out_scale, out_shift, x2, weight2, out_scale2, stride, residual, relu, save_mask
) -> tuple[Tensor, ...]:
    z = columns(out_scale) * F.conv2d(activated(x, scale, shift), weight) + columns(out_shift)
    if x2 is not None:
        z = z + columns(out_scale2) * F.conv2d(x2, weight2, stride=stride)
    if residual is not None:
        z = z + residual
    return (F.relu(z) if relu else z).to(x.dtype), torch.empty(0, dtype=torch.int32)


def fused(**arguments: Any) -> tuple[Tensor, Tensor]:
    """expand, whose mask is checked here and left out."""
    y, mask = ops.expand(**arguments)
    if not arguments["save_mask"]:
        assert mask.numel() == 0
        return y, mask
    y, passed = y.cpu(), bits(mask.cpu(), y.cpu())
    lost = passed & (y == 0) & (y.dtype == torch.float16)  # positive, but too small for float16
    assert torch.equal(passed & ~lost, y > 0)
    return y, mask.new_empty(0)


def expand_dgrad(
    dy, mask, weight, x, scale, shift, q, constant, mean, stride, addend, addend_mask
) -> tuple[Tensor, ...]:
    a = activated(x, scale, shift)[:, :, ::stride, ::stride]
    da = dgrad(masked(dy, mask), weight, *dy.shape[2:], 1) + F.conv2d(a, q[:, :, None, None]) + columns(constant)
    if scale is not None:
        return summed(gated(da, x, scale, shift).to(x.dtype), x, mean)
    dx = torch.zeros_like(x)
    dx[:, :, ::stride, ::stride] = da.to(x.dtype)
    if addend is not None:
        dx = dx + masked(addend, addend_mask)
    return dx, empty(x), empty(x)


# ---------------------------------------------------------------------------------------------------- arguments


def expand_arguments(
    shape, k, c2, dtype, affine=True, shortcut="none", stride=1, relu=True, save_mask=True
) -> Arguments:
    """shortcut: "none", "residual" or "projection", strided from pixels of which the last row and column go unread."""
    n, c, h, w = shape
    names = ("scale", "shift", "x2", "weight2", "out_scale2", "residual")
    given: Arguments = dict.fromkeys(names) | {"x": activation(*shape, dtype), "weight": weight(k, c, dtype)}
    given |= {"out_scale": scale(k, dtype), "out_shift": vector(k, dtype)}
    if affine:
        given |= {"scale": scale(c, dtype), "shift": vector(c, dtype)}
    if shortcut == "residual":
        given["residual"] = activation(n, k, h, w, dtype)
    if shortcut == "projection":
        x2 = activation(n, c2, stride * h - (stride > 1), stride * w, dtype)
        given |= {"x2": x2, "weight2": weight(k, c2, dtype), "out_scale2": scale(k, dtype)}
    return given | {"stride": stride, "relu": relu, "save_mask": save_mask}


def dgrad_arguments(shape, k, dtype, affine=True, masks=True, stride=1, shortcut="none") -> Arguments:
    """shortcut: "none", "add" or "add mask"."""
    n, c, h, w = shape
    names = ("mask", "scale", "shift", "mean", "addend", "addend_mask")
    out = (n, k, strided(h, stride), strided(w, stride))
    q = torch.randn(c, c) / c**0.5
    given: Arguments = dict.fromkeys(names) | {"dy": activation(*out, dtype), "weight": weight(k, c, dtype)}
    given |= {"x": activation(*shape, dtype), "q": (q + q.T).to(dtype), "constant": vector(c, dtype)}
    if masks:
        given["mask"] = mask_of(*out)
    if affine:
        given |= {"scale": scale(c, dtype), "shift": vector(c, dtype), "mean": vector(c, dtype)}
    if shortcut.startswith("add"):
        given["addend"] = activation(*shape, dtype)
    if shortcut == "add mask":
        given["addend_mask"] = mask_of(*shape)
    return given | {"stride": stride}


# ------------------------------------------------------------------------------------------------------- expand


def check_expand(device: Device, make: Callable[[torch.dtype], Arguments]) -> None:
    for dtype in dtypes(device):
        for _, got in compare(device, fused, expand, make, dtype):
            assert_dense(got["0"])


@pytest.mark.parametrize("shortcut", ["none", "residual"])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("shape", "k", "c2"), PROBLEMS, ids=str)
def test_expand(shape, k: int, c2: int, affine: bool, shortcut: str, device: Device) -> None:
    check_expand(device, lambda t: expand_arguments(shape, k, c2, t, affine, shortcut))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("shape", "k", "c2"), PROBLEMS, ids=str)
def test_dual(shape, k: int, c2: int, stride: int, device: Device) -> None:
    check_expand(device, lambda t: expand_arguments(shape, k, c2, t, True, "projection", stride))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shortcut", ["none", "residual", "projection"])
def test_without_mask(shortcut: str, relu: bool, device: Device) -> None:
    check_expand(
        device,
        lambda t: expand_arguments((3, 24, 7, 9), 40, 72, t, True, shortcut, relu=relu, save_mask=False),
    )


@pytest.mark.parametrize("c", [8, 40, 72, 136])
@pytest.mark.parametrize("c2", [8, 40, 72, 136])
def test_dual_phases(c: int, c2: int, device: Device) -> None:
    """Every number of k tiles in either phase, down to fewer than are in flight."""
    check_expand(device, lambda t: expand_arguments((2, c, 9, 7), 72, c2, t, True, "projection"))


@pytest.mark.parametrize("first", [0.0, 1e-30, -1e-30, 1e4, -3.0])
@pytest.mark.parametrize("second", [0.0, 1e-30, -1e-30, 1e4, -3.0])
def test_dual_scales(first: float, second: float, device: Device) -> None:
    """A channel may have a scale of 0, or one that is nothing beside the other."""

    def make(dtype: torch.dtype) -> Arguments:
        given = expand_arguments((2, 40, 5, 7), 72, 24, dtype, True, "projection")
        given["out_scale"][3::8], given["out_scale2"][3::8] = first, second
        given["out_shift"][3::16] = 0
        large = max(abs(first), abs(second), 1.0)  # else these channels' errors outweigh the others
        given["out_scale"] /= large
        given["out_scale2"] /= large
        return given

    def some(**arguments: Any) -> tuple[Tensor, ...]:
        y, rest = fused(**arguments)
        assert y.isfinite().all()
        return y, rest

    for dtype in dtypes(device):
        for a, got in compare(device, some, expand, make, dtype):
            if first == 0 and second == 0:
                wanted = columns(a["out_shift"]).relu().expand(got["0"].shape).to(dtype)
                assert torch.equal(got["0"][:, 3::8], wanted[:, 3::8])


def test_any_channels_on_the_cpu() -> None:
    cpu = Device("cpu")
    for shortcut in ("none", "residual", "projection"):
        check_expand(cpu, lambda t, shortcut=shortcut: expand_arguments((2, 3, 5, 7), 33, 5, t, True, shortcut))
    for dtype in dtypes(cpu):
        compare(cpu, ops.expand_dgrad, expand_dgrad, lambda t: dgrad_arguments((2, 3, 5, 7), 33, t), dtype)


def test_nan_passes_the_relu(device: Device) -> None:
    given = expand_arguments((2, 24, 5, 7), 40, 8, torch.bfloat16)
    given["x"][1, 3, 2, 4] = float("nan")
    y, mask = device.run(lambda a: ops.expand(**a), given)
    assert y[1, :, 2, 4].isnan().all()
    assert bits(mask, y)[1, :, 2, 4].all()
    assert y.isnan().sum() == 40


# ------------------------------------------------------------------------------------------------- expand_dgrad


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(("shape", "k", "c2"), PROBLEMS, ids=str)
def test_dgrad(shape, k: int, c2: int, masks: bool, device: Device) -> None:
    for dtype in dtypes(device):
        make = lambda t: dgrad_arguments(shape, k, t, True, masks)  # noqa: E731
        for a, got in compare(device, ops.expand_dgrad, expand_dgrad, make, dtype):
            dz = got["0"]
            assert_dense(dz)
            # Sums are those of what is stored.
            wanted = summed(dz.double(), a["x"].double(), a["mean"].double())[1:]
            size = dz.double().abs().sum((0, 2, 3)).max()
            assert (got["1"].double() - wanted[0]).abs().max() <= 1e-6 * size
            assert (got["2"].double() - wanted[1]).abs().max() <= 4e-6 * size


@pytest.mark.parametrize("k", [8, 40, 72, 136])
@pytest.mark.parametrize("c", [8, 40, 72, 136])
def test_dgrad_phases(c: int, k: int, device: Device) -> None:
    """Every number of k tiles in either phase, with and without a prologue in the second."""
    for dtype in dtypes(device):
        for affine in (False, True):
            compare(
                device, ops.expand_dgrad, expand_dgrad,
                lambda t, affine=affine: dgrad_arguments((2, c, 9, 7), k, t, affine), dtype,
            )  # fmt: skip


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("shortcut", ["none", "add", "add mask"])
@pytest.mark.parametrize("pixels", [(7, 9), (8, 5), (1, 6), (2, 2), (3, 1)], ids=str)
def test_projection_dgrad(pixels: tuple[int, int], shortcut: str, stride: int, device: Device) -> None:
    shape = (3, 40, *pixels)
    read = torch.zeros(pixels, dtype=torch.bool)
    read[::stride, ::stride] = True
    for dtype in dtypes(device):
        for masks in (False, True):
            ((a, got), _) = compare(
                device, ops.expand_dgrad, expand_dgrad,
                lambda t, masks=masks: dgrad_arguments(shape, 72, t, False, masks, stride, shortcut), dtype,
            )  # fmt: skip
            between = torch.zeros_like(a["x"]) if shortcut == "none" else masked(a["addend"], a["addend_mask"])
            assert torch.equal(got["0"][:, :, ~read], between[:, :, ~read])
            assert_dense(got["0"])


def test_large_operands_cancel_with_the_constant(device: Device) -> None:
    """A mean of the operand that the constant takes away again costs no more than its rounding."""
    for dtype in HALVES:
        given = dgrad_arguments((2, 40, 9, 7), 72, dtype, False)
        given["x"] = (given["x"] + 8).to(dtype)
        given["constant"] = -8 * given["q"].float().sum(1)
        got = device.run(lambda a: ops.expand_dgrad(**a), given)[0]
        wanted = expand_dgrad(**{n: a.double() if isinstance(a, Tensor) and a.is_floating_point() else a
                                 for n, a in given.items()})[0]  # fmt: skip
        assert_close(got, wanted, (64 if device.name == "cpu" else 8) * torch.finfo(dtype).eps)


# -------------------------------------------------------------------------------------------------------- errors

X, V, V16 = activation(2, 8, 5, 7, torch.bfloat16), torch.ones(8), torch.ones(16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X.contiguous()}, "x has shape .* " + DENSE),
        ({"weight": torch.zeros(16, 8, 1, 1)}, "weight has dtype float32, expected bfloat16"),
        ({"scale": None}, "shift is given without scale"),
        ({"out_scale": V}, r"out_scale has shape \[8\], expected \[16\]"),
        ({"out_shift": V16.double()}, "out_shift has dtype float64, expected float32"),
        ({"weight2": None}, "x2 is given without weight2"),
        ({"x2": None}, "weight2 is given without x2"),
        ({"weight2": weight(24, 40, X.dtype)}, r"weight2 has shape \[24, 40, 1, 1\], expected \[16, 40, 1, 1\]"),
        ({"x2": activation(2, 40, 9, 15, X.dtype)}, "x2 has shape .* of which stride 2 does not make the pixels of x"),
        ({"x2": activation(3, 40, 9, 14, X.dtype)}, "x2 has shape .* of which stride 2 does not make the pixels of x"),
        ({"x2": activation(2, 40, 9, 14, torch.float16)}, "x2 has dtype float16, expected bfloat16"),
        ({"residual": activation(2, 16, 5, 7, X.dtype)}, "residual is given with x2"),
        ({"relu": False}, "save_mask is True and relu is False"),
        ({"stride": 0}, "stride is 0, expected at least 1"),
    ],
)
def test_expand_errors(changes: dict[str, Any], message: str, device: Device) -> None:
    given = expand_arguments(X.shape, 16, 40, X.dtype, shortcut="projection", stride=2)
    assert_refused(device, ops.expand, given, changes, "expand: " + message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stride": 2}, "stride is 2, expected 1 without x2"),
        ({"residual": X}, r"residual has shape \[2, 8, 5, 7\], expected \[2, 16, 5, 7\]"),
    ],
)
def test_residual_errors(changes: dict[str, Any], message: str, device: Device) -> None:
    given = expand_arguments(X.shape, 16, 40, X.dtype, shortcut="residual")
    assert_refused(device, ops.expand, given, changes, "expand: " + message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dy": X}, r"dy has shape \[2, 8, 5, 7\], expected \[2, 16, 5, 7\]"),
        ({"mask": mask_of(2, 40, 5, 7)}, r"mask has shape \[2, 70\], expected \[1, 70\]"),
        ({"mask": mask_of(2, 16, 5, 7).float()}, "mask has dtype float32, expected int32"),
        ({"mean": None}, "scale is given without mean"),
        ({"scale": None, "shift": None}, "mean is given without scale"),
        ({"q": torch.zeros(8, 8)}, "q has dtype float32, expected bfloat16"),
        ({"q": torch.zeros(8, 16).bfloat16()}, r"q has shape \[8, 16\], expected \[8, 8\]"),
        ({"constant": V16}, r"constant has shape \[16\], expected \[8\]"),
        ({"addend": X}, "addend is given with scale"),
        ({"addend_mask": mask_of(2, 8, 5, 7)}, "addend_mask is given without addend"),
        ({"stride": 0}, "stride is 0, expected at least 1"),
    ],
)
def test_dgrad_errors(changes: dict[str, Any], message: str, device: Device) -> None:
    given = dgrad_arguments(X.shape, 16, X.dtype)
    assert_refused(device, ops.expand_dgrad, given, changes, "expand_dgrad: " + message)


def test_an_activated_operand_takes_no_stride(device: Device) -> None:
    given = dgrad_arguments((2, 8, 5, 7), 16, X.dtype, stride=2)
    assert_refused(device, ops.expand_dgrad, given, {}, "expand_dgrad: stride is 2, expected 1 with scale")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_kernels_refuse(dtype: torch.dtype) -> None:
    emulated = Device("emulated")
    calls = (
        (ops.expand, expand_arguments((2, 12, 5, 7), 16, 8, dtype), "12 channels are not a multiple of 8"),
        (ops.expand, expand_arguments((2, 16, 5, 7), 16, 12, dtype, True, "projection"), "12 channels are not"),
        (
            ops.expand,
            expand_arguments((2, 16, 5, 7), 16, 8, dtype, False, "projection"),
            "x comes with scale and shift",
        ),
        (ops.expand_dgrad, dgrad_arguments((2, 16, 5, 7), 12, dtype), "12 channels are not a multiple of 8"),
    )
    for op, arguments, message in calls:
        assert_refused(emulated, op, arguments, {}, message)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_no_pixels(dtype: torch.dtype) -> None:
    y, mask = ops.expand(**expand_arguments((0, 8, 5, 7), 16, 8, dtype))
    assert (y.shape, mask.shape) == ((0, 16, 5, 7), (1, 0))
