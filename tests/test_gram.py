"""gram: mean and covariance of the centred operand on every device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device import Device
from op_cases import acc_of, activation, ops, vector
from pointwise_cases import (
    DENSE,
    HALVES,
    Arguments,
    activated,
    assert_close,
    assert_refused,
    columns,
    compare,
    dtypes,
    scale,
)
from torch import Tensor

from resnet_fused.ops.gram_form import sample_center

# [N, C, H, W]: one tile of 64 and several of 128, of which the last is ragged; several splits of the pixels.
SHAPES = [(1, 8, 1, 1), (3, 24, 7, 9), (2, 40, 31, 19), (2, 72, 13, 11), (2, 136, 17, 19), (1, 264, 13, 23)]


def operand(x: Tensor, scale: Tensor | None, shift: Tensor | None, center: Tensor, stride: int) -> Tensor:
    a = activated(x, scale, shift)[:, :, ::stride, ::stride]
    return (a - columns(center)).to(x.dtype)


def gram(x, scale, shift, center, stride) -> tuple[Tensor, ...]:
    a = operand(x, scale, shift, center, stride).to(acc_of(x.dtype))
    rows = a.permute(0, 2, 3, 1).reshape(-1, a.shape[1])
    mean = rows.mean(0)
    return center + mean, (rows - mean).T @ (rows - mean) / rows.shape[0]


def fused(**given: Any) -> tuple[Tensor, ...]:
    """gram, with the mean before the centre was taken away."""
    mean, cov = ops.gram(**given)
    return given["center"] + mean, cov


def arguments(shape: tuple[int, ...], dtype: torch.dtype, affine: bool = True, stride: int = 1) -> Arguments:
    c = shape[1]
    x = activation(*shape, dtype)
    prologue = (scale(c, dtype), vector(c, dtype)) if affine else (None, None)
    center = sample_center(x, *prologue)
    return {"x": x, "scale": prologue[0], "shift": prologue[1], "center": center, "stride": stride}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gram(shape: tuple[int, ...], affine: bool, stride: int, device: Device) -> None:
    for dtype in dtypes(device):
        for a, got in compare(device, fused, gram, lambda t: arguments(shape, t, affine, stride), dtype):
            mean, cov = got.values()
            assert cov.is_contiguous()
            assert device.name == "cpu" or torch.equal(cov, cov.T)
            # The operand is rounded, and nothing after it is. (One of its roundings may turn out the other way.)
            rows = operand(**a).double().permute(0, 2, 3, 1).reshape(-1, shape[1])
            tolerance = 1e-3 if affine else 1e-5
            size = (rows + a["center"]).square().mean(0).max()
            assert (mean - (a["center"] + rows.mean(0))).abs().max() <= tolerance * size.sqrt()
            assert (cov - torch.cov(rows.T, correction=0)).abs().max() <= tolerance * size


@pytest.mark.parametrize(("dtype", "ratio"), [(torch.bfloat16, 64), (torch.float16, 1000)])
def test_means_far_from_zero(dtype: torch.dtype, ratio: int, device: Device) -> None:
    """A centre near the mean: the covariance is as accurate as if the mean were 0."""
    x = (activation(2, 72, 13, 11, torch.float32) + ratio).to(dtype)
    center = torch.full((72,), float(ratio))
    mean, cov = device.run(ops.gram, x, None, None, center, 1)
    rows = x.double().permute(0, 2, 3, 1).reshape(-1, 72) - ratio
    assert_close(mean, rows.mean(0), 1e-5)
    assert_close(cov, torch.cov(rows.T, correction=0), 1e-5)


def test_any_channels_on_the_cpu() -> None:
    cpu = Device("cpu")
    for dtype in dtypes(cpu):
        compare(cpu, fused, gram, lambda t: arguments((2, 33, 5, 7), t), dtype)


X, V = activation(2, 8, 5, 7, torch.bfloat16), torch.ones(8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X.contiguous()}, "x has shape .* " + DENSE),
        ({"x": X.int()}, "x has dtype int32, expected float32, bfloat16, float16 or float64"),
        ({"scale": None}, "shift is given without scale"),
        ({"shift": None}, "scale is given without shift"),
        ({"center": V[:4]}, r"center has shape \[4\], expected \[8\]"),
        ({"center": V.half()}, "center has dtype float16, expected float32"),
        ({"stride": 0}, "stride is 0, expected at least 1"),
    ],
)
def test_errors(changes: dict[str, Any], message: str, device: Device) -> None:
    assert_refused(device, ops.gram, arguments(X.shape, X.dtype), changes, "gram: " + message)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_kernels_refuse(dtype: torch.dtype) -> None:
    emulated = Device("emulated")
    for shape, message in (((2, 12, 5, 7), "12 channels are not a multiple of 8"), ((0, 8, 5, 7), "no pixels")):
        assert_refused(emulated, ops.gram, arguments(shape, dtype), {}, "gram: " + message)
