"""What the files of convolutions share: a unit forward and backward, whole, and as the fused ops compute it.

On a GPU the fused ops are kernels of 16-bit types: float32 is left out. On a CPU they are compositions of ATen's
convolution and the tails, of which blocks use a part only: those cases are not in the short set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cudnn_graph import ConvStats
from benchmarks.ops import EPS, activation, affine, forward_cases, norm, shift, stats, stats_in_math, weight
from benchmarks.shapes import INNER, ConvShape
from benchmarks.suite import ON_GPU, TYPES, Case
from resnet_fused.ops.dispatch import ops

PRODUCT_TYPES = tuple(t for t in TYPES if not (ON_GPU and t == "fp32"))
Vectors = tuple[Tensor, ...] | None  # of the batch norm before a unit: `affine`'s; None where its input is activated


def geometry(conv: ConvShape) -> tuple[list[int], list[int]]:
    """(stride, padding)"""
    return [conv.stride] * 2, [conv.padding] * 2


def encoded(conv: ConvShape) -> list[int]:
    """A geometry as conv2d's ops take it."""
    return [*[conv.stride] * 2, *[conv.padding] * 2, 1, 1, 1]


def activated(x: Tensor, vectors: Vectors) -> Tensor:
    return x if vectors is None else F.relu(norm(x, *vectors), inplace=True)


# ------------------------------------------------------------------------------------------------------ forward


def forward_arguments(conv: ConvShape, dtype: str) -> tuple[Any, ...]:
    vectors = affine(conv.channels) if conv in INNER else None
    return activation(conv.channels, conv.size, dtype), weight(conv, dtype), vectors, conv


def eager_forward(x: Tensor, w: Tensor, vectors: Vectors, conv: ConvShape):
    u = F.conv2d(activated(x, vectors), w, None, *geometry(conv))
    return u, *stats(u)


def math_forward(x: Tensor, w: Tensor, vectors: Vectors, conv: ConvShape):
    """For torch.compile."""
    u = F.conv2d(activated(x, vectors), w, None, *geometry(conv))
    return u, *stats_in_math(u)


def our_forward(x: Tensor, w: Tensor, vectors: Vectors, conv: ConvShape):
    scale, own_shift = (None, None) if vectors is None else vectors[:2]
    if conv.kernel == 1:
        return ops.conv1x1(x, w, scale, own_shift, conv.stride, True)
    return ops.conv2d(x, w, scale, own_shift, encoded(conv), True)


# ----------------------------------------------------------------------------------------------------- backward


def backward_arguments(conv: ConvShape, dtype: str) -> tuple[Any, ...]:
    """The gradient dz of a unit's batch norm's output, and what it has saved: x, a, u, w; the gate of x; of the batch
    norm (gamma, mean, rstd) and the coefficients by which dz becomes du."""
    x, w, vectors, _ = forward_arguments(conv, dtype)
    a = x if vectors is None else activated(x, vectors)
    u, mean, var = eager_forward(x, w, vectors, conv)
    mean, rstd, gamma = mean.float(), torch.rsqrt(var.float() + EPS), shift(conv.filters)
    dz = torch.randn_like(u)
    _, sum_dz, sum_dz_xc = torch.ops.resnet_fused.bn_act_backward_reduce(dz, None, u, None, None, mean, False)
    scale, pixels = gamma * rstd, u.numel() // u.shape[1]
    coefficients = scale, scale * rstd.square() * sum_dz_xc / -pixels, scale * sum_dz / -pixels
    gate = None if vectors is None else (*vectors[:2], shift(conv.channels))
    return dz, x, a, u, w, gate, (gamma, mean, rstd), coefficients, conv


def eager_backward(dz, x, a, u, w, gate, own, coefficients, conv: ConvShape):
    gamma, mean, rstd = own
    du = torch.ops.aten.native_batch_norm_backward(dz, u, gamma, None, None, mean, rstd, True, EPS, [True, True, True])[
        0
    ]
    wanted = [conv.channels != 3, True, False]  # an image needs no gradient
    stride, padding = geometry(conv)
    da, dw, _ = torch.ops.aten.convolution_backward(du, a, w, None, stride, padding, [1, 1], False, [0, 0], 1, wanted)
    return da if gate is None else torch.ops.aten.threshold_backward(da, a, 0), dw


def our_backward(dz, x, a, u, w, gate, own, coefficients, conv: ConvShape):
    height, width = x.shape[2:]
    flow = (dz, None, u, None, None, own[1], *coefficients)
    end = (None, None) if gate is None else (None, None, x, *gate)
    end += (None,) * (6 - len(end))
    scale, own_shift = (None, None) if gate is None else gate[:2]
    if conv.kernel == 1:
        dx = ops.conv1x1_dgrad(*flow, w, height, width, conv.stride, *end)[0]
        return dx, ops.conv1x1_wgrad(*flow, x, scale, own_shift, conv.stride, False, False)[0]
    dx = ops.conv2d_dgrad(*flow, w, height, width, encoded(conv), *end)[0] if conv.channels != 3 else None
    return dx, ops.conv2d_wgrad(*flow, x, scale, own_shift, [conv.kernel] * 2, encoded(conv))


def unit_cases(op: str, convs: list[ConvShape]) -> list[Case]:
    """Forward: batch norm and ReLU of the input, convolution, statistics of the output. Backward: from the gradient of
    the batch norm's output to the input's and the weight's."""
    variants: dict[str, Callable] = {"eager": eager_forward, "compile": math_forward, "ours": our_forward}
    backward = {"eager": eager_backward, "ours": our_backward}
    options: dict[str, Any] = {"types": PRODUCT_TYPES, "slow": not ON_GPU}
    return [
        *forward_cases(op, convs, forward_arguments, variants | {"cudnn": ConvStats()}, **options),
        *forward_cases(f"{op}-backward", convs, backward_arguments, backward, works=("backward",), **options),
    ]
