"""bn_act, relu_mask and the two passes of bn_act's backward."""

from __future__ import annotations

import itertools
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
    assert_bits,
    assert_rounded,
    assert_sum,
    bits,
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

RESIDUALS = ["none", "plain", "affine"]
GATES = ["mask", "recompute", "none"]


def check_forward(x: Tensor, residual: str, relu: bool, save_mask: bool) -> None:
    scale, shift = vector(x.size(1), x.dtype), vector(x.size(1), x.dtype)
    z = wide(scale) * x.double() + wide(shift)
    magnitude = (wide(scale) * x.double()).abs() + wide(shift).abs()
    r = rs = rt = None
    if residual != "none":
        r = torch.randn_like(x)
        z, magnitude = z + r.double(), magnitude + r.double().abs()
    if residual == "affine":
        rs, rt = vector(x.size(1), x.dtype), vector(x.size(1), x.dtype)
        assert r is not None
        z = z + (wide(rs) - 1) * r.double() + wide(rt)
        magnitude = magnitude + (wide(rs) * r.double()).abs() + wide(rt).abs()
    y, mask = ops.bn_act(x, scale, shift, r, rs, rt, relu, save_mask)
    assert y.dtype == x.dtype
    assert y.stride() == x.stride()
    assert_rounded(y, z.relu() if relu else z, magnitude)
    if save_mask:
        assert_bits(mask, z, magnitude, x.dtype)
    else:
        assert (mask.shape, mask.dtype) == ((0,), torch.int32)


def check_backward(x: Tensor, gate: str, write_dz: bool) -> None:
    c, dtype = x.size(1), x.dtype
    dy, mean = torch.randn_like(x), vector(c, dtype)
    mask = scale = shift = None
    passed = torch.ones(x.shape, dtype=torch.bool)
    if gate == "mask":
        mask = ops.relu_mask(torch.randn_like(x))
        passed = bits(mask, x)
    elif gate == "recompute":
        # Powers of two, so that the sign of scale * x + shift is certain.
        scale, shift = 2.0 ** torch.randint(-2, 3, (c,)).to(acc_of(dtype)), torch.full((c,), 0.25, dtype=acc_of(dtype))
        passed = wide(scale) * x.double() + wide(shift) > 0
    dz, centred = dy.double() * passed, x.double() - wide(mean)

    got_dz, sum_dz, sum_dz_xc = ops.bn_act_backward_reduce(dy, mask, x, scale, shift, mean, write_dz)
    assert_sum(sum_dz, dz.sum((0, 2, 3)), dz.abs().sum((0, 2, 3)))
    spread = dz.abs() * (x.double().abs() + wide(mean).abs())
    assert_sum(sum_dz_xc, (dz * centred).sum((0, 2, 3)), spread.sum((0, 2, 3)))
    assert got_dz.dtype == dtype
    assert same_bits(got_dz, torch.where(passed, dy, 0)) if write_dz else got_dz.shape == (0,)

    coefs = [vector(c, dtype) for _ in range(3)]
    dx = ops.bn_act_backward_apply(dy, mask, x, scale, shift, mean, *coefs)
    terms = [wide(coefs[0]) * dz, wide(coefs[1]) * centred, wide(coefs[2]).expand(x.shape)]
    magnitude = terms[0].abs() + wide(coefs[1]).abs() * (x.double().abs() + wide(mean).abs()) + terms[2].abs()
    assert dx.stride() == x.stride()
    assert_rounded(dx, sum(terms), magnitude)
    addend = torch.randn_like(x)
    dx = ops.bn_act_backward_apply(dy, mask, x, scale, shift, mean, *coefs, addend)
    assert_rounded(dx, sum(terms) + addend.double(), magnitude + addend.double().abs())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(dtype: torch.dtype, channels: int, size: str) -> None:
    x = sized(size, channels, dtype)
    check_forward(x, "plain", relu=True, save_mask=True)
    for residual, relu in itertools.product(RESIDUALS, [True, False]):
        check_forward(x, residual, relu, save_mask=False)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(dtype: torch.dtype, channels: int, size: str) -> None:
    x = sized(size, channels, dtype)
    check_backward(x, "mask", write_dz=True)
    for gate in GATES[1:]:
        check_backward(x, gate, write_dz=False)


shapes = st.tuples(st.integers(0, 4), st.integers(1, 400), st.integers(1, 9), st.integers(1, 9))


@given(shape=shapes, dtype=st.sampled_from(DTYPES), residual=st.sampled_from(RESIDUALS), level=st.sampled_from(isas()))
def test_forward_of_any_shape(shape: tuple[int, ...], dtype: torch.dtype, residual: str, level: int) -> None:
    with isa(level):
        check_forward(activation(*shape, dtype), residual, relu=True, save_mask=True)


@given(shape=shapes, dtype=st.sampled_from(DTYPES), gate=st.sampled_from(GATES), level=st.sampled_from(isas()))
def test_backward_of_any_shape(shape: tuple[int, ...], dtype: torch.dtype, gate: str, level: int) -> None:
    with isa(level):
        check_backward(activation(*shape, dtype), gate, write_dz=True)


@pytest.mark.parametrize("channels", [2048, 2049, 4100])
def test_more_channels_than_a_tile(channels: int) -> None:
    x = activation(2, channels, 3, 3, torch.float32)
    check_forward(x, "affine", relu=True, save_mask=True)
    check_backward(x, "mask", write_dz=True)


@pytest.mark.parametrize("level", isas())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_is_loaded_and_stored_exactly(dtype: torch.dtype, level: int) -> None:
    every = torch.arange(-32768, 32768).to(torch.int16).view(dtype)
    x = nhwc(every.view(1, 64, 32, 32))
    with isa(level):
        y, _ = ops.bn_act(x, torch.ones(64), torch.zeros(64), None, None, None, False, False)
    number = ~x.isnan()
    assert torch.equal(y[number], x[number])
    assert torch.equal(y.isnan(), x.isnan())


@pytest.mark.parametrize("level", isas())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_like_pytorch(dtype: torch.dtype, level: int) -> None:
    """1 * value + 0 rounds to what tensor.to(dtype) gives: ties, subnormals, overflow, infinities and NaN."""
    random = torch.randint(-(2**31), 2**31, (40_000,)).to(torch.int32).view(torch.float32)
    halves = torch.arange(-32768, 32768).to(torch.int16).view(dtype).float()
    ties = (halves[:-1] + halves[1:]) / 2
    special = torch.tensor([65519.996, 65520.0, -65520.0, 3.4e38, float("inf"), float("-inf"), float("nan"), 1e-40])
    values = torch.cat([random, halves, ties, special])
    one = torch.ones(1, values.numel(), 1, 1, dtype=dtype)
    with isa(level):
        y, _ = ops.bn_act(one, values, torch.zeros_like(values), None, None, None, False, False)
    expected, y = values.to(dtype), y.flatten()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y[~y.isnan()], expected[~y.isnan()])


@pytest.mark.parametrize("level", isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_as_in_pytorch(dtype: torch.dtype, level: int) -> None:
    """relu(NaN) is NaN, and its gradient passes: threshold_backward stops it only where y <= 0."""
    x = activation(2, 35, 3, 3, dtype)
    x[0, ::3, 1, 1] = float("nan")
    one, zero = torch.ones(35, dtype=acc_of(dtype)), torch.zeros(35, dtype=acc_of(dtype))
    leaf = x.clone().requires_grad_()
    expected = leaf.relu()
    expected.sum().backward()
    with isa(level):
        y, mask = ops.bn_act(x, one, zero, None, None, None, True, True)
        assert torch.equal(y.isnan(), x.isnan())
        assert torch.equal(y.nan_to_num(7), expected.detach().nan_to_num(7))
        assert leaf.grad is not None
        assert torch.equal(bits(mask, x), leaf.grad.bool())
        assert torch.equal(mask, ops.relu_mask(y))
        # A NaN gradient is stopped too where relu' is 0, and not multiplied by it.
        nan = torch.full_like(x, float("nan"))
        for args in [(mask, None, None, None), (None, x, one, zero)]:
            dz, _, _ = ops.bn_act_backward_reduce(nan, *args, None, True)
            assert torch.equal(dz.isnan(), leaf.grad.bool())


def test_infinities() -> None:
    x = nhwc(torch.tensor([float("inf"), float("-inf"), 1.0, -0.0]).repeat(8).view(1, 4, 2, 4))
    y, mask = ops.bn_act(x, torch.ones(4), torch.zeros(4), None, None, None, True, True)
    assert torch.equal(y, x.relu())
    assert torch.equal(bits(mask, x), x > 0)
    y, _ = ops.bn_act(x, torch.ones(4), torch.zeros(4), None, None, None, False, False)
    assert torch.equal(y, x)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_mask(dtype: torch.dtype, channels: int) -> None:
    for size in SIZES:
        y = sized(size, channels, dtype).relu()
        assert torch.equal(bits(ops.relu_mask(y), y), y > 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [3, 64])
def test_threads_change_nothing(dtype: torch.dtype, channels: int) -> None:
    x, dy = activation(2, channels, 50, 65, dtype), activation(2, channels, 50, 65, dtype)
    v = vector(channels, dtype)
    results = []
    for count in (1, 2):
        with threads(count):
            y, mask = ops.bn_act(x, v, v, dy, None, None, True, True)
            sums = ops.bn_act_backward_reduce(dy, mask, x, None, None, v, True)
            results.append([y, mask, *sums, ops.bn_act_backward_apply(dy, mask, x, None, None, v, v, v, v)])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_sums_without_x_and_without_dz() -> None:
    dy = activation(2, 5, 4, 4, torch.bfloat16)
    dz, sum_dz, sum_dz_xc = ops.bn_act_backward_reduce(dy, None, None, None, None, None, False)
    assert_sum(sum_dz, dy.double().sum((0, 2, 3)), dy.double().abs().sum((0, 2, 3)))
    assert (dz.shape, dz.dtype) == ((0,), torch.bfloat16)
    assert (sum_dz_xc.shape, sum_dz_xc.dtype) == ((0,), torch.float32)


# ---------------------------------------------------------------------------------------- errors

X = nhwc(torch.zeros(2, 8, 4, 5))
V = torch.zeros(8)
MASK = torch.zeros(1, 40, dtype=torch.int32)
FORWARD = {
    "x": X,
    "scale": V,
    "shift": V,
    "residual": None,
    "residual_scale": None,
    "residual_shift": None,
    "relu": True,
    "save_mask": True,
}
REDUCE = {"dy": X, "mask": MASK, "x": X, "scale": None, "shift": None, "mean": V, "write_dz": False}
APPLY = {"dy": X, "mask": MASK, "x": X, "scale": None, "shift": None, "mean": V, "coef_dz": V, "coef_x": V, "coef_1": V}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X.long()}, "x has dtype int64, expected float32, bfloat16, float16 or float64"),
        ({"x": X[0]}, r"x has shape \[8, 4, 5\], expected 4 dimensions"),
        (
            {"x": X.contiguous()},
            r"x has shape \[2, 8, 4, 5\] and strides \[160, 20, 5, 1\], expected a dense channels_last",
        ),
        ({"scale": V.double()}, r"scale has dtype float64, expected float32 \(x is float32\)"),
        ({"x": X.double()}, r"scale has dtype float32, expected float64 \(x is float64\)"),
        ({"x": X.bfloat16(), "shift": V.bfloat16()}, r"shift has dtype bfloat16, expected float32 \(x is bfloat16\)"),
        ({"scale": V[:7]}, r"scale has shape \[7\], expected \[8\] \(x is \[2, 8, 4, 5\]\)"),
        ({"shift": torch.zeros(16)[::2]}, r"shift has strides \[2\] for shape \[8\], expected a contiguous tensor"),
        ({"residual": nhwc(torch.zeros(2, 8, 4, 4))}, r"residual has shape \[2, 8, 4, 4\], expected \[2, 8, 4, 5\]"),
        ({"residual": X.half()}, r"residual has dtype float16, expected float32 \(x is float32\)"),
        ({"residual": X.contiguous()}, "residual has shape .* expected a dense channels_last tensor"),
        ({"residual": X, "residual_scale": V}, "residual_scale is given without residual_shift"),
        ({"residual": X, "residual_shift": V}, "residual_shift is given without residual_scale"),
        ({"residual_scale": V, "residual_shift": V}, "residual_scale is given without residual"),
        (
            {"residual": X, "residual_scale": V[:1], "residual_shift": V},
            r"residual_scale has shape \[1\], expected \[8\]",
        ),
        ({"relu": False}, "save_mask is True and relu is False, expected relu=True"),
    ],
)
def test_forward_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match="bn_act: " + message):
        ops.bn_act(**{**FORWARD, **changes})


BACKWARD_ERRORS = [
    ({"dy": X.contiguous()}, "dy has shape .* expected a dense channels_last tensor"),
    ({"mask": MASK.long()}, "mask has dtype int64, expected int32"),
    ({"mask": MASK.t().contiguous()}, r"mask has shape \[40, 1\], expected \[1, 40\] \(dy is \[2, 8, 4, 5\]\)"),
    ({"x": nhwc(torch.zeros(2, 8, 5, 4))}, r"x has shape \[2, 8, 5, 4\], expected \[2, 8, 4, 5\]"),
    ({"x": X.half()}, "x has dtype float16, expected float32"),
    ({"scale": V}, "scale is given without shift"),
    ({"shift": V}, "shift is given without scale"),
    ({"mean": V[:3]}, r"mean has shape \[3\], expected \[8\]"),
]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *BACKWARD_ERRORS,
        ({"x": None}, "mean is given without x"),
        ({"x": None, "mean": None, "scale": V, "shift": V}, "scale is given without x"),
    ],
)
def test_reduce_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match="bn_act_backward_reduce: " + message):
        ops.bn_act_backward_reduce(**{**REDUCE, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *BACKWARD_ERRORS,
        ({"coef_x": V.double()}, "coef_x has dtype float64, expected float32"),
        ({"addend": X.half()}, "addend has dtype float16, expected float32"),
    ],
)
def test_apply_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match="bn_act_backward_apply: " + message):
        ops.bn_act_backward_apply(**{**APPLY, **changes})


def test_relu_mask_errors() -> None:
    with pytest.raises(RuntimeError, match=r"relu_mask: y has shape .* expected a dense channels_last tensor"):
        ops.relu_mask(X.contiguous())
