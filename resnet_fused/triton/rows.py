"""The products whose rows are pixels: fprop and dgrad of convolutions, 1x1 ones among them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..ops.layout import empty_nhwc
from ..ops.pointwise import strided, vector_like
from .configs import Product, check_operands, default, options, require_pixels
from .gemm import (
    activated,
    bn_backward,
    load_vector,
    row_bits,
    store_added,
    store_gated,
    store_statistics,
    tile_of,
    whole,
)
from .launch import arch_of, launch
from .partials import empty_partials, merge_statistics, sum_partials
from .tile import Tiles
from .window import Window

GROUP = tl.constexpr(8)  # row tiles


@triton.jit
def next_slice(k, i, j, K, BK: tl.constexpr, columns):
    """(first channel, tap's row and column) of the slice of BK channels behind this one, of K and a row of taps."""
    end = k + BK >= K
    j += end.to(tl.int32)
    i += (j == columns).to(tl.int32)
    return tl.where(end, 0, k + BK), i, tl.where(j == columns, 0, j)


@triton.jit
def load_tile(at, rows, columns, WHOLE_ROWS: tl.constexpr, WHOLE_COLUMNS: tl.constexpr):
    """A tile at pointers [BM, BK], 0 where a row or a column does not exist; WHOLE: all do, as far as it matters."""
    if WHOLE_ROWS and WHOLE_COLUMNS:
        return tl.load(at)
    if WHOLE_ROWS:
        return tl.load(at, columns[None, :], other=0.0)
    return tl.load(at, rows[:, None] if WHOLE_COLUMNS else rows[:, None] & columns[None, :], other=0.0)


# ------------------------------------------------------------------------------------------------------- fprop


@triton.jit
def convolved(
    acc, x, scale, shift, weight, m, n, group, M, H, W, C, K, P, Q,
    WINDOW: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """acc [BM, BN] + conv(relu(scale*x + shift)), or conv(x), at output pixels m and channels n of a group.

    x [N, H, W, C], weight [K, R, S, C / groups]; what lies beyond the output is anything. EVEN: a group's channels are
    a multiple of BK. ONCE: an element is transformed before it becomes a part of fragments, which several warps hold.
    """
    c, k = whole(C // WINDOW.groups), whole(K // WINDOW.groups)
    rows = m < M
    m = tl.minimum(m, M - 1)
    h, w, pixel = m, m, m
    if not WINDOW.identity:
        h = m // Q % P * WINDOW.stride_h - WINDOW.padding_h
        w = m % Q * WINDOW.stride_w - WINDOW.padding_w
        pixel = (m // Q // P * H + h) * W + w
    column = tl.arange(0, BK)
    a_rows = x + (pixel.to(tl.int64) * C)[:, None] + group * c
    b_rows = weight + ((group * k + tl.minimum(n, k - 1)) * (WINDOW.taps * c))[None, :]
    at, r, s = 0, 0, 0
    # At least one step, as the compiler knows then: with a way around the loop ptxas serialises wgmma (C7515).
    for i in range(0, tl.maximum(tl.cdiv(c, BK) * WINDOW.taps, 1)):
        if WINDOW.taps == 1:
            at = i * BK
        exists = column < c - at
        a = a_rows + (at + (r * WINDOW.dilation_h * W + s * WINDOW.dilation_w) * C + column)[None, :]
        b = b_rows + ((r * WINDOW.S + s) * c + at + column)[:, None]
        reads = rows
        if WINDOW.pads:
            y, z = h + r * WINDOW.dilation_h, w + s * WINDOW.dilation_w
            reads = (y >= 0) & (y < H) & (z >= 0) & (z < W)
        a = load_tile(a, reads, exists, not WINDOW.pads, EVEN)
        b = tl.load(b) if EVEN else tl.load(b, exists[:, None], other=0.0)
        if scale is not None:
            channel = group * c + at + column
            a_scale, a_shift = load_vector(scale, channel, exists, EVEN), load_vector(shift, channel, exists, EVEN)
            a = activated(a, a_scale[None, :], a_shift[None, :])
            if WINDOW.pads or ONCE:
                a = tl.where(reads[:, None], a, 0.0)  # relu(shift) is not 0
        acc = tl.dot(a, b, acc)
        if WINDOW.taps > 1:
            at, r, s = next_slice(at, r, s, c, BK, WINDOW.S)
    return acc


@triton.jit
def output_tile(M, K, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """This program's row tile, group, pixels [BM] and channels [BN] of the group, of which there are K / groups."""
    across = tl.cdiv(K // WINDOW.groups, BN)
    tile, at = tile_of(tl.program_id(0), tl.cdiv(M, BM), across * WINDOW.groups, GROUP)
    return tile, at // across, tile * BM + tl.arange(0, BM), at % across * BN + tl.arange(0, BN)


@triton.jit
def fprop_kernel(
    x, scale, shift, weight, out, partial, M, H, W, C, K, P, Q,
    WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """out [M, K] = conv(relu(scale*x + shift)), or conv(x), and its statistics to partial [row tiles, 2, K]."""
    C, K = whole(C), whole(K)
    tile, group, m, n = output_tile(M, K, WINDOW, BM, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    acc = convolved(acc, x, scale, shift, weight, m, n, group, M, H, W, C, K, P, Q, WINDOW, BK, EVEN, ONCE)
    k = whole(K // WINDOW.groups)
    rows, exists = m < M, n < k
    n += group * k
    v = acc.to(out.dtype.element_ty)
    tl.store(out + (m.to(tl.int64) * K)[:, None] + n[None, :], v, rows[:, None] & exists[None, :])
    if partial is not None:
        store_statistics(partial, v.to(tl.float32), rows, tile, n, exists, K)


# ------------------------------------------------------------------------------------------------------- dgrad


@triton.jit
def input_pixels(m, phase, N, H, W, WINDOW: tl.constexpr):
    """Which of the rows m exist in a phase, and their row, column and number among dx's pixels [N, H, W]."""
    a, b = phase // WINDOW.stride_w, phase % WINDOW.stride_w
    high, wide = tl.cdiv(H - a, WINDOW.stride_h), tl.cdiv(W - b, WINDOW.stride_w)
    rows = m < N * high * wide
    m = tl.where(rows, m, 0)
    high, wide = tl.maximum(high, 1), tl.maximum(wide, 1)
    h, w = m // wide % high * WINDOW.stride_h + a, m % wide * WINDOW.stride_w + b
    if WINDOW.phases == 1:
        return rows, h, w, m
    return rows, h, w, (m // wide // high * H + h) * W + w


@triton.jit
def first_tap(h, PADDING: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr, STEP: tl.constexpr):
    """The first tap through which row h of x, or one STRIDE away, meets an output; a large number if none does."""
    first = 1 << 20
    for tap in tl.static_range(STEP):
        meets = (h + PADDING - tap * DILATION) % STRIDE == 0
        first = tl.minimum(first, tl.where(meets, tap, 1 << 20))
    return first


@triton.jit
def phase_taps(phase, WINDOW: tl.constexpr):
    """Down and across, the first of a phase's taps and how many there are, tap_h and tap_w apart; 0 if it has none."""
    h, w = phase // WINDOW.stride_w, phase % WINDOW.stride_w
    r = first_tap(h, WINDOW.padding_h, WINDOW.dilation_h, WINDOW.stride_h, WINDOW.tap_h)
    s = first_tap(w, WINDOW.padding_w, WINDOW.dilation_w, WINDOW.stride_w, WINDOW.tap_w)
    down = tl.cdiv(tl.maximum(WINDOW.R - r, 0), WINDOW.tap_h)
    across = tl.cdiv(tl.maximum(WINDOW.S - s, 0), WINDOW.tap_w)
    read = (down > 0) & (across > 0)
    return tl.where(read, r, 0), tl.where(read, s, 0), down, across


@triton.jit
def row_backward(dy, u, scale, shift, mean, coef_dz, coef_x, coef_1, channel, exists, EVEN: tl.constexpr):
    """The batch norm's backward of a tile [BM, BK] of those channels [BK]."""
    own_scale, own_shift = None, None
    if scale is not None:
        own_scale = load_vector(scale, channel, exists, EVEN)[None, :]
        own_shift = load_vector(shift, channel, exists, EVEN)[None, :]
    own_mean, own_dz = load_vector(mean, channel, exists, EVEN), load_vector(coef_dz, channel, exists, EVEN)
    own_x, own_1 = load_vector(coef_x, channel, exists, EVEN), load_vector(coef_1, channel, exists, EVEN)
    return bn_backward(
        dy, u, own_scale, own_shift, own_mean[None, :], own_dz[None, :], own_x[None, :], own_1[None, :]
    )  # fmt: skip


@triton.jit
def transposed(
    dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, weight, h, w, pixel, n, group, phase, N, H, W, C, K, P, Q,
    WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """[BM, BN] of the gradient of a convolution's input, at pixels (h, w) and channels n of a group, and whether any
    output reads this phase's pixels.

    dy, or the batch norm's backward of it, is [N, P, Q, K]; weight [K, R, S, C / groups]. EVEN, ONCE: as above, of K.
    """
    c, k = whole(C // WINDOW.groups), whole(K // WINDOW.groups)
    r0, s0, down, across = phase_taps(phase, WINDOW)
    read = (down > 0) & (across > 0)
    p = (h + WINDOW.padding_h - r0 * WINDOW.dilation_h) // WINDOW.stride_h
    q = (w + WINDOW.padding_w - s0 * WINDOW.dilation_w) // WINDOW.stride_w
    output = pixel
    if not WINDOW.identity:
        output = (pixel // (H * W) * P + p) * Q + q
    column = tl.arange(0, BK)
    a_rows = (output.to(tl.int64) * K)[:, None] + group * k
    at, i, j = 0, 0, 0
    acc = tl.zeros((BM, BN), tl.float32)
    steps = tl.cdiv(k, BK) * WINDOW.taps
    if WINDOW.phases > 1:
        steps = tl.where(read, tl.cdiv(k, BK) * down * across, 1)
    for step in range(0, tl.maximum(steps, 1)):
        if WINDOW.taps == 1:
            at = step * BK
        back = (i * WINDOW.back_h) * Q + j * WINDOW.back_w
        tap = (r0 + i * WINDOW.tap_h) * WINDOW.S + s0 + j * WINDOW.tap_w
        exists = column < k - at
        reads = h >= 0
        if not WINDOW.identity:
            y, z = p - i * WINDOW.back_h, q - j * WINDOW.back_w
            reads = read & (y >= 0) & (y < P) & (z >= 0) & (z < Q)
        a = a_rows + (at - back * K + column)[None, :]
        g = load_tile(dy + a, reads, exists, WINDOW.identity, EVEN)
        b = weight + ((group * k + at + column) * (WINDOW.taps * c))[:, None] + (tap * c + n)[None, :]
        b = tl.load(b, (n < c)[None, :] if EVEN else (n < c)[None, :] & exists[:, None], other=0.0)
        channel = group * k + at + column
        if mask is not None:
            kept = row_bits(mask, output - back, reads, group * k + at, K, N * P * Q, BK, WINDOW.groups == 1)
            g = tl.where(kept != 0, g, 0.0)
        if u is not None:
            raw = load_tile(u + a, reads, exists, WINDOW.identity, EVEN)
            g = row_backward(g, raw, scale, shift, mean, coef_dz, coef_x, coef_1, channel, exists, EVEN)
            if ONCE or not WINDOW.identity:
                g = tl.where(reads[:, None], g, 0.0)
        acc = tl.dot(g, b, acc)
        if WINDOW.taps > 1:
            at, i, j = next_slice(at, i, j, k, BK, across)
    return acc, read


@triton.jit
def input_tile(N, H, W, C, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """As output_tile, of dx, in which `tile` counts those of all phases; then the phase."""
    phase = tl.program_id(1)
    M = N * tl.cdiv(H, WINDOW.stride_h) * tl.cdiv(W, WINDOW.stride_w)  # of phase 0, which has the most
    tile, group, m, n = output_tile(M, C, WINDOW, BM, BN)
    return phase * tl.cdiv(M, BM) + tile, group, m, n, phase


@triton.jit
def dgrad_kernel(
    dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, weight,
    addend, addend_mask, gate_u, gate_scale, gate_shift, gate_mean, dx, partial,
    N, H, W, C, K, P, Q, addend_C, addend_offset, addend_scale,
    WINDOW: tl.constexpr, ADDEND_STRIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """dx [N, H, W, C] = the gradient of a convolution's input; + addend_scale * addend * addend_mask, or gated by
    relu'(gate_scale*gate_u + gate_shift) with its sums to partial [phases * row tiles, 2, C]."""
    C, K = whole(C), whole(K)
    tile, group, m, n, phase = input_tile(N, H, W, C, WINDOW, BM, BN)
    rows, h, w, pixel = input_pixels(m, phase, N, H, W, WINDOW)
    acc, _ = transposed(
        dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, weight, h, w, pixel, n, group, phase, N, H, W, C, K,
        P, Q, WINDOW, BM, BN, BK, EVEN, ONCE,
    )  # fmt: skip
    c = whole(C // WINDOW.groups)
    exists, n = n < c, group * c + n
    if gate_u is not None:
        at = pixel.to(tl.int64) * C
        store_gated(dx, partial, acc, gate_u, gate_scale, gate_shift, gate_mean, at, rows, tile, n, exists, C)
    else:
        store_added(
            dx, acc, addend, addend_mask, addend_scale, rows, h, w, pixel, n, exists, N, H, W, C, addend_C,
            addend_offset, ADDEND_STRIDE, BN, WINDOW.groups == 1,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------- launches


def fprop(op: str, x: Tensor, weight: Tensor, scale, shift, window: Window, stats: bool) -> tuple[Tensor, ...]:
    """(out, and its mean and variance or empty ones) of checked arguments."""
    (n, c, h, w), k = x.shape, weight.shape[0]
    p, q = window.outputs(h, w)
    out, m = empty_nhwc(x, (n, k, p, q)), n * p * q
    check_operands(op, x, out, C=c // window.groups, K=k // window.groups)
    if stats:
        require_pixels(op, m, "take statistics of")
    product = Product(m, k // window.groups, c // window.groups, arch_of(x), 1, int(scale is not None), window.groups)
    config = default(product)
    by = Tiles(m, k, 8, config.m, config.n, config.warps, chunk=config.m)
    mean, var = vector_like(x, k, stats), vector_like(x, k, stats)
    partial = empty_partials(mean, by, 2) if stats else None
    launch(
        fprop_kernel,
        (product.programs(config),),
        (x, scale, shift, weight, out, partial, m, h, w, c, k, p, q),
        {"WINDOW": window, "EVEN": product.k % config.k == 0, "ONCE": product.once, **config.constexprs},
        **options(config),
    )
    if partial is not None:
        merge_statistics(by, partial, mean, var)
    return out, mean, var


def dgrad(
    op: str, dy: Tensor, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, weight: Tensor, height: int, width: int,
    window: Window, addend, addend_mask, gate_u, gate_scale, gate_shift, gate_mean, addend_scale: float,
    addend_stride: int, addend_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx or what gates it, and its sums or empty ones) of checked arguments."""
    n, k, p, q = dy.shape
    c, groups, gated = weight.shape[1] * window.groups, window.groups, gate_u is not None
    dx = empty_nhwc(dy, (n, c, height, width))
    addend_c = c if addend is None else addend.shape[1]
    check_operands(op, dx, dy, C=c // groups, K=k // groups, addend_C=addend_c, in_front=addend_offset)
    if gated:
        require_pixels(op, dx.numel(), "sum over")
    high, wide = strided(height, window.stride_h), strided(width, window.stride_w)
    tensors = 1 if u is None else 2
    product = Product(n * high * wide, c // groups, k // groups, arch_of(dy), tensors, 2 * (tensors - 1), groups)
    config = default(product)
    sums = vector_like(dy, c, gated), vector_like(dy, c, gated)
    by = Tiles(window.phases * triton.cdiv(product.m, config.m), c, 8, 1, config.n, config.warps, chunk=1)
    partial = empty_partials(sums[0], by, 2) if gated else None
    launch(
        dgrad_kernel,
        (product.programs(config), window.phases),
        [
            *(dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, weight, addend, addend_mask),
            *(gate_u, gate_scale, gate_shift, gate_mean, dx, partial),
            *(n, height, width, c, k, p, q, addend_c, addend_offset, addend_scale),
        ],
        {"WINDOW": window, "ADDEND_STRIDE": addend_stride, "EVEN": product.k % config.k == 0, "ONCE": product.once}
        | config.constexprs,
        **options(config),
    )
    if partial is not None:
        sum_partials(by, partial, *sums)
    return dx, *sums
