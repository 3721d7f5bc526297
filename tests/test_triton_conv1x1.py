"""The Triton kernels of conv1x1, conv1x1_dgrad and conv1x1_wgrad: the tests of the ops, interpreted and as PTX."""

from __future__ import annotations

from itertools import product

import pytest
import test_conv1x1 as op
import torch
from device import COMPILED_TRITON, Device
from pointwise_cases import Arguments, assert_refused, compare, dtypes
from test_conv1x1 import PROBLEMS, dgrad_arguments, forward_arguments, wgrad_arguments
from triton_cases import cases
from triton_cases import device as device  # a fixture
from triton_launchers import ByTriton, interpreted


@pytest.mark.parametrize(
    ("problem", "affine", "stride"),
    cases(
        [(PROBLEMS[0], False, 1), (PROBLEMS[1], True, 2), (PROBLEMS[3], True, 1)],
        list(product(PROBLEMS, (False, True), (1, 2))),
    ),
    ids=str,
)
def test_fprop(problem, affine: bool, stride: int, device: Device) -> None:
    op.test_fprop(*problem, affine, stride, device)


@pytest.mark.parametrize(("dtype", "ratio"), [(torch.bfloat16, 64), (torch.float16, 1000)])
def test_statistics_far_from_zero(dtype: torch.dtype, ratio: int) -> None:
    op.test_statistics_far_from_zero(dtype, ratio, (31, 17), Device("triton-sm_80"))


@pytest.mark.parametrize("name", COMPILED_TRITON)
def test_nan_passes_the_prologue(name: str) -> None:
    op.test_nan_passes_the_prologue(Device(name))


ENDS = [("none", "add mask"), ("bn mask", "add"), ("bn gate", "gate")]


@pytest.mark.parametrize(
    ("prologue", "end"),
    cases(ENDS, list(product(("none", "bn", "bn mask", "bn gate"), ("none", "add", "add mask", "gate")))),
)
def test_dgrad(prologue: str, end: str, device: Device) -> None:
    op.test_dgrad(*PROBLEMS[3], prologue, end, device)


@pytest.mark.slow
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_dgrad_of_every_problem(problem, device: Device) -> None:
    op.test_dgrad_of_every_problem(*problem, device)


PIXELS = [(7, 9), (8, 5), (1, 6), (2, 2), (3, 1)]


@pytest.mark.parametrize(
    ("pixels", "end", "stride"),
    cases([((7, 9), "add mask", 2)], list(product(PIXELS, ("none", "add", "add mask"), (2, 3)))),
    ids=str,
)
def test_strided_dgrad_fills_what_lies_between(pixels, end: str, stride: int, device: Device) -> None:
    op.test_strided_dgrad_fills_what_lies_between(pixels, end, stride, device)


def test_padded_addend(device: Device) -> None:
    """An addend that is the gradient of what a padded shortcut makes of x, with its mask and a scale."""

    def make(dtype: torch.dtype) -> Arguments:
        given = dgrad_arguments((2, 24, 7, 9), 40, dtype, "none", 1, "none")
        given["addend"] = op.activation(2, 40, 4, 5, dtype)
        given["addend_mask"] = op.mask_of(2, 40, 4, 5)
        return given | {"addend_scale": 0.5, "addend_stride": 2, "addend_offset": 8}

    def plain(addend, addend_mask, addend_scale, addend_stride, addend_offset, **given) -> tuple[torch.Tensor, ...]:
        dx, *sums = op.conv1x1_dgrad(addend=None, addend_mask=None, **given)
        own = op.masked(addend, addend_mask)[:, addend_offset : addend_offset + dx.shape[1]]
        dx = dx.clone()
        dx[:, :, ::addend_stride, ::addend_stride] += addend_scale * own
        return dx, *sums

    for dtype in dtypes(device):
        compare(device, op.ops.conv1x1_dgrad, plain, make, dtype)


WGRADS = [(PROBLEMS[3], "bn gate", "affine"), (PROBLEMS[1], "bn mask", "strided")]


@pytest.mark.parametrize(
    ("problem", "prologue", "operand"),
    cases(
        WGRADS,
        list(product(PROBLEMS[1:4], ("none", "mask", "bn", "bn mask", "bn gate"), ("plain", "affine", "strided"))),
    ),
    ids=str,
)
def test_wgrad(problem, prologue: str, operand: str, device: Device) -> None:
    op.test_wgrad(*problem, prologue, operand, device)


@pytest.mark.parametrize(
    ("problem", "operand", "masks"),
    cases([(PROBLEMS[4], "affine", True)], list(product(PROBLEMS, ("plain", "affine", "strided"), (False, True)))),
    ids=str,
)
def test_wide_wgrad_and_sums(problem, operand: str, masks: bool, device: Device) -> None:
    op.test_wide_wgrad_and_sums(*problem, operand, masks, device)


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        (op.ops.conv1x1, forward_arguments((2, 12, 5, 7), 16, torch.float16)),
        (op.ops.conv1x1_dgrad, dgrad_arguments((2, 16, 5, 7), 12, torch.float16)),
        (op.ops.conv1x1_wgrad, wgrad_arguments((2, 12, 5, 7), 16, torch.float16)),
    ],
    ids=["fprop", "dgrad", "wgrad"],
)
def test_other_channels_are_refused(call, arguments: Arguments) -> None:
    with interpreted(), ByTriton(), pytest.raises(RuntimeError, match="12 channels are not a multiple of 8"):
        call(**arguments)


def test_errors_are_the_twins(device: Device) -> None:
    arguments = forward_arguments((2, 8, 5, 7), 16, torch.float16)
    assert_refused(device, op.ops.conv1x1, arguments, {"scale": None}, "conv1x1: shift is given without scale")
    assert_refused(device, op.ops.conv1x1, arguments, {"stride": 0}, "conv1x1: stride is 0, expected at least 1")
