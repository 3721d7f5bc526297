"""The Triton kernels of expand and expand_dgrad: the tests of the ops, interpreted and as PTX."""

from __future__ import annotations

from itertools import product

import pytest
import test_expand as op
from device import COMPILED_TRITON, Device
from pointwise_cases import assert_refused
from test_expand import PROBLEMS, X, dgrad_arguments, expand_arguments
from triton_cases import cases
from triton_cases import device as device  # a fixture


@pytest.mark.parametrize(
    ("problem", "affine", "shortcut"),
    cases([(PROBLEMS[3], True, "residual"), (PROBLEMS[1], False, "none")],
          list(product(PROBLEMS, (False, True), ("none", "residual")))),
    ids=str,
)  # fmt: skip
def test_expand(problem, affine: bool, shortcut: str, device: Device) -> None:
    op.test_expand(*problem, affine, shortcut, device)


@pytest.mark.parametrize(("problem", "stride"), cases([(PROBLEMS[4], 2)], list(product(PROBLEMS, (1, 2)))), ids=str)
def test_dual(problem, stride: int, device: Device) -> None:
    op.test_dual(*problem, stride, device)


@pytest.mark.slow
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shortcut", ["none", "residual", "projection"])
def test_without_mask(shortcut: str, relu: bool, device: Device) -> None:
    op.test_without_mask(shortcut, relu, device)


@pytest.mark.parametrize(("first", "second"), cases([(0.0, 1e4), (1e-30, 0.0)], [(-3.0, -1e-30), (0.0, 0.0)]))
def test_dual_scales(first: float, second: float) -> None:
    op.test_dual_scales(first, second, Device("interpreted"))


@pytest.mark.parametrize("name", COMPILED_TRITON)
def test_nan_passes_the_relu(name: str) -> None:
    op.test_nan_passes_the_relu(Device(name))


@pytest.mark.parametrize(
    ("problem", "masks"), cases([(PROBLEMS[3], True)], list(product(PROBLEMS, (False, True)))), ids=str
)
def test_dgrad(problem, masks: bool, device: Device) -> None:
    op.test_dgrad(*problem, masks, device)


PIXELS = [(7, 9), (8, 5), (1, 6), (2, 2), (3, 1)]


@pytest.mark.parametrize(
    ("pixels", "shortcut", "stride"),
    cases([((7, 9), "add mask", 2)], list(product(PIXELS, ("none", "add", "add mask"), (1, 2, 3)))),
    ids=str,
)
def test_projection_dgrad(pixels: tuple[int, int], shortcut: str, stride: int, device: Device) -> None:
    op.test_projection_dgrad(pixels, shortcut, stride, device)


def test_errors_are_the_twins() -> None:
    interpreted = Device("interpreted")
    given = expand_arguments(X.shape, 16, 40, X.dtype, shortcut="projection", stride=2)
    assert_refused(interpreted, op.ops.expand, given, {"relu": False}, "expand: save_mask is True and relu is False")
    given = dgrad_arguments(X.shape, 16, X.dtype)
    assert_refused(interpreted, op.ops.expand_dgrad, given, {"addend": X}, "expand_dgrad: addend is given with scale")


def test_refuses() -> None:
    interpreted, message = Device("interpreted"), "12 channels are not a multiple of 8"
    assert_refused(interpreted, op.ops.expand, expand_arguments((2, 8, 5, 7), 12, 8, X.dtype), {}, message)
    assert_refused(interpreted, op.ops.expand_dgrad, dgrad_arguments((2, 12, 5, 7), 16, X.dtype), {}, message)
