"""What the op-level tests share: inputs, float64 views, bit panels, error bounds and instruction sets."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import resnet_fused._C

ops = torch.ops.resnet_fused

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CHANNELS = [1, 3, 8, 16, 31, 32, 33, 64, 100, 256]
SIZES = ["no pixel", "one pixel", "a few", "several chunks"]

_library = ctypes.CDLL(resnet_fused._C.__file__)


def isas() -> range:
    """The instruction sets that this machine can run, 0 being the baseline."""
    return range(_library.resnet_fused_limit_isa(99) + 1)


@contextmanager
def isa(level: int) -> Iterator[None]:
    """Runs the kernels of one instruction set."""
    assert _library.resnet_fused_limit_isa(level) == level
    try:
        yield
    finally:
        _library.resnet_fused_limit_isa(99)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def acc_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def nhwc(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def activation(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> Tensor:
    return nhwc(torch.randn(n, c, h, w).to(dtype))


def sized(size: str, c: int, dtype: torch.dtype) -> Tensor:
    """An activation of one of the SIZES; a chunk of the CPU kernels has about 32768 elements."""
    shapes = {
        "no pixel": (0, 5, 4),
        "one pixel": (1, 1, 1),
        "a few": (3, 7, 5),
        "several chunks": (2, 45_000 // c // 7 + 1, 7),
    }
    n, h, w = shapes[size]
    return activation(n, c, h, w, dtype)


def vector(c: int, dtype: torch.dtype) -> Tensor:
    """A per-channel vector for activations of this dtype."""
    return torch.randn(c, dtype=acc_of(dtype))


def wide(v: Tensor) -> Tensor:
    """A per-channel vector in float64, to be broadcast over [N, C, H, W]."""
    return v.double().view(1, -1, 1, 1)


def bits(mask: Tensor, like: Tensor) -> Tensor:
    """A mask [ceil(C/32), M] as booleans [N, C, H, W]; its unused high bits must be 0."""
    n, c, h, w = like.shape
    panels, m = mask.shape
    assert (panels, m, mask.dtype) == ((c + 31) // 32, n * h * w, torch.int32)
    planes = (mask.unsqueeze(1) >> torch.arange(32, dtype=torch.int32).view(1, 32, 1)) & 1  # [panels, 32, M]
    planes = planes.reshape(panels * 32, m)
    assert not planes[c:].any(), "unused bits are set"
    return planes[:c].reshape(c, n, h, w).permute(1, 0, 2, 3).bool()


def assert_rounded(got: Tensor, exact: Tensor, magnitude: Tensor | float) -> None:
    """`got` is `exact` (float64) rounded once to got's dtype, but for a few roundings of terms of that magnitude."""
    info = torch.finfo(got.dtype)
    bound = 0.501 * info.eps * exact.abs() + 0.501 * info.tiny * info.eps
    bound = bound + 4 * torch.finfo(acc_of(got.dtype)).eps * magnitude
    error = (got.double() - exact).abs()
    assert (error <= bound).all(), (
        f"error {error.max().item():.3g}, past the bound by {(error - bound).max().item():.3g}"
    )


def assert_sum(got: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    """`got` [C] is a sum whose terms' absolute values sum to `magnitude`."""
    error = (got.double() - exact).abs()
    bound = 32 * torch.finfo(got.dtype).eps * magnitude + 1e-30
    assert (error <= bound).all(), f"error {error.max().item():.3g} where {bound[error.argmax()].item():.3g} is allowed"


def assert_bits(mask: Tensor, z: Tensor, magnitude: Tensor, dtype: torch.dtype) -> None:
    """The mask is z > 0, wherever rounding cannot have changed the sign of z (float64)."""
    sure = z.abs() > 4 * torch.finfo(acc_of(dtype)).eps * magnitude
    assert ((bits(mask, z) == (z > 0)) | ~sure).all()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, NaNs and the signs of zeros included."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
    )
