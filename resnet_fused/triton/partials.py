"""Sums and statistics over the rows of a matrix [M, C]: of chunks, then of those in a fixed order. No atomics."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .tile import Tiles

_CHUNKS, _CHANNELS, _WARPS = 128, 32, 8  # what a program of the second pass takes at a time


def empty_partials(like: Tensor, by: Tiles, sums: int) -> Tensor:
    """[chunks, sums, C]."""
    return like.new_empty((by.chunks, sums, by.C))


def sum_partials(by: Tiles, partial: Tensor, out: Tensor, out2: Tensor | None = None, factor: float = 1.0) -> None:
    """out [C], and with a second sum out2 [C], from partial [chunks, 1 or 2, C]; without rows, factor * 0."""
    launch(
        sum_partials_kernel,
        (triton.cdiv(by.C, _CHANNELS),),
        (partial, out, out2, by.chunks, by.C, factor),
        {"SUMS": partial.shape[1], "CHUNKS": _CHUNKS, "CHANNELS": _CHANNELS},
        _WARPS,
    )


def merge_statistics(by: Tiles, partial: Tensor, mean: Tensor, var: Tensor) -> None:
    """Mean and biased variance [C] from each chunk's mean and sum of squared deviations, [chunks, 2, C]."""
    launch(
        merge_statistics_kernel,
        (triton.cdiv(by.C, _CHANNELS),),
        (partial, mean, var, by.M, by.chunk, by.chunks, by.C),
        {"CHUNKS": _CHUNKS, "CHANNELS": _CHANNELS},
        _WARPS,
    )


@triton.jit
def load_partials(partial, first, sums, which, c, chunks, C, CHUNKS: tl.constexpr):
    """[CHUNKS, CHANNELS] of partial [chunks, sums, C], and which of the chunks there are."""
    b = (first + tl.arange(0, CHUNKS))[:, None]
    there = (b < chunks) & (c < C)[None, :]
    return tl.load(partial + (b * sums + which) * C + c[None, :], there, other=0.0), there


@triton.jit
def sum_partials_kernel(
    partial, out, out2, chunks, C, factor, SUMS: tl.constexpr, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr
):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros((CHUNKS, CHANNELS), tl.float32)
    total2 = tl.zeros((CHUNKS, CHANNELS), tl.float32)
    for first in range(0, chunks, CHUNKS):
        total += load_partials(partial, first, SUMS, 0, c, chunks, C, CHUNKS)[0]
        if out2 is not None:
            total2 += load_partials(partial, first, SUMS, 1, c, chunks, C, CHUNKS)[0]
    tl.store(out + c, tl.sum(total, 0) * factor, c < C)
    if out2 is not None:
        tl.store(out2 + c, tl.sum(total2, 0) * factor, c < C)


@triton.jit
def merge_statistics_kernel(
    partial, mean_out, var_out, M, chunk, chunks, C, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr
):
    """By Chan's formula in two passes over what the cache holds; means are taken relative to the first chunk's."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    pivot = tl.load(partial + c, c < C, other=0.0)
    total = tl.zeros((CHUNKS, CHANNELS), tl.float32)
    for first in range(0, chunks, CHUNKS):
        mean, there = load_partials(partial, first, 2, 0, c, chunks, C, CHUNKS)
        total += tl.where(there, mean - pivot[None, :], 0.0) * rows_of(first, chunk, M, CHUNKS)
    shift = tl.sum(total, 0) / M
    m2 = tl.zeros((CHUNKS, CHANNELS), tl.float32)
    for first in range(0, chunks, CHUNKS):
        mean, there = load_partials(partial, first, 2, 0, c, chunks, C, CHUNKS)
        delta = tl.where(there, (mean - pivot[None, :]) - shift[None, :], 0.0)
        m2 += load_partials(partial, first, 2, 1, c, chunks, C, CHUNKS)[0]
        m2 += delta * delta * rows_of(first, chunk, M, CHUNKS)
    tl.store(mean_out + c, pivot + shift, c < C)
    tl.store(var_out + c, tl.sum(m2, 0) / M, c < C)


@triton.jit
def rows_of(first, chunk, M, CHUNKS: tl.constexpr):
    """How many rows each chunk has, [CHUNKS, 1]: the last one fewer."""
    b = first + tl.arange(0, CHUNKS)
    return tl.minimum(M - b.to(tl.int64) * chunk, chunk).to(tl.float32)[:, None]


@triton.jit
def mean_of(x, valid, rows):
    """[1, CHANNELS], of the valid elements of a tile, in its first `rows` rows."""
    return tl.sum(tl.where(valid, x, 0.0), 0, keep_dims=True) / rows


@triton.jit
def no_statistics(ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """(count [ROWS, 1], mean, m2 [ROWS, CHANNELS]) of nothing: each place of a tile has its own."""
    zero = tl.zeros((ROWS, CHANNELS), tl.float32)
    return tl.zeros((ROWS, 1), tl.float32), zero, zero


@triton.jit
def add_values(count, mean, m2, x, held):
    """Welford's step, with x [ROWS, CHANNELS] of the rows that are `held` [ROWS, 1]."""
    x = tl.where(held, x, mean)
    count += held.to(tl.float32)
    delta = x - mean
    mean += delta * (1.0 / tl.maximum(count, 1.0))
    return count, mean, m2 + delta * (x - mean)


@triton.jit
def store_statistics(partial, chunk, count, mean, m2, pivot, c, C):
    """A chunk's part of [chunks, 2, C], from those of a tile's places; pivot [1, CHANNELS] was subtracted from all."""
    of_all = tl.sum(mean * count, 0, keep_dims=True) / tl.sum(count, 0, keep_dims=True)  # [1, CHANNELS]
    delta = mean - of_all
    total = tl.sum(m2 + delta * delta * count, 0, keep_dims=True)
    at, there = partial + chunk * 2 * C + c[None, :], (c < C)[None, :]
    tl.store(at, pivot + of_all, there)
    tl.store(at + C, total, there)
