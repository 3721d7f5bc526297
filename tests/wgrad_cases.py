"""The kernels of conv2d_wgrad, and problems that lead to each: what its tests and those of machine code share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from resnet_fused import plans
from resnet_fused.plans import Plan

OP = "conv2d_wgrad"
SOURCE = "conv2d/conv2d_wgrad.cu"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
TILES = ("64x64x64", "64x64x32", "32x64x32")  # csrc/gemm/wgrad.h, in the order in which a problem counts them from 1
_DU = "u mean coef_dz coef_x coef_1"
# By name, the operands that lead to a kernel. Backward recomputes its ReLU by sign, reads bits or has none.
KERNELS = {
    "conv2d_wgrad": "dy x",
    "conv2d_wgrad_affine": "dy x x_scale x_shift",
    "conv2d_wgrad_backward": f"dy mask {_DU} x",
    "conv2d_wgrad_backward_affine": f"dy scale shift {_DU} x x_scale x_shift",
}
_OF_X = ("x_scale", "x_shift")


def problem(
    shape: tuple[int, int, int, int],
    k: int,
    dtype: torch.dtype,
    kernel=(3, 3),
    stride=1,
    padding=1,
    dilation=1,
    groups=1,
) -> dict[str, Any]:
    """shape: [N, C, H, W]."""
    names = ("N", "C", "H", "W", "K", "R", "S", "groups")
    sizes = dict(zip(names, (*shape, k, *kernel, groups), strict=True))
    two = {"stride": stride, "padding": padding, "dilation": dilation}
    return {"dtype": dtype, **sizes, **{f"{name}_{axis}": v for name, v in two.items() for axis in "hw"}}


def pixels(q: Mapping[str, Any]) -> int:
    """Of dy."""
    p, s = (
        (q[size] + 2 * q[f"padding_{a}"] - q[f"dilation_{a}"] * (q[taps] - 1) - 1) // q[f"stride_{a}"] + 1
        for size, taps, a in (("H", "R", "h"), ("W", "S", "w"))
    )
    return q["N"] * p * s


def tensors(q: Mapping[str, Any], kernel: str) -> dict[str, Tensor]:
    """Random operands, and a result full of NaN."""
    m, k, c = pixels(q), q["K"], q["C"]
    made = {}
    for name in KERNELS[kernel].split():
        if name in ("dy", "u"):
            made[name] = torch.randn(m, k).to(q["dtype"])
        elif name == "x":
            made[name] = torch.randn(q["N"] * q["H"] * q["W"], c).to(q["dtype"])
        elif name == "mask":
            made[name] = torch.randint(-(2**31), 2**31, (-(-k // 32), m), dtype=torch.int32)
        else:
            made[name] = torch.randn(c if name in _OF_X else k)
    made["dw"] = torch.full((k, q["R"] * q["S"] * c // q["groups"]), torch.nan, dtype=q["dtype"])
    return made


def plan(
    q: Mapping[str, Any], kernel: str, tile: int = 0, arch: int = 80, buffers: Mapping[str, Tensor] | None = None
) -> Plan:
    """Without buffers: of tensors that are anywhere."""
    names = [*KERNELS[kernel].split(), "dw"]
    addresses = {name: t.data_ptr() for name, t in buffers.items()} if buffers else dict.fromkeys(names, 4096)
    return plans.plan(OP, {**q, "tile": tile}, arch, addresses)
