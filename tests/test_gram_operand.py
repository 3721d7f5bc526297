"""gram_operand: the centred, rounded, possibly subsampled operand of the Gram matrix, and its mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import (
    CHANNELS,
    DTYPES,
    SIZES,
    acc_of,
    activation,
    assert_rounded,
    assert_sum,
    isa,
    isas,
    nhwc,
    ops,
    same_bits,
    sized,
    threads,
    vector,
    wide,
)
from torch import Tensor


def check(x: Tensor, affine: bool, relu: bool, stride: int) -> None:
    c, dtype = x.size(1), x.dtype
    scale, shift = (vector(c, dtype), vector(c, dtype)) if affine else (None, None)
    center = vector(c, dtype)
    z = magnitude = x.double()
    if scale is not None and shift is not None:
        z = wide(scale) * x.double() + wide(shift)
        magnitude = (wide(scale) * x.double()).abs() + wide(shift).abs()
    exact = (z.relu() if relu else z) - wide(center)
    magnitude = magnitude.abs() + wide(center).abs()

    a, mean = ops.gram_operand(x, scale, shift, relu, center, stride)
    assert a.dtype == dtype
    assert a.is_contiguous(memory_format=torch.channels_last)
    assert_rounded(a, exact[:, :, ::stride, ::stride], magnitude[:, :, ::stride, ::stride])
    # The mean is that of the rounded operand, which is what the Gram matrix multiplies.
    assert mean.dtype == acc_of(dtype)
    if a.numel():
        assert_sum(mean, a.double().mean((0, 2, 3)), a.double().abs().mean((0, 2, 3)))
    else:
        assert mean.isnan().all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64(dtype: torch.dtype, channels: int, size: str) -> None:
    check(sized(size, channels, dtype), affine=True, relu=True, stride=1)


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 300), st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from(DTYPES),
    affine=st.booleans(),
    relu=st.booleans(),
    stride=st.integers(1, 4),
    level=st.sampled_from(isas()),
)
def test_any_shape(
    shape: tuple[int, ...], dtype: torch.dtype, affine: bool, relu: bool, stride: int, level: int
) -> None:
    with isa(level):
        check(activation(*shape, dtype), affine, relu, stride)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(dtype: torch.dtype, stride: int) -> None:
    x, v = activation(2, 64, 50, 65, dtype), vector(64, dtype)
    results = []
    for count in (1, 2):
        with threads(count):
            results.append(ops.gram_operand(x, v, v, True, v, stride))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_nan_stays() -> None:
    x = activation(2, 5, 3, 3, torch.bfloat16)
    x[0, 2, 1, 1] = float("nan")
    a, mean = ops.gram_operand(x, torch.ones(5), torch.zeros(5), True, torch.zeros(5), 1)
    assert torch.equal(a.isnan(), x.isnan())
    assert mean.isnan().nonzero().tolist() == [[2]]


X = nhwc(torch.zeros(2, 8, 4, 5))
V = torch.zeros(8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X.contiguous()}, "x has shape .* expected a dense channels_last tensor"),
        ({"scale": None}, "shift is given without scale"),
        ({"shift": None}, "scale is given without shift"),
        ({"center": V[:4]}, r"center has shape \[4\], expected \[8\]"),
        ({"center": V.half()}, "center has dtype float16, expected float32"),
        ({"stride": 0}, "stride is 0, expected at least 1"),
    ],
)
def test_errors(changes: dict[str, Any], message: str) -> None:
    arguments = {"x": X, "scale": V, "shift": V, "relu": True, "center": V, "stride": 1}
    with pytest.raises(RuntimeError, match="gram_operand: " + message):
        ops.gram_operand(**{**arguments, **changes})
