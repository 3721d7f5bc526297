"""conv2d_wgrad on every device: any kernel, stride, padding, dilation and groups, by the tolerance rule and each element."""

from __future__ import annotations

import pytest
import torch
from device import Device
from op_cases import activation, ops, vector
from pointwise_cases import Arguments, activated, assert_refused, compare, dtypes, mask_of, scale
from test_conv1x1 import BACKWARD, backward
from torch import Tensor

# [N, C, H, W], K, kernel, and the geometry: stride, padding, dilation (two each), groups.
Problem = tuple[tuple[int, int, int, int], int, tuple[int, int], list[int]]


def problem(shape, k: int, kernel=(3, 3), stride=1, padding=None, dilation=1, groups=1) -> Problem:
    """Integers stand for both directions; the default padding keeps the size at stride 1."""
    two = [(v, v) if isinstance(v, int) else v for v in (stride, dilation)]
    if padding is None:
        padding = tuple((size - 1) * d // 2 for size, d in zip(kernel, two[1], strict=True))
    padding = (padding, padding) if isinstance(padding, int) else padding
    return shape, k, kernel, [*two[0], *padding, *two[1], groups]


# Pixels that fill no stage, channels that fill no tile, several tiles and splits; then every geometry.
PROBLEMS = [
    problem((1, 8, 1, 1), 8),
    problem((3, 24, 7, 9), 40),
    problem((2, 72, 13, 11), 136),
    problem((5, 40, 11, 13), 72),
    problem((1, 136, 31, 19), 8),
]
GEOMETRIES = [
    problem((2, 24, 9, 7), 40, padding=0),
    problem((2, 24, 1, 1), 8, padding=2),
    problem((2, 24, 2, 5), 8, padding=(3, 2)),
    problem((3, 40, 8, 8), 24, padding=4),
    problem((2, 24, 13, 11), 40, dilation=2),
    problem((2, 24, 13, 11), 40, dilation=(3, 2), padding=(1, 4)),
    problem((3, 24, 13, 11), 40, stride=2),
    problem((3, 72, 14, 16), 40, stride=2),
    problem((2, 24, 9, 12), 16, stride=2, padding=0),
    problem((2, 24, 9, 12), 16, stride=2, dilation=2),
    problem((2, 24, 13, 11), 16, stride=(1, 2)),
    problem((2, 24, 13, 11), 16, stride=(3, 2), padding=(0, 3)),
    problem((2, 24, 7, 9), 40, (1, 3)),
    problem((2, 24, 7, 9), 40, (3, 1)),
    problem((2, 24, 7, 9), 40, (2, 2), padding=1),
    problem((2, 24, 7, 9), 40, (1, 1), padding=1),
    problem((2, 24, 9, 13), 16, (5, 5)),
    problem((2, 24, 9, 13), 16, (5, 5), stride=2),
    problem((2, 24, 8, 10), 16, (7, 7)),
    problem((1, 8, 15, 13), 8, (7, 7), stride=2),
    problem((2, 24, 8, 10), 16, (1, 7)),
    problem((1, 8, 12, 3), 8, (11, 2)),
    problem((2, 16, 9, 7), 16, groups=2),
    problem((2, 96, 9, 7), 192, groups=2),
    problem((2, 128, 9, 7), 128, groups=8),
    problem((2, 72, 9, 7), 96, groups=3),
    problem((2, 160, 7, 5), 80, stride=2, groups=5),
    problem((1, 144, 7, 5), 288, groups=2),
]
PROLOGUES = ["none", "bn", "bn mask", "bn gate"]
TILES = 3


def name(p: Problem) -> str:
    shape, k, kernel, geometry = p
    return "-".join("x".join(map(str, numbers)) for numbers in (shape, [k], kernel, geometry))


def conv2d_wgrad(x, x_scale, x_shift, kernel_size, geometry, **prologue) -> tuple[Tensor, ...]:
    du, a = backward(**prologue), activated(x, x_scale, x_shift)
    stride, padding, dilation, groups = geometry[:2], geometry[2:4], geometry[4:6], geometry[6]
    weight = a.new_empty(du.shape[1], a.shape[1] // groups, *kernel_size)  # only its shape is read
    given = (stride, padding, dilation, False, (0, 0), groups, (False, True, False))
    return (torch.ops.aten.convolution_backward(du, a, weight, None, *given)[1],)


def op(**given) -> tuple[Tensor]:
    return (ops.conv2d_wgrad(**given),)


def arguments(p: Problem, dtype: torch.dtype, prologue: str = "bn gate", affine: bool = True) -> Arguments:
    """prologue: "none", "bn" (the batch norm's backward), "bn mask" or "bn gate"."""
    shape, k, kernel, g = p
    n, c, *size = shape
    out = [(h + 2 * g[2 + i] - g[4 + i] * (kernel[i] - 1) - 1) // g[i] + 1 for i, h in enumerate(size)]
    given: Arguments = dict.fromkeys(BACKWARD) | {"dy": activation(n, k, *out, dtype)}
    if prologue.endswith("mask"):
        given["mask"] = mask_of(n, k, *out)
    if prologue.startswith("bn"):
        given |= {v: vector(k, dtype) for v in ("mean", "coef_dz", "coef_x", "coef_1")}
        given["u"] = activation(n, k, *out, dtype)
    if prologue == "bn gate":
        given |= {"scale": scale(k, dtype), "shift": vector(k, dtype)}
    given |= {"x": activation(*shape, dtype), "x_scale": None, "x_shift": None}
    if affine:
        given |= {"x_scale": scale(c, dtype), "x_shift": vector(c, dtype)}
    return given | {"kernel_size": list(kernel), "geometry": g}


def check(device: Device, p: Problem, prologue: str, affine: bool) -> None:
    for dtype in dtypes(device):
        for _, got in compare(device, op, conv2d_wgrad, lambda t: arguments(p, t, prologue, affine), dtype):
            assert got["0"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("prologue", PROLOGUES)
@pytest.mark.parametrize("p", PROBLEMS, ids=name)
def test_wgrad(p: Problem, prologue: str, affine: bool, device: Device) -> None:
    check(device, p, prologue, affine)


@pytest.mark.parametrize("p", GEOMETRIES, ids=name)
def test_every_geometry(p: Problem, device: Device) -> None:
    check(device, p, "none", False)
    check(device, p, "bn mask", True)
