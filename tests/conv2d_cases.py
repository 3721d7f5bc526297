"""k x k convolutions: problems, arguments, and plain PyTorch of their ops, for every test of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from op_cases import activation, nhwc, vector
from pointwise_cases import (
    BACKWARD,
    Arguments,
    activated,
    backward,
    columns,
    empty,
    gated,
    mask_of,
    masked,
    scale,
    summed,
)
from torch import Tensor
from torch.nn import functional as F

from resnet_fused import plans


class Geometry(NamedTuple):
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def numbers(self) -> list[int]:
        """As the ops take it."""
        return [self.stride, self.stride, *self.padding, *self.dilation, self.groups]

    def __str__(self) -> str:
        return (
            f"{self.kernel[0]}x{self.kernel[1]}/{self.stride} pad {self.padding[0]},{self.padding[1]} "
            f"dil {self.dilation[0]},{self.dilation[1]} groups {self.groups}"
        )


class Problem(NamedTuple):
    N: int
    C: int
    H: int
    W: int
    K: int
    geometry: Geometry

    def __str__(self) -> str:
        return f"{self.N}x{self.C}x{self.H}x{self.W}->{self.K} {self.geometry}"


# Pixels that fill no tile, images smaller than a kernel, channels that fill no slice and no tile or several.
PROBLEMS = [
    Problem(1, 8, 1, 1, 8, Geometry()),
    Problem(3, 24, 7, 9, 40, Geometry()),
    Problem(2, 40, 9, 12, 72, Geometry()),
    Problem(2, 72, 13, 11, 40, Geometry(stride=2)),
    Problem(5, 8, 3, 2, 136, Geometry()),
    Problem(1, 136, 17, 20, 136, Geometry()),
    Problem(2, 40, 16, 15, 24, Geometry(stride=2)),
]
# Groups of as many channels as a slice, as fewer, and as more; as many in as out, or not.
GROUPED = [
    Problem(2, 64, 9, 7, 64, Geometry(groups=8)),
    Problem(2, 96, 7, 5, 192, Geometry(groups=12)),
    Problem(3, 128, 6, 5, 64, Geometry(stride=2, groups=4)),
    Problem(1, 80, 5, 7, 144, Geometry((5, 3), 1, (2, 1), groups=2)),
    Problem(2, 192, 4, 6, 192, Geometry(groups=6)),
]
# All with 40 channels in and 72 out, images of 13 x 11.
GEOMETRIES = [
    Geometry((1, 3), 1, (0, 1)),
    Geometry((3, 1), 2, (1, 0)),
    Geometry((3, 3), 1, (0, 0)),
    Geometry((3, 3), 1, (2, 2), (2, 2)),
    Geometry((3, 3), 2, (2, 1), (2, 1)),
    Geometry((3, 2), 1, (3, 4)),
    Geometry((2, 2), 2, (0, 0)),
    Geometry((1, 1), 2, (0, 0)),
    Geometry((1, 1), 1, (1, 1)),
    Geometry((5, 5), 1, (2, 2)),
    Geometry((5, 5), 2, (2, 2)),
    Geometry((7, 7), 2, (3, 3)),
    Geometry((7, 4), 1, (3, 0)),
    Geometry((11, 9), 1, (5, 4)),
]


def out_shape(p: Problem) -> tuple[int, int, int, int]:
    g = p.geometry
    rows, cols = (
        (size + 2 * pad - dil * (taps - 1) - 1) // g.stride + 1
        for size, taps, pad, dil in zip((p.H, p.W), g.kernel, g.padding, g.dilation, strict=True)
    )
    return p.N, p.K, rows, cols


def kernel(k: int, c: int, size: tuple[int, int], groups: int, dtype: torch.dtype) -> Tensor:
    """[K, C / groups, R, S] with memory KRSC, of outputs around 1."""
    return nhwc((torch.randn(k, c // groups, *size) / math.sqrt(c // groups * math.prod(size))).to(dtype))


# ------------------------------------------------------------------------------------------------ plain PyTorch


def convolved(x: Tensor, weight: Tensor, geometry: list[int]) -> Tensor:
    return F.conv2d(x, weight, None, geometry[:2], geometry[2:4], geometry[4:6], geometry[6])


def conv2d(x, weight, scale, shift, geometry, stats) -> tuple[Tensor, ...]:
    out = convolved(activated(x, scale, shift), weight, geometry)
    if not stats:
        return out, empty(x), empty(x)
    wide = out.to(empty(x).dtype)
    return out, wide.mean((0, 2, 3)), wide.var((0, 2, 3), unbiased=False)


def conv2d_bn_act(
    x, weight, scale, shift, geometry, out_scale, out_shift, residual, relu, save_mask
) -> tuple[Tensor, ...]:
    z = columns(out_scale) * convolved(activated(x, scale, shift), weight, geometry) + columns(out_shift)
    z = z if residual is None else z + residual
    return ((F.relu(z) if relu else z).to(x.dtype),)


def conv2d_dgrad(
    weight, height, width, geometry, addend, addend_mask, gate_u, gate_scale, gate_shift, gate_mean, **prologue
) -> tuple[Tensor, ...]:
    du = backward(**prologue)
    shape = (du.shape[0], weight.shape[1] * geometry[6], height, width)
    dx = torch.nn.grad.conv2d_input(
        shape, weight, du, geometry[:2], geometry[2:4], geometry[4:6], geometry[6]
    )  # fmt: skip
    if gate_u is not None:
        return summed(gated(dx, gate_u, gate_scale, gate_shift), gate_u, gate_mean)
    if addend is not None:
        dx = dx + masked(addend, addend_mask)
    return dx, empty(dx), empty(dx)


# ---------------------------------------------------------------------------------------------------- arguments


def forward_arguments(p: Problem, dtype: torch.dtype, affine: bool = True, stats: bool = True) -> Arguments:
    g = p.geometry
    return {
        "x": activation(p.N, p.C, p.H, p.W, dtype),
        "weight": kernel(p.K, p.C, g.kernel, g.groups, dtype),
        "scale": scale(p.C, dtype) if affine else None,
        "shift": vector(p.C, dtype) if affine else None,
        "geometry": g.numbers,
        "stats": stats,
    }


def bn_act_arguments(
    p: Problem, dtype: torch.dtype, residual: bool = True, relu: bool = True, affine: bool = True
) -> Arguments:
    given = forward_arguments(p, dtype, affine)
    del given["stats"]
    return given | {
        "out_scale": scale(p.K, dtype),
        "out_shift": vector(p.K, dtype),
        "residual": activation(*out_shape(p), dtype) if residual else None,
        "relu": relu,
        "save_mask": relu,
    }


def backward_arguments(p: Problem, dtype: torch.dtype, prologue: str) -> Arguments:
    """prologue: "none", "bn" (the batch norm's backward), "bn mask" or "bn gate"."""
    out = out_shape(p)
    given: Arguments = dict.fromkeys(BACKWARD) | {"dy": activation(*out, dtype)}
    if prologue == "bn mask":
        given["mask"] = mask_of(*out)
    if prologue.startswith("bn"):
        given |= {name: vector(p.K, dtype) for name in ("mean", "coef_dz", "coef_x", "coef_1")}
        given["u"] = activation(*out, dtype)
    if prologue == "bn gate":
        given |= {"scale": scale(p.K, dtype), "shift": vector(p.K, dtype)}
    return given


def dgrad_arguments(p: Problem, dtype: torch.dtype, prologue: str = "bn gate", end: str = "gate") -> Arguments:
    """end: "none", "add", "add mask" or "gate"."""
    shape, g = (p.N, p.C, p.H, p.W), p.geometry
    names = ("addend", "addend_mask", "gate_u", "gate_scale", "gate_shift", "gate_mean")
    given = backward_arguments(p, dtype, prologue) | dict.fromkeys(names)
    given |= {"weight": kernel(p.K, p.C, g.kernel, g.groups, dtype), "height": p.H, "width": p.W}
    if end.startswith("add"):
        given["addend"] = activation(*shape, dtype)
    if end == "add mask":
        given["addend_mask"] = mask_of(*shape)
    if end == "gate":
        given |= {"gate_u": activation(*shape, dtype), "gate_scale": scale(p.C, dtype)}
        given |= {"gate_shift": vector(p.C, dtype), "gate_mean": vector(p.C, dtype)}
    return given | {"geometry": g.numbers}


# ------------------------------------------------------------------------------------------------------- plans

TILES = ("256x128x32", "256x64x32", "128x64x32")  # in the order of a problem's `tile`
BACKWARD_BUFFERS = ("u", "mask", "mean", "coef_dz", "coef_x", "coef_1")
KERNELS = {  # name: (op, stride, what its problem has beside the sizes)
    "conv2d_fprop": ("conv2d", 1, ("scale", "shift", "mean", "var")),
    "conv2d_fprop_strided": ("conv2d", 2, ("scale", "shift", "mean", "var")),
    "conv2d_bn_act": ("conv2d_bn_act", 1, ("scale", "shift", "residual", "mask")),
    "conv2d_bn_act_strided": ("conv2d_bn_act", 2, ("scale", "shift", "residual", "mask")),
    "conv2d_dgrad_add": ("conv2d_dgrad", 1, (*BACKWARD_BUFFERS, "addend")),
    "conv2d_dgrad_gate": ("conv2d_dgrad", 2, (*BACKWARD_BUFFERS, "gate_u")),
}


def plan(name: str, dtype: torch.dtype, tile: int = 0, arch: int = 80, n: int = 8, side: int = 28) -> plans.Plan:
    """Of a 3x3 convolution; buffers are anywhere. With a stride the large tiles hold the halo of one slice only."""
    op, stride, buffers = KERNELS[name]
    sizes = {
        "N": n,
        "H": side,
        "W": side,
        "C": 128 if stride == 1 else 32,
        "K": 128,
        "R": 3,
        "S": 3,
        "groups": 1,
        "dtype": dtype,
        "tile": tile,
    }
    sizes |= {f"{field}_{axis}": value for field, value in (("stride", stride), ("padding", 1), ("dilation", 1))
              for axis in "hw"}  # fmt: skip
    return plans.plan(op, sizes, arch, dict.fromkeys(buffers, 4096))


def all_steps() -> Iterator[plans.Step]:
    for name in KERNELS:
        for dtype in (torch.bfloat16, torch.float16):
            for tile in range(1, len(TILES) + 1):
                yield from plan(name, dtype, tile).steps
