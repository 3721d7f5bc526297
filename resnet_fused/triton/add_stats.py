"""`add_stats`: y = x + u, or x + scale*u + shift, with the mean and biased variance of y from the same pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..ops.layout import empty_nhwc
from ..ops.pointwise import vector_like
from .launch import launch
from .partials import add_values, empty_partials, mean_of, merge_statistics, no_statistics, store_statistics
from .tile import affine, checked, chunked, inside, matrix, offsets, place, require_rows, whole


@triton.jit
def added(x, u, scale, shift, at, valid, c, C):
    """x + u or x + scale*u + shift at some elements, as x's type rounds it."""
    value = tl.load(u + at, valid, other=0.0).to(tl.float32)
    if scale is not None:
        value = affine(value, scale, shift, c, C)
    return (tl.load(x + at, valid, other=0.0).to(tl.float32) + value).to(x.dtype.element_ty)


@triton.jit
def add_stats_kernel(
    x, u, scale, shift, y, partial, M, C, chunk, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    C = whole(C, WIDTH)
    begin, c0 = place(C, chunk, CHANNELS)
    c = c0 + tl.arange(0, CHANNELS)
    valid, left = inside(begin, M, c, C, ROWS)
    total = added(x, u, scale, shift, begin * C + offsets(c, C, ROWS), valid, c, C)
    pivot = mean_of(total.to(tl.float32), valid, left)  # in a channel far from 0 only the differences count
    count, mean, m2 = no_statistics(ROWS, CHANNELS)
    for step in range(0, chunk, ROWS):
        first = begin + step
        valid, left = inside(first, M, c, C, ROWS)
        at = first * C + offsets(c, C, ROWS)
        total = added(x, u, scale, shift, at, valid, c, C)
        tl.store(y + at, total, valid)
        held = (tl.arange(0, ROWS) < left)[:, None]
        count, mean, m2 = add_values(count, mean, m2, total.to(tl.float32) - pivot, held)
    store_statistics(partial, begin // chunk, count, mean, m2, pivot, c, C)


def add_stats(
    x: Tensor, u: Tensor, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y like x [N, C, H, W], mean, var of y as it is stored, float32 [C])."""
    check = checked("add_stats", "x", x)
    require_rows(check, "x", x)
    check.activation("u", u, x.shape)
    check.together(scale=scale, shift=shift)
    check.vectors(x.shape[1], scale=scale, shift=shift)
    M, C = matrix(x)
    y, mean, var = empty_nhwc(x, x.shape), vector_like(x, C), vector_like(x, C)
    by = chunked(M, C, x)
    partial = empty_partials(mean, by, 2)
    operands = (x, u, scale, shift, y, partial, M, C, by.chunk)
    launch(add_stats_kernel, by.grid, operands, by.constexprs, by.num_warps)
    merge_statistics(by, partial, mean, var)
    return y, mean, var
