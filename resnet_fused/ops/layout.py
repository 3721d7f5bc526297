"""Layouts: every activation inside the package is a dense NHWC ("channels_last") tensor."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def nhwc_strides(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Strides of a dense NHWC tensor of logical shape [N, C, H, W], exact also where a size is 1."""
    _, c, h, w = shape
    return (h * w * c, 1, w * c, c)


def to_nhwc(x: Tensor) -> Tensor:
    """`x` [N, C, H, W] with exact NHWC strides: `x` itself, a restrided view of it, or a copy."""
    strides = nhwc_strides(x.shape)
    if x.stride() == strides:
        return x
    x = x.contiguous(memory_format=torch.channels_last)
    # Strides along size-1 dims are free, and PyTorch leaves them as they came: make them exact.
    return x if x.stride() == strides else x.as_strided(x.shape, strides)


def empty_nhwc(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised NHWC tensor of `shape` on the device of `like`."""
    return like.new_empty_strided(shape, nhwc_strides(shape), dtype=dtype)


def laid_out_as(t: Tensor, like: Tensor) -> Tensor:
    """`t` with the dtype and strides of torch.empty_like(like), as a fake predicts it, or as DDP wants a gradient."""
    same = all(a == b or n == 1 for a, b, n in zip(t.stride(), like.stride(), t.shape, strict=True))
    if not same or t.dtype != like.dtype:
        return torch.empty_like(like).copy_(t)
    return t if t.stride() == like.stride() else t.as_strided(like.shape, like.stride())  # along sizes of 1


def pixels_of(u: Tensor) -> int:
    """How many each channel of u [N, C, H, W] has."""
    return u.numel() // u.shape[1]


class Padded(NamedTuple):
    """A shortcut without parameters: every stride-th pixel, and channels of zeros around those of x.

    Pixel (i, j) and channel c of the result are pixel `(i*stride, j*stride)` and channel `c - before` of x:
    [N, C, H, W] of any dtype -> [N, K, ceil(H/stride), ceil(W/stride)]. Source: He et al. (2015), option A.
    """

    stride: int = 1
    before: int = 0  # channels of zeros in front of x's; the others come behind

    def __call__(self, x: Tensor, channels: int) -> Tensor:
        """[N, C, H, W] -> [N, channels, ceil(H/stride), ceil(W/stride)]."""
        behind = channels - self.before - x.shape[1]
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, behind))

    def shape(self, x_shape: tuple[int, ...], channels: int) -> tuple[int, ...]:
        """That of the result."""
        n, _, h, w = x_shape
        return (n, channels, -(-h // self.stride), -(-w // self.stride))

    def adjoint(self, dy: Tensor, dx: Tensor, alpha: float = 1.0) -> Tensor:
        """Adds to dx [N, C, H, W] what the gradient dy of the result makes of it, in place; returns it."""
        own = dy[:, self.before : self.before + dx.shape[1]]
        dx[:, :, :: self.stride, :: self.stride].add_(own, alpha=alpha)
        return dx


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of statistics, scales and sums: float64 for float64 activations, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def mask_shape(c: int, m: int) -> tuple[int, int]:
    """Shape of the int32 bit panels that hold relu' of an [M, C] activation: [ceil(C/32), M]."""
    return ((c + 31) // 32, m)


def autocast_type(x: Tensor) -> str:
    """The device type by which autocast knows x: on the meta device, which it does not know, the CPU's."""
    return "cpu" if x.is_meta else x.device.type
