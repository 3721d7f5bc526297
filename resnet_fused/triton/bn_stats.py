"""`bn_stats`: mean and biased variance of each channel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..ops.pointwise import vector_like
from .launch import launch
from .partials import add_values, empty_partials, mean_of, merge_statistics, no_statistics, store_statistics
from .tile import checked, chunked, inside, matrix, offsets, place, require_rows, whole


@triton.jit
def bn_stats_kernel(
    x, partial, M, C, chunk, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    C = whole(C, WIDTH)
    begin, c0 = place(C, chunk, CHANNELS)
    c = c0 + tl.arange(0, CHANNELS)
    valid, left = inside(begin, M, c, C, ROWS)
    value = tl.load(x + begin * C + offsets(c, C, ROWS), valid, other=0.0).to(tl.float32)
    pivot = mean_of(value, valid, left)  # in a channel far from 0 only the differences count
    count, mean, m2 = no_statistics(ROWS, CHANNELS)
    for step in range(0, chunk, ROWS):
        first = begin + step
        valid, left = inside(first, M, c, C, ROWS)
        value = tl.load(x + first * C + offsets(c, C, ROWS), valid, other=0.0).to(tl.float32)
        held = (tl.arange(0, ROWS) < left)[:, None]
        count, mean, m2 = add_values(count, mean, m2, value - pivot, held)
    store_statistics(partial, begin // chunk, count, mean, m2, pivot, c, C)


def bn_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, var), float32 [C], of x [N, C, H, W] with at least one pixel."""
    require_rows(checked("bn_stats", "x", x), "x", x)
    M, C = matrix(x)
    mean, var = vector_like(x, C), vector_like(x, C)
    by = chunked(M, C, x)
    partial = empty_partials(mean, by, 2)
    launch(bn_stats_kernel, by.grid, (x, partial, M, C, by.chunk), by.constexprs, by.num_warps)
    merge_statistics(by, partial, mean, var)
    return mean, var
