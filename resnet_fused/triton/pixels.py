"""The products over pixels: wgrad of convolutions, 1x1 ones among them, and Gram matrices."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Config, Product, check_operands, chosen, default, options, require_pixels
from .gemm import activated, bn_backward, load_vector, tile_of, whole
from .launch import arch_of, launch
from .window import Window

GROUP = tl.constexpr(8)  # row tiles
_BLOCK = 256  # elements of a program that adds up splits


@triton.jit
def column_bits(mask, i, m, exists, C, M, BI: tl.constexpr, ALIGNED: tl.constexpr):
    """[BI, pixels]: 1 where channel i of pixel m passed, from bit panels [ceil(C/32), M]; ALIGNED: as in row_bits."""
    first = tl.min(i, 0) // 32
    words = mask + first.to(tl.int64) * M + m
    bits = tl.load(words, exists, other=0)[None, :]
    for panel in tl.static_range(1, (BI - 1) // 32 + (1 if ALIGNED else 2)):
        words += M
        later = tl.load(words, exists & (first + panel < tl.cdiv(C, 32)), other=0)[None, :]
        bits = tl.where((i // 32 < first + panel)[:, None], bits, later)
    return bits >> (i % 32)[:, None] & 1


@triton.jit
def wgrad_kernel(
    dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, x, x_scale, x_shift, partial, sums,
    M, H, W, C, K, P, Q, per_split,
    WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """partial [splits, K, R, S, C / groups]: du' a over each split's pixels, with du = dy * mask or the batch norm's
    backward of dy [N, P, Q, K], a = relu(x_scale*x + x_shift) or x [N, H, W, C]; and to sums [splits, K] those of du.
    """
    C, K = whole(C), whole(K)
    c, k = whole(C // WINDOW.groups), whole(K // WINDOW.groups)
    across, down = tl.cdiv(c, BN), tl.cdiv(k, BM)
    tap, split = tl.program_id(1), tl.program_id(2)
    group = tl.program_id(0) // (across * down)
    tile_i, tile_j = tile_of(tl.program_id(0) % (across * down), down, across, GROUP)
    i, j = tile_i * BM + tl.arange(0, BM), tile_j * BN + tl.arange(0, BN)
    own_i, own_j = i < k, j < c
    i, j = group * k + i, group * c + j
    if x_scale is not None:
        a_scale = load_vector(x_scale, j, own_j, False)[None, :]
        a_shift = load_vector(x_shift, j, own_j, False)[None, :]
    if u is not None:
        du_scale, du_shift = None, None
        if scale is not None:
            du_scale, du_shift = (
                load_vector(scale, i, own_i, False)[:, None],
                load_vector(shift, i, own_i, False)[:, None],
            )
        du_mean, du_dz = load_vector(mean, i, own_i, False)[:, None], load_vector(coef_dz, i, own_i, False)[:, None]
        du_x, du_1 = load_vector(coef_x, i, own_i, False)[:, None], load_vector(coef_1, i, own_i, False)[:, None]
    row, column = tap // WINDOW.S * WINDOW.dilation_h, tap % WINDOW.S * WINDOW.dilation_w
    acc = tl.zeros((BM, BN), tl.float32)
    if sums is not None:
        total = tl.zeros((BM, BK), tl.float32)  # by residue of the pixel: across lanes only at the end
    begin, end = split * per_split, tl.minimum((split + 1) * per_split, M)
    tl.assume(begin < end)
    for at in range(begin, end, BK):
        m = at + tl.arange(0, BK)
        exists = m < end
        rows = exists
        if WINDOW.identity:
            pixel = m
        else:
            h = m // Q % P * WINDOW.stride_h - WINDOW.padding_h + row
            w = m % Q * WINDOW.stride_w - WINDOW.padding_w + column
            pixel = (m // Q // P * H + h) * W + w
            if WINDOW.pads:
                rows = exists & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        left = (m.to(tl.int64) * K)[None, :] + i[:, None]
        inside = exists[None, :] & own_i[:, None]
        du = tl.load(dy + left, inside, other=0.0)
        if mask is not None:
            du = tl.where(column_bits(mask, i, m, exists, K, M, BM, WINDOW.groups == 1) != 0, du, 0.0)
        if sums is not None:
            total += du.to(tl.float32)
        if u is not None:
            raw = tl.load(u + left, inside, other=0.0)
            du = bn_backward(du, raw, du_scale, du_shift, du_mean, du_dz, du_x, du_1)
            du = tl.where(exists[None, :], du, 0.0)
        a = tl.load(x + (pixel.to(tl.int64) * C)[:, None] + j[None, :], rows[:, None] & own_j[None, :], other=0.0)
        if x_scale is not None:
            a = activated(a, a_scale, a_shift)
            if WINDOW.pads or ONCE:
                a = tl.where(rows[:, None], a, 0.0)  # relu(x_shift) is not 0
        acc = tl.dot(du, a, acc)
    to = partial + split.to(tl.int64) * K * (WINDOW.taps * c)
    to += (i * (WINDOW.taps * c))[:, None] + (tap * c + j - group * c)[None, :]
    tl.store(to, acc, own_i[:, None] & own_j[None, :])
    if sums is not None:
        tl.store(sums + split * K + i, tl.sum(total, 1), own_i & (tile_j == 0))


@triton.jit
def sum_splits_kernel(partial, out, n, splits, BLOCK: tl.constexpr):
    """out [n] = the sum of partial [splits, n], in the order of the splits."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(0, splits):
        total += tl.load(partial + i, i < n, other=0.0)
        partial += n
    tl.store(out + i, total.to(out.dtype.element_ty), i < n)


# -------------------------------------------------------------------------------------------------------- gram


@triton.jit
def centred(x, scale, shift, center):
    """relu(scale*x + shift), or x, rounded as a product's operand is, minus the centre, rounded."""
    if scale is not None:
        x = activated(x, scale, shift)
    return (x.to(tl.float32) - center).to(x.dtype)


@triton.jit
def gram_kernel(
    x, scale, shift, center, partial, sums, M, H, W, C, P, Q, per_split,
    WINDOW: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """partial [splits, C, C] = a' a over each split's pixels, in tiles on and above the diagonal, and to sums
    [splits, C] those of a, the centred operand of x [N, H, W, C]'s strided pixels."""
    C = whole(C)
    split = tl.program_id(1)
    tile_i, tile_j = 0, tl.program_id(0)  # row by row of the upper triangle
    across = tl.cdiv(C, BM)
    while tile_j >= across - tile_i:
        tile_j -= across - tile_i
        tile_i += 1
    tile_j += tile_i
    i, j = tile_i * BM + tl.arange(0, BM), tile_j * BM + tl.arange(0, BM)
    own_i, own_j = i < C, j < C
    i_scale, i_shift, j_scale, j_shift = None, None, None, None
    if scale is not None:
        i_scale, i_shift = load_vector(scale, i, own_i, False)[:, None], load_vector(shift, i, own_i, False)[:, None]
        j_scale, j_shift = load_vector(scale, j, own_j, False)[None, :], load_vector(shift, j, own_j, False)[None, :]
    i_center, j_center = load_vector(center, i, own_i, False)[:, None], load_vector(center, j, own_j, False)[None, :]
    acc, total = tl.zeros((BM, BM), tl.float32), tl.zeros((BK, BM), tl.float32)
    begin, end = split * per_split, tl.minimum((split + 1) * per_split, M)
    tl.assume(begin < end)
    for at in range(begin, end, BK):
        m = at + tl.arange(0, BK)
        exists = m < end
        pixel = m
        if not WINDOW.identity:
            pixel = (m // Q // P * H + m // Q % P * WINDOW.stride_h) * W + m % Q * WINDOW.stride_w
        rows = pixel.to(tl.int64) * C
        # Each operand is loaded as it is multiplied: a transposition behind a transformation stops the pipeline.
        left = tl.load(x + rows[None, :] + i[:, None], exists[None, :] & own_i[:, None], other=0.0)
        right = tl.load(x + rows[:, None] + j[None, :], exists[:, None] & own_j[None, :], other=0.0)
        right = tl.where(exists[:, None], centred(right, j_scale, j_shift, j_center), 0.0)
        total += right.to(tl.float32)
        left = centred(left, i_scale, i_shift, i_center)
        if ONCE:
            left = tl.where(exists[None, :], left, 0.0)
        acc = tl.dot(left, right, acc)
    to = partial + split.to(tl.int64) * C * C + (i * C)[:, None] + j[None, :]
    tl.store(to, acc, own_i[:, None] & own_j[None, :])
    tl.store(sums + split * C + j, tl.sum(total, 0), own_j & (tile_i == 0))


@triton.jit
def gram_finalize_kernel(partial, sums, mean, cov, C, splits, factor, BLOCK: tl.constexpr):
    """mean [C] and cov [C, C] of `factor` times the sums of all splits, in their order; factor is 1 / pixels."""
    C = whole(C)
    i, j = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = j < C
    above = tl.minimum(i, j) * C + tl.maximum(i, j)
    total, sum_i, sum_j = tl.zeros((BLOCK,), tl.float32), 0.0, tl.zeros((BLOCK,), tl.float32)
    for _ in range(0, splits):
        total += tl.load(partial + above, exists, other=0.0)
        sum_i += tl.load(sums + i)
        sum_j += tl.load(sums + j, exists, other=0.0)
        partial += C * C
        sums += C
    tl.store(cov + i * C + j, total * factor - (sum_i * factor) * (sum_j * factor), exists)
    tl.store(mean + j, sum_j * factor, exists & (i == 0))


# ----------------------------------------------------------------------------------------------------- launches

_PROGRAMS = 512  # a few for each of a GPU's multiprocessors, on any: how sums are split does not depend on it
_LEAST_PIXELS = 128  # of a split: else its sums weigh more than its operands


def default_of_splits(product: Product) -> Config:
    """The default where programs share the pixels, product.k, too: large tiles have enough of them."""
    return default(replace(product, count=product.count * triton.cdiv(product.k, _LEAST_PIXELS)))


def gram_configs(C: int) -> list[Config]:
    """Square tiles, the default first."""
    large, small = Config(128, 128, 32, 8, 3), Config(64, 64, 32, 4, 3)
    return [large, small] if C > 64 else [small]


def split(tiles: int, pixels: int, step: int) -> tuple[int, int]:
    """How many splits of the pixels, and how many pixels, a multiple of a step's, each has."""
    wanted = max(_PROGRAMS // tiles, 1)
    each = triton.cdiv(max(triton.cdiv(pixels, wanted), _LEAST_PIXELS), step) * step
    return triton.cdiv(pixels, each), each


def sum_splits(partial: Tensor, out: Tensor) -> None:
    """out = the sum over the first dimension of partial, in its order."""
    count, size = partial.shape[0], out.numel()
    launch(sum_splits_kernel, (triton.cdiv(size, _BLOCK),), (partial, out, size, count), {"BLOCK": _BLOCK})


def wgrad(
    op: str, dy: Tensor, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, x: Tensor, x_scale, x_shift,
    window: Window, dw: Tensor, sums: Tensor | None,
) -> None:  # fmt: skip
    """dw [K, R, S, C / groups] in memory, and the sums [K] of dy * mask where they are given, of checked arguments."""
    (n, k, p, q), (_, c, h, w) = dy.shape, x.shape
    groups, m = window.groups, n * p * q
    check_operands(op, dy, x, C=c // groups, K=k // groups)
    require_pixels(op, m, "sum over")
    left, transforms = 1 if u is None else 2, 2 * sum(t is not None for t in (mask, u, x_scale))
    product = Product(k // groups, c // groups, m, arch_of(dy), left, transforms, groups * window.taps)
    config = default_of_splits(product)
    splits, each = split(product.programs(config), m, config.k)
    partial = dw.new_empty((splits, dw.numel()), dtype=torch.float32)
    partial_sums = None if sums is None else sums.new_empty((splits, k))
    launch(
        wgrad_kernel,
        (product.programs(config) // window.taps, window.taps, splits),
        [
            *(dy, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1, x, x_scale, x_shift, partial, partial_sums),
            *(m, h, w, c, k, p, q, each),
        ],
        {"WINDOW": window, "ONCE": product.once, **config.constexprs},
        **options(config),
    )
    sum_splits(partial, dw)
    if sums is not None and partial_sums is not None:
        sum_splits(partial_sums, sums)


def gram_of_pixels(x: Tensor, scale, shift, center: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """(mean [C], covariance [C, C]) of the centred operand, of checked arguments."""
    n, c, h, w = x.shape
    p, q = window.outputs(h, w)
    m = n * p * q
    check_operands("gram", x, C=c)
    require_pixels("gram", m, "take statistics of")
    config, product = chosen(gram_configs(c)), Product(c, c, m, arch_of(x), transforms=2)
    across = triton.cdiv(c, config.m)
    tiles = across * (across + 1) // 2
    splits, each = split(tiles, m, config.k)
    partial, sums = center.new_empty((splits, c, c)), center.new_empty((splits, c))
    launch(
        gram_kernel,
        (tiles, splits),
        (x, scale, shift, center, partial, sums, m, h, w, c, p, q, each),
        {"WINDOW": window, "ONCE": product.once, "BM": config.m, "BK": config.k},
        **options(config),
    )
    mean, cov = center.new_empty((c,)), center.new_empty((c, c))
    launch(
        gram_finalize_kernel,
        (c, triton.cdiv(c, _BLOCK)),
        (partial, sums, mean, cov, c, splits, 1.0 / m),
        {"BLOCK": _BLOCK},
    )
    return mean, cov
