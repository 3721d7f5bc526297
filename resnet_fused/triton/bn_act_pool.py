"""`bn_act_pool` and its backward: batch norm, ReLU and max pool in one pass, with an int8 argmax."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.bn_act_pool import pooled_size
from ..ops.layout import empty_nhwc
from ..ops.pointwise import Checks
from .launch import launch
from .tile import affine, check_rows, checked, inside, matrix, offsets, place, relu, tiles, whole


@triton.jit
def pixels(first, H, W, ROWS: tl.constexpr):
    """(image, line, column), each [ROWS, 1], of a tile's pixels in [N, H, W]."""
    m = (first.to(tl.int32) + tl.arange(0, ROWS))[:, None]
    return m // W // H, m // W % H, m % W


@triton.jit
def bn_act_pool_kernel(
    x, scale, shift, y, argmax, M, C, H, W, out_H, out_W,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Every tap in order: the first maximum wins, and a NaN wins over any number, as in PyTorch."""
    C = whole(C, WIDTH)
    first, c0 = place(C, ROWS, CHANNELS)
    c = c0 + tl.arange(0, CHANNELS)
    valid, _ = inside(first, M, c, C, ROWS)
    image, i, j = pixels(first, out_H, out_W, ROWS)
    best = tl.full((ROWS, CHANNELS), -float("inf"), tl.float32)
    winner = tl.zeros((ROWS, CHANNELS), tl.int32)
    for tap in range(KERNEL * KERNEL):
        h, w = i * STRIDE - PADDING + tap // KERNEL, j * STRIDE - PADDING + tap % KERNEL
        held = valid & ((h >= 0) & (h < H) & (w >= 0) & (w < W))
        row = (image * H + h).to(tl.int64) * W + w
        z = relu(affine(tl.load(x + row * C + c[None, :], held, other=0.0).to(tl.float32), scale, shift, c, C))
        wins = held & ((z > best) | (z != z))
        best, winner = tl.where(wins, z, best), tl.where(wins, tap, winner)
    at = first * C + offsets(c, C, ROWS)
    tl.store(y + at, best, valid)
    tl.store(argmax + at, winner, valid)


def bn_act_pool(
    x: Tensor, scale: Tensor, shift: Tensor, kernel: int, stride: int, padding: int
) -> tuple[Tensor, Tensor]:
    """(y, argmax int8), both [N, C, H', W']; the winner is a tap kh * kernel + kw."""
    check = checked("bn_act_pool", "x", x)
    check.vectors(x.shape[1], scale=scale, shift=shift)
    n, c, h, w = x.shape
    out_h, out_w = _check_pool(check, h, w, kernel, stride, padding)
    y = empty_nhwc(x, (n, c, out_h, out_w))
    argmax = empty_nhwc(x, (n, c, out_h, out_w), dtype=torch.int8)
    M, C = matrix(y)
    check_rows(check, M)
    by = tiles(M, C, x)
    launch(
        bn_act_pool_kernel,
        by.grid,
        (x, scale, shift, y, argmax, M, C, h, w, out_h, out_w),
        {"KERNEL": kernel, "STRIDE": stride, "PADDING": padding, **by.constexprs},
        by.num_warps,
    )
    return y, argmax


@triton.jit
def bn_act_pool_backward_kernel(
    dy, argmax, da, M, C, H, W, out_H, out_W,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A pixel gathers the gradients of the windows that it has won, of at most `reach` along each axis."""
    C = whole(C, WIDTH)
    first, c0 = place(C, ROWS, CHANNELS)
    c = c0 + tl.arange(0, CHANNELS)
    valid, _ = inside(first, M, c, C, ROWS)
    image, h, w = pixels(first, H, W, ROWS)
    h, w = h + PADDING, w + PADDING
    reach: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for window in range(reach * reach):
        i, j = h // STRIDE - (reach - 1) + window // reach, w // STRIDE - (reach - 1) + window % reach
        tap_h, tap_w = h - i * STRIDE, w - j * STRIDE
        there = (i >= 0) & (i < out_H) & (j >= 0) & (j < out_W) & (tap_h < KERNEL) & (tap_w < KERNEL)
        at = ((image * out_H + i).to(tl.int64) * out_W + j) * C + c[None, :]
        won = tl.load(argmax + at, valid & there, other=-1).to(tl.int32) == tap_h * KERNEL + tap_w
        total += tl.where(won, tl.load(dy + at, valid & there, other=0.0).to(tl.float32), 0.0)
    tl.store(da + first * C + offsets(c, C, ROWS), total, valid)


def bn_act_pool_backward(
    dy: Tensor, argmax: Tensor, height: int, width: int, kernel: int, stride: int, padding: int
) -> Tensor:
    """The gradient [N, C, height, width] of what was pooled."""
    check = checked("bn_act_pool_backward", "dy", dy)
    check.winners("argmax", argmax, dy.shape)
    out_h, out_w = _check_pool(check, height, width, kernel, stride, padding)
    n, c = dy.shape[:2]
    check.activation("dy", dy, (n, c, out_h, out_w))
    da = empty_nhwc(dy, (n, c, height, width))
    M, C = matrix(da)
    check_rows(check, M)
    by = tiles(M, C, dy)
    launch(
        bn_act_pool_backward_kernel,
        by.grid,
        (dy, argmax, da, M, C, height, width, out_h, out_w),
        {"KERNEL": kernel, "STRIDE": stride, "PADDING": padding, **by.constexprs},
        by.num_warps,
    )
    return da


def _check_pool(check: Checks, h: int, w: int, kernel: int, stride: int, padding: int) -> tuple[int, int]:
    """The pool's output size."""
    check.require(1 <= kernel <= 11, f"kernel is {kernel}, expected 1 to 11")
    check.stride(stride)
    check.require(0 <= padding <= kernel // 2, f"padding is {padding}, expected 0 to {kernel // 2} (half the kernel)")
    check.require(
        min(h, w) + 2 * padding >= kernel,
        f"the input is {h} by {w}, expected at least {kernel} by {kernel} with its padding of {padding}",
    )
    return pooled_size(h, kernel, stride, padding), pooled_size(w, kernel, stride, padding)
