"""`concat_act` and its backward: [x | act(scale*u + shift)] along the channels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.layout import empty_nhwc, mask_shape
from .bn_act import reduce
from .launch import launch
from .tile import affine, check_mask_wanted, checked, chunked, inside, matrix, offsets, relu, store_mask, tiles, whole


@triton.jit
def concat_act_kernel(
    x, u, scale, shift, y, mask, M, C, K,
    RELU: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Programs for tiles of x [M, C] and of u [M, K], those of the same rows side by side; y is [M, C + K]."""
    C, K = whole(C, WIDTH), whole(K, WIDTH)
    own, across = tl.cdiv(C, CHANNELS), tl.cdiv(C, CHANNELS) + tl.cdiv(K, CHANNELS)
    program = tl.program_id(0)
    first, tile = (program // across).to(tl.int64) * ROWS, program % across
    y += first * (C + K)
    if tile < own:
        c = tile * CHANNELS + tl.arange(0, CHANNELS)
        valid, _ = inside(first, M, c, C, ROWS)
        tl.store(y + offsets(c, C + K, ROWS), tl.load(x + first * C + offsets(c, C, ROWS), valid), valid)
    else:
        c0 = (tile - own) * CHANNELS
        c = c0 + tl.arange(0, CHANNELS)
        valid, left = inside(first, M, c, K, ROWS)
        z = tl.load(u + first * K + offsets(c, K, ROWS), valid, other=0.0).to(tl.float32)
        z = affine(z, scale, shift, c, K)
        if mask is not None:
            store_mask(mask, ~(z <= 0.0), first, left, c0, K, M, ROWS, CHANNELS)
        tl.store(y + C + offsets(c, C + K, ROWS), relu(z) if RELU else z, valid)


def concat_act(
    x: Tensor, u: Tensor, scale: Tensor, shift: Tensor, relu: bool, save_mask: bool
) -> tuple[Tensor, Tensor]:
    """([N, C + K, H, W] of x [N, C, H, W] and u [N, K, H, W], the mask of the second part or [0])."""
    check = checked("concat_act", "u", u)
    (n, k, h, w), c = u.shape, x.shape[1]
    check.activation("x", x, (n, c, h, w))
    check.vectors(k, scale=scale, shift=shift)
    check_mask_wanted(check, relu, save_mask)
    M, _ = matrix(u)
    y = empty_nhwc(u, (n, c + k, h, w))
    mask = u.new_empty(mask_shape(k, M) if save_mask else (0,), dtype=torch.int32)
    by = tiles(M, max(c, k), x, u)
    grid = (-(-M // by.rows) * (-(-c // by.channels) + -(-k // by.channels)),)
    operands = (x, u, scale, shift, y, mask if save_mask else None, M, c, k)
    launch(concat_act_kernel, grid, operands, {"RELU": relu, **by.constexprs}, by.num_warps)
    return y, mask


def concat_act_backward(
    dy: Tensor, mask: Tensor | None, u: Tensor | None, mean: Tensor | None, before: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz [N, K, H, W] of dy's channels behind the first `before`, its sum [K], that of dz * (u - mean) [K] or [0])."""
    check = checked("concat_act_backward", "dy", dy)
    n, channels, h, w = dy.shape
    check.require(
        1 <= before < channels, f"before is {before}, expected 1 to {channels - 1} (dy has {channels} channels)"
    )
    shape = (n, channels - before, h, w)
    check.mask("mask", mask, shape)
    check.together(u=u, mean=mean)
    check.activation("u", u, shape)
    check.vectors(shape[1], mean=mean)
    dz = empty_nhwc(dy, shape)
    by = chunked(*matrix(dz), dz, u, dy)
    return dz, *reduce(dy[:, before:], channels, mask, u, None, None, mean, dz, by)
