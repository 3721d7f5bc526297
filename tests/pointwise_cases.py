"""What the tests of the 1x1 convolutions' ops share: problems, plain PyTorch, and how results are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Observed, assert_agrees
from device import Device
from op_cases import acc_of, activation, bits, ops
from torch import Tensor

HALVES = [torch.bfloat16, torch.float16]
SEEDS = (0, 1)  # of the data and of the order of the warps
DENSE = "expected a dense channels_last tensor"
Arguments = dict[str, Any]


def dtypes(device: Device) -> list[torch.dtype]:
    """The kernels take two, of which Triton's interpreter has one; the CPU all."""
    if device.name == "interpreted":
        return [torch.float16]
    return HALVES if device.name != "cpu" else [*HALVES, torch.float32, torch.float64]


def weight(k: int, c: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(k, c, 1, 1) / c**0.5).to(dtype)


def scale(c: int, dtype: torch.dtype) -> Tensor:
    """Of both signs, around 1."""
    return (torch.rand(c, dtype=acc_of(dtype)) + 0.5) * torch.randn(c, dtype=acc_of(dtype)).sign()


def mask_of(n: int, c: int, h: int, w: int) -> Tensor:
    """Random bits, int32 [ceil(C/32), M]."""
    return ops.relu_mask(activation(n, c, h, w, torch.float32))


def strided(size: int, stride: int) -> int:
    return (size + stride - 1) // stride


def columns(v: Tensor) -> Tensor:
    """A vector [C] over [N, C, H, W]."""
    return v.view(-1, 1, 1)


def activated(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    return x if scale is None else F.relu(columns(scale) * x + columns(shift)).to(x.dtype)


def masked(dy: Tensor, mask: Tensor | None) -> Tensor:
    return dy if mask is None else dy * bits(mask, dy)


def summed(dz: Tensor, u: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dz with its sums over pixels, those of dz and of dz * (u - mean)."""
    wide = dz.to(mean.dtype)
    return dz, wide.sum((0, 2, 3)), (wide * (u - columns(mean))).sum((0, 2, 3))


def gated(dx: Tensor, u: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return dx * (columns(scale) * u + columns(shift) > 0)


BACKWARD = ("dy", "mask", "u", "scale", "shift", "mean", "coef_dz", "coef_x", "coef_1")


def backward(dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1) -> Tensor:
    """What a convolution's backward reads: dy, dy * mask, or with u the gradient of a batch norm's input."""
    dz = masked(dy, mask)
    if u is None:
        return dz
    if scale is not None:
        dz = gated(dz, u, scale, shift)
    return (columns(coef_dz) * dz + columns(coef_x) * (u - columns(mean)) + columns(coef_1)).to(dy.dtype)


def dgrad(dy: Tensor, weight: Tensor, height: int, width: int, stride: int) -> Tensor:
    shape = (dy.shape[0], weight.shape[1], height, width)
    return torch.nn.grad.conv2d_input(shape, weight, dy, stride=stride)


def empty(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=acc_of(like.dtype))


def exact(arguments: Arguments) -> Arguments:
    """The same in float64."""
    return {n: a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for n, a in arguments.items()}


def assert_elements(got: Observed, wanted: Observed, dtype: torch.dtype) -> None:
    """No element is off by more than a few roundings of the largest: a norm would not see a wrong border."""
    eps = {torch.float32: 2e-6, torch.float64: 1e-12}.get(dtype, torch.finfo(dtype).eps)  # long sums have more of them
    for name, want in wanted.items():
        if want.numel():
            error, bound = (got[name].double() - want).abs().max(), 8 * eps * (want.abs().max() + 0.01)
            assert error <= bound, f"{name}: an element is off by {error:.3g}, allowed {bound:.3g}"


def compare(
    device: Device,
    op: Callable[..., Any],
    plain: Callable[..., tuple[Tensor, ...]],
    make: Callable[[torch.dtype], Arguments],
    dtype: torch.dtype,
) -> list[tuple[Arguments, Observed]]:
    """`op` against `plain` in the same dtype and in float64, for arguments that `make` gives; what op returned."""
    draws, results = [], []
    for seed in SEEDS:
        torch.manual_seed(seed)
        arguments = make(dtype)
        got, eager, reference = (
            {str(i): t for i, t in enumerate(r)}
            for r in (
                device.run(lambda a: op(**a), arguments, seed=seed),
                plain(**arguments),
                plain(**exact(arguments)),
            )
        )
        assert_elements(got, reference, dtype)
        draws.append((got, eager, reference))
        results.append((arguments, got))
    assert_agrees(draws, dtype)
    return results


def assert_close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Both [...], in float64 to `tolerance` of the largest."""
    error = (got.double() - wanted).abs().max()
    assert error <= tolerance * wanted.abs().max() + 1e-30, f"off by {error:.3g}, largest {wanted.abs().max():.3g}"


def assert_dense(t: Tensor) -> None:
    """The strides are those of [N, H, W, C], as the fakes say."""
    _, c, h, w = t.shape
    assert t.stride() == (h * w * c, 1, w * c, c)


def assert_refused(
    device: Device, op: Callable[..., Any], arguments: Arguments, changes: Arguments, message: str
) -> None:
    """The call with these changes raises."""
    with pytest.raises(RuntimeError, match=message):
        device.run(lambda a: op(**a), arguments | changes)
