"""Convolutions through ATen: oneDNN on the CPU, cuDNN on a GPU.

Only dense NHWC activations come in and go out; weights are [K, C/groups, R, S].
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import acc_dtype, to_nhwc

_aten = torch.ops.aten
_onednn = torch.ops.mkldnn


class Geometry(NamedTuple):
    """How a convolution walks over its input."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def out_shape(self, x_shape, weight_shape) -> tuple[int, int, int, int]:
        """[N, K, P, Q] of the output for an input [N, C, H, W] and a weight [K, C/groups, R, S]."""
        n, _, h, w = x_shape
        k, _, r, s = weight_shape
        p, q = (
            (size + 2 * pad - dil * (taps - 1) - 1) // stride + 1
            for size, taps, stride, pad, dil in zip(
                (h, w), (r, s), self.stride, self.padding, self.dilation, strict=True
            )
        )
        return (n, k, p, q)


POINTWISE = Geometry((1, 1), (0, 0), (1, 1), 1)


def conv(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """fprop: [N, C, H, W] * [K, C/groups, R, S] -> [N, K, P, Q]."""
    stride, padding, dilation, groups = geometry
    return to_nhwc(_aten.convolution(x, weight, None, stride, padding, dilation, False, (0, 0), groups))


def conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor]:
    """dgrad and wgrad of `conv`: (dx like x, dweight like weight), each empty [0] where it is not needed."""
    empty = dy.new_empty(0)
    if not (need_dx or need_dw):
        return empty, empty
    if need_dw and _wgrad_overruns(x, weight, geometry):
        dx, _ = conv_backward(dy, x, weight, geometry, need_dx, False)
        read = to_nhwc(x[:, :, :: geometry.stride[0], :: geometry.stride[1]])
        return dx, conv_backward(dy, read, weight, POINTWISE._replace(groups=geometry.groups), False, True)[1]
    if need_dw and _wgrad_leaves_out(x, weight, geometry):
        dx, _ = conv_backward(dy, x, weight, geometry, need_dx, False)
        dy, x, wide = (t.to(torch.float32) for t in (dy, x, weight))
        return dx, conv_backward(dy, x, wide, geometry, False, True)[1].to(weight.dtype)
    stride, padding, dilation, groups = geometry
    dx, dw, _ = _aten.convolution_backward(
        dy, x, weight, None, stride, padding, dilation, False, (0, 0), groups, (need_dx, need_dw, False)
    )
    return (to_nhwc(dx) if need_dx else empty), (dw if need_dw else empty)


def _wgrad_overruns(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether oneDNN's wgrad might write past the end of its workspace: on one thread, with AVX2 and fewer than eight
    channels, that of a strided 1x1 convolution does (torch 2.14)."""
    pointwise = tuple(weight.shape[2:]) == (1, 1) and geometry.padding == (0, 0)
    return x.device.type == "cpu" and pointwise and geometry.stride != (1, 1) and weight.shape[1] < 8


def _wgrad_leaves_out(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether oneDNN's wgrad in 16 bits might leave a part of its result unwritten: of taps that meet no pixel of the
    image, with AMX (torch 2.14)."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    sides = zip(x.shape[2:], weight.shape[2:], *geometry[:3], strict=True)
    return any(_has_idle_taps(*side) for side in sides)


@lru_cache(maxsize=1024)
def _has_idle_taps(size: int, taps: int, stride: int, padding: int, dilation: int) -> bool:
    """Whether a tap of a kernel lies beside the image for every output along a side."""
    outputs = (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
    firsts = range(-padding, outputs * stride - padding, stride)
    return any(not any(0 <= first + tap * dilation < size for first in firsts) for tap in range(taps))


def wgrad1x1(a: Tensor, dz: Tensor) -> Tensor:
    """sum over pixels of dz' a: ([N, C, H, W], [N, K, H, W]) -> [K, C] in the accumulation type.

    oneDNN's wgrad is the fastest GEMM of this shape on a CPU (torch.mm reaches under half of it).
    """
    k, c = dz.shape[1], a.shape[1]
    weight = a.new_empty((k, c, 1, 1))  # only its shape is read
    return conv_backward(dz, a, weight, POINTWISE, False, True)[1].view(k, c).to(acc_dtype(a.dtype))


def _pixels(matrix: Tensor) -> Tensor:
    """[M, C] as the NHWC activation [1, C, M, 1] of the same memory."""
    m, c = matrix.shape
    return matrix.contiguous().as_strided((1, c, m, 1), (m * c, 1, c, c))


def matmul_nt(a: Tensor, b: Tensor) -> Tensor:
    """a b' of two small matrices [M, C], [K, C] -> [M, K]; on the CPU as a convolution, see `wgrad1x1`."""
    if has_fused_conv(a):
        return conv(_pixels(a), b[:, :, None, None], POINTWISE).permute(0, 2, 3, 1).reshape(a.shape[0], b.shape[0])
    return a @ b.t()


def matmul_tn(a: Tensor, b: Tensor) -> Tensor:
    """a' b of two small matrices [M, K], [M, C] -> [K, C]; on the CPU as a wgrad, see `wgrad1x1`."""
    return wgrad1x1(_pixels(b), _pixels(a)) if has_fused_conv(a) else a.t() @ b


def has_fused_conv(x: Tensor) -> bool:
    """Whether oneDNN's conv + bias + add + relu takes tensors like `x`."""
    if x.device.type != "cpu" or not torch.backends.mkldnn.enabled or x.numel() == 0:
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and _onednn._is_mkldnn_bf16_supported())


def fused_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    residual: Tensor | None = None,
    relu: bool = False,
    into_residual: bool = False,
) -> Tensor:
    """relu(conv(x, weight) + bias + residual) as one oneDNN primitive; no gradient of its own.

    `into_residual` writes the result over `residual`. `weight` may be packed (see folded.py).
    """
    stride, padding, dilation, groups = geometry
    where = (padding, stride, dilation, groups)
    if residual is None:
        attr = "relu" if relu else "none"
        return to_nhwc(_onednn._convolution_pointwise(x, weight, bias, *where, attr, [], ""))
    unary = "relu" if relu else None
    if into_residual:
        out = _onednn._convolution_pointwise_.binary(residual, x, weight, bias, *where, "add", 1.0, unary, [], None)
    else:
        out = _onednn._convolution_pointwise.binary(x, residual, weight, bias, *where, "add", 1.0, unary, [], None)
    return to_nhwc(out)
