"""The Triton kernel of gram: the tests of the op, interpreted and as PTX."""

from __future__ import annotations

from itertools import product

import pytest
import test_gram as op
import torch
from device import Device
from test_gram import SHAPES
from triton_cases import cases
from triton_cases import device as device  # a fixture


@pytest.mark.parametrize(
    ("shape", "affine", "stride"),
    cases(
        [(SHAPES[0], False, 1), (SHAPES[3], True, 1), (SHAPES[2], False, 2)],
        list(product(SHAPES, (False, True), (1, 2))),
    ),
    ids=str,
)
def test_gram(shape: tuple[int, ...], affine: bool, stride: int, device: Device) -> None:
    op.test_gram(shape, affine, stride, device)


@pytest.mark.parametrize(("dtype", "ratio"), [(torch.bfloat16, 64), (torch.float16, 1000)])
def test_means_far_from_zero(dtype: torch.dtype, ratio: int) -> None:
    op.test_means_far_from_zero(dtype, ratio, Device("triton-sm_80"))


@pytest.mark.parametrize(("shape", "message"), [((2, 12, 5, 7), "12 channels are not"), ((0, 8, 5, 7), "no pixels")])
def test_refuses(shape: tuple[int, ...], message: str) -> None:
    given = op.arguments(shape, torch.float16)
    op.assert_refused(Device("interpreted"), op.ops.gram, given, {}, "gram: " + message)
