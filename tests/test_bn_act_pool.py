"""bn_act_pool and its backward, against PyTorch's max_pool2d in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_cases import (
    CHANNELS,
    DTYPES,
    acc_of,
    activation,
    assert_rounded,
    isa,
    isas,
    nhwc,
    ops,
    same_bits,
    threads,
    vector,
    wide,
)
from torch import Tensor

WINDOWS = [(3, 2, 1), (2, 2, 0), (3, 1, 1), (1, 1, 0), (5, 3, 2), (11, 4, 5)]


def tap_of(index: Tensor, w: int, window: tuple[int, int, int]) -> Tensor:
    """max_pool2d's flat input indices [N, C, OH, OW] as taps kh * kernel + kw."""
    kernel, stride, padding = window
    top = (torch.arange(index.size(2)) * stride - padding).view(1, 1, -1, 1)
    left = (torch.arange(index.size(3)) * stride - padding).view(1, 1, 1, -1)
    return (index // w - top) * kernel + (index % w - left)


def check(x: Tensor, window: tuple[int, int, int]) -> None:
    scale, shift = vector(x.size(1), x.dtype), vector(x.size(1), x.dtype)
    a = (wide(scale) * x.double() + wide(shift)).relu().requires_grad_()
    # What the pool compares are activations in the accumulator's dtype: float64 may break other ties.
    exact = F.max_pool2d(a, *window)
    y, argmax = ops.bn_act_pool(x, scale, shift, *window)
    assert (y.dtype, argmax.dtype, y.shape, argmax.shape) == (x.dtype, torch.int8, exact.shape, exact.shape)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert argmax.is_contiguous(memory_format=torch.channels_last)
    largest = (wide(scale) * x.double()).abs().amax() + wide(shift).abs().amax() if x.numel() else 0.0
    assert_rounded(y, exact, largest)

    dy = torch.randn_like(y)
    da = ops.bn_act_pool_backward(dy, argmax, *x.shape[2:], *window)
    assert da.is_contiguous(memory_format=torch.channels_last)
    assert da.shape == x.shape
    index = F.max_pool2d(a, *window, return_indices=True)[1]
    agree = tap_of(index, x.size(3), window) == argmax
    assert agree.float().mean() >= 0.999 if agree.numel() else True
    if agree.all():
        exact.backward(dy.double())
        assert a.grad is not None
        assert_rounded(da, a.grad, window[0] ** 2 * dy.double().abs().amax() if dy.numel() else 0.0)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64(dtype: torch.dtype, channels: int) -> None:
    for window in WINDOWS:
        check(activation(2, channels, 13, 11, dtype), window)


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 80), st.integers(6, 20), st.integers(6, 20)),
    dtype=st.sampled_from(DTYPES),
    kernel=st.integers(1, 6),
    stride=st.integers(1, 6),
    padding=st.integers(0, 3),
    level=st.sampled_from(isas()),
)
def test_any_window(
    shape: tuple[int, ...], dtype: torch.dtype, kernel: int, stride: int, padding: int, level: int
) -> None:
    with isa(level):
        check(activation(*shape, dtype), (kernel, stride, min(padding, kernel // 2)))


@pytest.mark.parametrize("level", isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_and_nans_as_in_pytorch(dtype: torch.dtype, level: int) -> None:
    """Of equal maxima the first wins (a window of zeros included), and a NaN wins over any number."""
    x = nhwc(torch.randint(-3, 3, (2, 20, 12, 12)).to(dtype))
    x[:, ::4, ::5, ::3] = float("nan")
    one, zero = torch.ones(20, dtype=acc_of(dtype)), torch.zeros(20, dtype=acc_of(dtype))
    for window in WINDOWS:
        expected, index = F.max_pool2d(x.relu(), *window, return_indices=True)
        with isa(level):
            y, argmax = ops.bn_act_pool(x, one, zero, *window)
        assert torch.equal(y.nan_to_num(9), expected.nan_to_num(9))
        assert torch.equal(argmax.long(), tap_of(index, 12, window))


def test_more_channels_than_a_tile() -> None:
    check(activation(1, 2100, 7, 6, torch.float32), (3, 2, 1))


def test_threads_change_nothing() -> None:
    x, v = activation(2, 64, 56, 56, torch.float32), torch.randn(64)
    results = []
    for count in (1, 2):
        with threads(count):
            y, argmax = ops.bn_act_pool(x, v, v, 3, 2, 1)
            results.append([y, argmax, ops.bn_act_pool_backward(y, argmax, 56, 56, 3, 2, 1)])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


X = nhwc(torch.zeros(2, 8, 6, 5))
DY = nhwc(torch.zeros(2, 8, 3, 3))
ARGMAX = nhwc(torch.zeros(2, 8, 3, 3, dtype=torch.int8))
WINDOW_ERRORS = [
    ({"kernel": 12}, "kernel is 12, expected 1 to 11"),
    ({"kernel": 0}, "kernel is 0, expected 1 to 11"),
    ({"stride": 0}, "stride is 0, expected at least 1"),
    ({"padding": 2}, r"padding is 2, expected 0 to 1 \(half the kernel\)"),
    ({"padding": -1}, "padding is -1, expected 0 to 1"),
    ({"kernel": 9, "padding": 1}, "the input is 6 by 5, expected at least 9 by 9 with its padding of 1"),
]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *WINDOW_ERRORS,
        ({"x": X.contiguous()}, "x has shape .* expected a dense channels_last tensor"),
        ({"scale": torch.zeros(9)}, r"scale has shape \[9\], expected \[8\]"),
    ],
)
def test_errors(changes: dict[str, Any], message: str) -> None:
    arguments = {"x": X, "scale": torch.zeros(8), "shift": torch.zeros(8), "kernel": 3, "stride": 2, "padding": 1}
    with pytest.raises(RuntimeError, match="bn_act_pool: " + message):
        ops.bn_act_pool(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *WINDOW_ERRORS,
        ({"argmax": ARGMAX.int()}, "argmax has dtype int32, expected int8"),
        ({"argmax": ARGMAX[:1]}, r"argmax has shape \[1, 8, 3, 3\], expected \[2, 8, 3, 3\]"),
        ({"argmax": ARGMAX.contiguous()}, "argmax has shape .* expected a dense channels_last tensor"),
        ({"height": 8}, r"dy has shape \[2, 8, 3, 3\], expected \[2, 8, 4, 3\]"),
    ],
)
def test_backward_errors(changes: dict[str, Any], message: str) -> None:
    arguments = {"dy": DY, "argmax": ARGMAX, "height": 6, "width": 5, "kernel": 3, "stride": 2, "padding": 1}
    with pytest.raises(RuntimeError, match="bn_act_pool_backward: " + message):
        ops.bn_act_pool_backward(**{**arguments, **changes})
