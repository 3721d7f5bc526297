"""The Triton kernels of conv2d, conv2d_bn_act, conv2d_dgrad and conv2d_wgrad: interpreted and as PTX."""

from __future__ import annotations

from itertools import product

import pytest
import test_conv2d as op
import test_conv2d_wgrad as wgrad
import torch
from conv2d_cases import GEOMETRIES, GROUPED, PROBLEMS, Geometry, Problem, forward_arguments
from device import COMPILED_TRITON, Device
from pointwise_cases import assert_refused
from triton_cases import cases, others
from triton_cases import device as device  # a fixture

# Stride 2 with a dilation of 2: a phase has all taps, the others none.
DILATED = GEOMETRIES[4]


@pytest.mark.parametrize(
    ("problem", "affine"),
    cases([(PROBLEMS[1], True), (PROBLEMS[3], True)], list(product(PROBLEMS, (False, True)))),
    ids=str,
)
def test_fprop(problem: Problem, affine: bool, device: Device) -> None:
    op.test_fprop(problem, affine, device)


@pytest.mark.slow
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_fprop_of_every_geometry(geometry: Geometry, device: Device) -> None:
    op.test_fprop_of_every_geometry(geometry, device)


@pytest.mark.parametrize("problem", [GROUPED[1], *others(GROUPED, GROUPED[1])], ids=str)
def test_groups(problem: Problem, device: Device) -> None:
    op.test_groups(problem, device)


@pytest.mark.parametrize(
    ("problem", "residual", "relu"),
    cases([(PROBLEMS[2], True, True)], list(product(PROBLEMS[1:4], (False, True), (False, True)))),
    ids=str,
)
def test_bn_act(problem: Problem, residual: bool, relu: bool, device: Device) -> None:
    op.test_bn_act(problem, residual, relu, device)


@pytest.mark.parametrize("name", COMPILED_TRITON)
def test_padding_stays_zero_after_the_activation(name: str) -> None:
    op.test_padding_stays_zero_after_the_activation(Device(name))


@pytest.mark.parametrize("name", COMPILED_TRITON)
def test_nan_reaches_the_outputs_around_it_alone(name: str) -> None:
    op.test_nan_reaches_the_outputs_around_it_alone(Device(name))


@pytest.mark.parametrize(
    ("prologue", "end"),
    cases(
        [("bn mask", "gate")],
        list(product(("none", "bn", "bn mask", "bn gate"), ("none", "add", "add mask", "gate"))),
    ),
)
def test_dgrad(prologue: str, end: str, device: Device) -> None:
    op.test_dgrad(PROBLEMS[3], prologue, end, device)


@pytest.mark.slow
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_dgrad_of_every_problem(problem: Problem, device: Device) -> None:
    op.test_dgrad_of_every_problem(problem, device)


@pytest.mark.parametrize("geometry", [DILATED, *others(GEOMETRIES, DILATED)], ids=str)
def test_dgrad_of_every_geometry(geometry: Geometry, device: Device) -> None:
    op.test_dgrad_of_every_geometry(geometry, device)


@pytest.mark.parametrize("name", COMPILED_TRITON)
def test_dgrad_of_pixels_that_nothing_reads(name: str) -> None:
    """Fewer channels than a step has: what a phase without taps loads would lie behind the weights."""
    problem = Problem(2, 8, 5, 4, 8, Geometry((1, 1), 2, (0, 0)))
    op.test_dgrad_of_every_problem(problem, Device(name))


WGRADS = [(wgrad.PROBLEMS[1], "bn gate", True), (wgrad.GEOMETRIES[22], "bn mask", True)]


@pytest.mark.parametrize(
    ("problem", "prologue", "affine"),
    cases(
        WGRADS,
        [
            *product(wgrad.PROBLEMS, wgrad.PROLOGUES, (False, True)),
            *product(wgrad.GEOMETRIES, ("none",), (False,)),
            *product(wgrad.GEOMETRIES, ("bn mask",), (True,)),
        ],
    ),
    ids=lambda value: wgrad.name(value) if isinstance(value, tuple) else str(value),
)
def test_wgrad(problem: wgrad.Problem, prologue: str, affine: bool, device: Device) -> None:
    wgrad.check(device, problem, prologue, affine)


def test_groups_of_few_channels_are_refused() -> None:
    problem = Problem(2, 24, 5, 7, 24, Geometry(groups=6))
    given = forward_arguments(problem, torch.float16)
    assert_refused(Device("interpreted"), op.ops.conv2d, given, {}, "conv2d: 4 channels are not a multiple of 8")
