"""bn_stats: mean and biased variance of each channel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import CHANNELS, DTYPES, SIZES, acc_of, activation, isa, isas, nhwc, ops, same_bits, sized, threads

STATS = ("mean", "var")


def check(x: torch.Tensor, rtol: float = 2e-6) -> None:
    mean, var = ops.bn_stats(x)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert mean.dtype == var.dtype == acc_of(x.dtype)
    if x.dtype == torch.float64:
        rtol = 1e-13
    scale = exact_var.sqrt()
    # The mean is right to rounding, in units of itself or of the deviation, whichever is larger.
    assert ((mean.double() - exact_mean).abs() <= rtol / 4 * torch.maximum(scale, exact_mean.abs())).all()
    assert ((var.double() - exact_var).abs() <= rtol * exact_var).all()


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64(dtype: torch.dtype, channels: int, size: str) -> None:
    check(sized(size, channels, dtype))


@given(
    n=st.integers(1, 5),
    c=st.integers(1, 600),
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    level=st.sampled_from(isas()),
)
def test_any_shape(n: int, c: int, h: int, w: int, dtype: torch.dtype, level: int) -> None:
    with isa(level):
        check(activation(n, c, h, w, dtype))


@pytest.mark.parametrize("level", isas())
@pytest.mark.parametrize("channels", [1, 16, 33, 256, 3000])
def test_large_mean(channels: int, level: int) -> None:
    """At mean / std = 1000 a difference of raw second moments would have no digit left in float32."""
    x = nhwc(1000 + torch.randn(4, channels, 40, 41))
    with isa(level):
        check(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(dtype: torch.dtype) -> None:
    x = activation(2, 64, 50, 65, dtype)
    with threads(1):
        one = ops.bn_stats(x)
    with threads(2):
        two = ops.bn_stats(x)
    assert all(same_bits(a, b) for a, b in zip(one, two, strict=True))


def test_constant_channel_has_no_variance() -> None:
    x = nhwc(torch.full((3, 5, 90, 91), 0.1))
    mean, var = ops.bn_stats(x)
    assert (mean == x[0, 0, 0, 0]).all()
    assert (var == 0).all()


def test_nan_stays_in_its_channel() -> None:
    x = activation(2, 40, 9, 9, torch.float32)
    x[1, 7, 3, 3] = float("nan")
    for stat in ops.bn_stats(x):
        assert stat.isnan().nonzero().tolist() == [[7]]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3, 4), r"bn_stats: x has shape \[2, 3, 4\], expected 4 dimensions \[N, C, H, W\]"),
        (
            torch.zeros(2, 3, 4, 4),
            r"bn_stats: x has shape \[2, 3, 4, 4\] and strides \[48, 16, 4, 1\], expected a dense",
        ),
        (nhwc(torch.zeros(2, 6, 4, 4))[:, :3], "expected a dense channels_last tensor"),
        (torch.zeros(0, 3, 4, 4), r"x has shape \[0, 3, 4, 4\], expected at least one value per channel"),
        (torch.zeros(2, 0, 4, 4), "expected at least one channel"),
        (nhwc(torch.zeros(2, 3, 4, 4, dtype=torch.int32)), "x has dtype int32, expected float32, bfloat16, float16 or"),
    ],
)
def test_errors(x: torch.Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.bn_stats(x)


def test_strides_of_single_elements_are_free() -> None:
    """A dimension of size 1 may have any stride, and with H = W = 1 or C = 1 NCHW is NHWC too."""
    for shape in [(4, 8, 1, 1), (4, 1, 3, 3), (1, 1, 1, 1)]:
        check(torch.randn(shape))
    check(torch.randn(5, 1, 1, 8).as_strided((5, 8, 1, 1), (8, 1, 777, 5)))
