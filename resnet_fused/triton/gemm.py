"""What the kernels of the matrix family share: prologues on what a product loads, epilogues on what it stores."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def whole(C):
    """C, a multiple of 8: of itself Triton looks for multiples of 16 only."""
    return C // 8 * 8


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(row tile, column tile) of a program: GROUP row tiles share the columns that they read while those are in L2."""
    first = program // (GROUP * tiles_n) * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    at = program - first * tiles_n
    return first + at % rows, at // rows


@triton.jit
def load_vector(v, c, exists, EVEN: tl.constexpr):
    """v[c], 0 where c does not exist."""
    if EVEN:
        return tl.load(v + c)
    return tl.load(v + c, exists, other=0.0)


# --------------------------------------------------------------------------------------------------- prologues


@triton.jit
def relu(z):
    """A NaN passes, as in PyTorch."""
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def passes(z):
    return (z <= 0.0) == 0


@triton.jit
def activated(x, scale, shift):
    """relu(scale*x + shift), rounded once."""
    return relu(x.to(tl.float32) * scale + shift).to(x.dtype)


@triton.jit
def bn_backward(dy, u, scale, shift, mean, coef_dz, coef_x, coef_1):
    """coef_dz*dz + coef_x*(u - mean) + coef_1; with a scale, dz is dy where relu(scale*u + shift) passes it."""
    dz = dy.to(tl.float32)
    u = u.to(tl.float32)
    if scale is not None:
        dz = tl.where(passes(u * scale + shift), dz, 0.0)
    return (coef_dz * dz + (coef_x * u + (coef_1 - coef_x * mean))).to(dy.dtype)


@triton.jit
def row_bits(mask, m, exists, first, C, M, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """[BM, COLUMNS]: 1 where channel first + column of pixel m passed, from bit panels [ceil(C/32), M].

    ALIGNED: whether `first` is a multiple of COLUMNS. A row's words are scalars to its elements: nothing moves.
    """
    at = first % 32 + tl.arange(0, COLUMNS)
    words = mask + (first // 32).to(tl.int64) * M + m
    bits = tl.load(words, exists, other=0)[:, None]
    for panel in tl.static_range(1, (COLUMNS - 1) // 32 + (1 if ALIGNED else 2)):
        words += M
        later = tl.load(words, exists & (first // 32 + panel < tl.cdiv(C, 32)), other=0)[:, None]
        bits = tl.where((at < 32 * panel)[None, :], bits, later)
    return bits >> (at % 32)[None, :] & 1


# --------------------------------------------------------------------------------------------------- epilogues


@triton.jit
def store_statistics(partial, v, rows, tile, n, exists, N):
    """Mean and sum of squared deviations of v [BM, BN], of which rows [BM] are pixels, to partial [tiles, 2, N]."""
    count = tl.sum(rows.to(tl.float32), 0)
    mean = tl.sum(tl.where(rows[:, None], v, 0.0), 0) / count
    d = tl.where(rows[:, None], v - mean[None, :], 0.0)
    to = partial + tile.to(tl.int64) * 2 * N + n
    tl.store(to, mean, exists)
    tl.store(to + N, tl.sum(d * d, 0), exists)


@triton.jit
def store_bits(mask, passed, m, rows, first, C, M, BM: tl.constexpr, BN: tl.constexpr):
    """passed [BM, BN], False beyond the matrix: bit c % 32 of word [c / 32][m], for channels from `first`."""
    bits = tl.reshape(passed.to(tl.int32), (BM, BN // 32, 32)) << tl.arange(0, 32)[None, None, :]
    panel = first // 32 + tl.arange(0, BN // 32)
    to = mask + panel[None, :].to(tl.int64) * M + m[:, None]
    tl.store(to, tl.sum(bits, 2), rows[:, None] & (panel < tl.cdiv(C, 32))[None, :])


@triton.jit
def store_gated(out, partial, acc, gate_u, gate_scale, gate_shift, gate_mean, at, rows, tile, n, exists, C):
    """acc [BM, BN] where relu(gate_scale*gate_u + gate_shift) passes, and the sums of what is stored and of it times
    (gate_u - gate_mean) to partial [tiles, 2, C]. at [BM]: where the rows begin."""
    inside = rows[:, None] & exists[None, :]
    u = tl.load(gate_u + at[:, None] + n[None, :], inside, other=0.0).to(tl.float32)
    scale, shift = tl.load(gate_scale + n, exists, other=0.0), tl.load(gate_shift + n, exists, other=0.0)
    z = tl.where(inside & passes(u * scale[None, :] + shift[None, :]), acc, 0.0).to(out.dtype.element_ty)
    tl.store(out + at[:, None] + n[None, :], z, inside)
    z = z.to(tl.float32)
    to = partial + tile.to(tl.int64) * 2 * C + n
    tl.store(to, tl.sum(z, 0), exists)
    tl.store(to + C, tl.sum(z * (u - tl.load(gate_mean + n, exists, other=0.0)[None, :]), 0), exists)


@triton.jit
def store_added(
    dx, acc, addend, addend_mask, addend_scale, rows, h, w, pixel, n, exists, N, H, W, C, addend_C, addend_offset,
    STRIDE: tl.constexpr, BN: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """acc + addend_scale * addend * addend_mask to pixels [BM] of dx [N, H, W, C].

    STRIDE > 0: the addend [N, H', W', addend_C] is the gradient of what a padded shortcut makes of dx's tensor: pixel
    (i, j) and channel c of it belong to (i*STRIDE, j*STRIDE) and c - addend_offset.
    """
    inside = rows[:, None] & exists[None, :]
    if addend is not None:
        read, own, pixels, own_C, channel = rows, pixel, N * H * W, C, n
        if STRIDE > 0:
            high, wide = tl.cdiv(H, STRIDE), tl.cdiv(W, STRIDE)
            read = rows & (h % STRIDE == 0) & (w % STRIDE == 0)
            own = (pixel // (H * W) * high + h // STRIDE) * wide + w // STRIDE
            pixels, own_C, channel = N * high * wide, whole(addend_C), n + whole(addend_offset)
        a = addend + (own.to(tl.int64) * own_C)[:, None] + channel[None, :]
        a = tl.load(a, read[:, None] & exists[None, :], other=0.0).to(tl.float32)
        if addend_mask is not None:
            kept = row_bits(addend_mask, own, read, tl.min(channel, 0), own_C, pixels, BN, ALIGNED and STRIDE == 0)
            a = tl.where(kept != 0, a, 0.0)
        acc += addend_scale * a
    tl.store(dx + (pixel.to(tl.int64) * C)[:, None] + n[None, :], acc.to(dx.dtype.element_ty), inside)
