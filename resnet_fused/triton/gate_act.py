"""`gate_act` and its backward: y = relu((1 - g) x + g f) with g = sigmoid(v), one pass each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.layout import empty_nhwc, mask_shape
from .launch import launch
from .tile import inside, load_mask, matrix, offsets, place, pointwise_checks, relu, store_mask, tiles, whole

_LOG2_E = tl.constexpr(1.4426950408889634)
_LOG2_E_REST = tl.constexpr(1.925963033500011e-08)  # what float32 leaves of it
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp(v):
    """To a few roundings, where tl.exp rounds the exponent: that is as many as v is large."""
    exponent = v * _LOG2_E
    rest = tl.fma(v, _LOG2_E, -exponent) + v * _LOG2_E_REST
    return tl.exp2(exponent) * (1.0 + rest * _LN_2)


@triton.jit
def gates(v):
    """(sigmoid(v), 1 - sigmoid(v)), each to a few roundings of itself."""
    small = exp(-tl.abs(tl.where(tl.abs(v) > 80.0, 80.0, v)))  # a NaN stays
    large = 1.0 / (1.0 + small)
    return tl.where(v >= 0.0, large, small * large), tl.where(v >= 0.0, small * large, large)


@triton.jit
def gate_act_kernel(
    v, x, f, y, mask, M, C, RELU: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    C = whole(C, WIDTH)
    first, c0 = place(C, ROWS, CHANNELS)
    c = c0 + tl.arange(0, CHANNELS)
    valid, left = inside(first, M, c, C, ROWS)
    at = first * C + offsets(c, C, ROWS)
    g, rest = gates(tl.load(v + at, valid, other=0.0).to(tl.float32))
    z = rest * tl.load(x + at, valid, other=0.0).to(tl.float32) + g * tl.load(f + at, valid, other=0.0).to(tl.float32)
    if mask is not None:
        store_mask(mask, ~(z <= 0.0), first, left, c0, C, M, ROWS, CHANNELS)
    tl.store(y + at, relu(z) if RELU else z, valid)


def gate_act(v: Tensor, x: Tensor, f: Tensor, relu: bool, save_mask: bool) -> tuple[Tensor, Tensor]:
    """(y like v [N, C, H, W], mask int32 [ceil(C/32), M] or [0])."""
    pointwise_checks("gate_act", relu, save_mask, v=v, x=x, f=f)
    M, C = matrix(v)
    y, mask = empty_nhwc(v, v.shape), v.new_empty(mask_shape(C, M) if save_mask else (0,), dtype=torch.int32)
    by = tiles(M, C, v)
    operands = (v, x, f, y, mask if save_mask else None, M, C)
    launch(gate_act_kernel, by.grid, operands, {"RELU": relu, **by.constexprs}, by.num_warps)
    return y, mask


@triton.jit
def gate_act_backward_kernel(
    dy, mask, v, x, f, dv, dx, df, M, C, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    C = whole(C, WIDTH)
    first, c0 = place(C, ROWS, CHANNELS)
    c = c0 + tl.arange(0, CHANNELS)
    valid, left = inside(first, M, c, C, ROWS)
    at = first * C + offsets(c, C, ROWS)
    dz = tl.load(dy + at, valid, other=0.0).to(tl.float32)
    if mask is not None:
        dz = tl.where(load_mask(mask, first, left, c0, C, M, ROWS, CHANNELS), dz, 0.0)
    g, rest = gates(tl.load(v + at, valid, other=0.0).to(tl.float32))
    difference = tl.load(f + at, valid, other=0.0).to(tl.float32) - tl.load(x + at, valid, other=0.0).to(tl.float32)
    tl.store(dv + at, dz * difference * g * rest, valid)
    tl.store(dx + at, dz * rest, valid)
    tl.store(df + at, dz * g, valid)


def gate_act_backward(
    dy: Tensor, mask: Tensor | None, v: Tensor, x: Tensor, f: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of v, x and f, all like dy [N, C, H, W]."""
    check = pointwise_checks("gate_act_backward", True, False, dy=dy, v=v, x=x, f=f)
    check.mask("mask", mask, dy.shape)
    M, C = matrix(dy)
    grads = empty_nhwc(dy, dy.shape), empty_nhwc(dy, dy.shape), empty_nhwc(dy, dy.shape)
    by = tiles(M, C, dy)
    launch(gate_act_backward_kernel, by.grid, (dy, mask, v, x, f, *grads, M, C), by.constexprs, by.num_warps)
    return grads
