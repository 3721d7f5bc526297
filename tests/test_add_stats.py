"""add_stats: a sum, and the mean and variance of what it stores, from one pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device import Device
from hypothesis import given
from hypothesis import strategies as st
from op_cases import DTYPES, activation, isa, isas, nhwc, ops, same_bits, threads, vector
from pointwise_cases import Arguments, assert_refused, columns, compare
from torch import Tensor

# N, C, H, W: 16-byte accesses and single ones, several panels, several chunks and blocks
SHAPES = [(1, 1, 1, 1), (3, 8, 7, 5), (2, 33, 5, 4), (4, 72, 9, 11), (1, 300, 3, 3), (2, 16, 45, 46)]


def kinds(device: Device) -> list[torch.dtype]:
    return [d for d in DTYPES if device.name == "cpu" or d != torch.float64]


def plain(x: Tensor, u: Tensor, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, ...]:
    y = (x + (u if scale is None else columns(scale) * u + columns(shift))).to(x.dtype)
    wide = y.double()
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    return y, mean.to(acc), var.to(acc)


def arguments(shape: tuple[int, ...], affine: bool, dtype: torch.dtype) -> Arguments:
    c = shape[1]
    vectors = (vector(c, dtype), vector(c, dtype)) if affine else (None, None)
    x, u = (activation(*shape, dtype) for _ in range(2))
    return {"x": x, "u": u, "scale": vectors[0], "shift": vectors[1]}


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape: tuple[int, ...], affine: bool, device: Device) -> None:
    for dtype in kinds(device):
        results = compare(device, ops.add_stats, plain, lambda d: arguments(shape, affine, d), dtype)
        for _, got in results:  # the statistics are those of what was stored
            var, mean = torch.var_mean(got["0"].double(), (0, 2, 3), correction=0)
            assert (got["1"] - mean).abs().max() <= 1e-6 * (var.sqrt() + mean.abs()).max()
            assert ((got["2"] - var).abs() <= 3e-6 * var).all()


def test_is_a_sum_and_bn_stats_to_the_bit() -> None:
    for dtype in DTYPES:
        given = arguments((2, 24, 40, 41), True, dtype)
        y, mean, var = ops.add_stats(**given)
        assert all(same_bits(a, b) for a, b in zip((mean, var), ops.bn_stats(y), strict=True))
        plainly = ops.add_stats(given["x"], given["u"], None, None)[0]
        assert same_bits(plainly, given["x"] + given["u"])


def test_far_from_zero(device: Device) -> None:
    x, u = 1000 + torch.randn(2, 32, 20, 21), torch.randn(2, 32, 20, 21)
    y, _, var = device.run(ops.add_stats, nhwc(x), nhwc(u), None, None)
    exact = y.double().var((0, 2, 3), correction=0)
    assert ((var - exact).abs() <= 1e-5 * exact).all()


@given(
    n=st.integers(1, 4), c=st.integers(1, 400), h=st.integers(1, 9), w=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES), level=st.sampled_from(isas()), affine=st.booleans(),
)  # fmt: skip
def test_any_shape(n: int, c: int, h: int, w: int, dtype: torch.dtype, level: int, affine: bool) -> None:
    given = arguments((n, c, h, w), affine, dtype)
    with isa(level):
        y, mean, var = ops.add_stats(**given)
        assert all(same_bits(a, b) for a, b in zip((mean, var), ops.bn_stats(y), strict=True))
    exact = plain(**{k: None if t is None else t.double() for k, t in given.items()})[0]
    assert ((y.double() - exact).abs() <= 2 * torch.finfo(dtype).eps * (exact.abs() + 8)).all()


def test_threads_change_nothing() -> None:
    given = arguments((2, 64, 50, 65), True, torch.bfloat16)
    runs = []
    for count in (1, 2):
        with threads(count):
            runs.append(ops.add_stats(**given))
    assert all(same_bits(a, b) for a, b in zip(*runs, strict=True))


X = nhwc(torch.zeros(2, 8, 4, 5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X.contiguous()}, "x has shape .* expected a dense channels_last tensor"),
        ({"x": X[:0]}, r"x has shape \[0, 8, 4, 5\], expected at least one value per channel"),
        ({"u": X.half()}, r"u has dtype float16, expected float32 \(x is float32\)"),
        ({"u": nhwc(torch.zeros(2, 8, 5, 4))}, r"u has shape \[2, 8, 5, 4\], expected \[2, 8, 4, 5\]"),
        ({"scale": torch.ones(8)}, "scale is given without shift"),
        ({"scale": torch.ones(7), "shift": torch.ones(8)}, r"scale has shape \[7\], expected \[8\]"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str, device: Device) -> None:
    given = {"x": X, "u": X, "scale": None, "shift": None}
    assert_refused(device, ops.add_stats, given, changes, f"add_stats: {message}")
