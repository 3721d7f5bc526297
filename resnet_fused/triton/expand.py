"""`expand` and `expand_dgrad`: see csrc/expand/expand.h for the formulas."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.expand import check_expand, check_expand_dgrad
from ..ops.layout import empty_nhwc, mask_shape
from ..ops.pointwise import strided, vector_like
from .bn_act import relu_mask
from .configs import Product, check_operands, default, options, require_pixels
from .gemm import load_vector, passes, relu, store_added, store_bits, store_gated, whole
from .launch import arch_of, launch
from .partials import empty_partials, sum_partials
from .rows import convolved, input_pixels, input_tile, output_tile, transposed
from .tile import Tiles
from .window import Window

PANEL = 32  # channels of a mask's word


@triton.jit
def bn_act_kernel(
    x, scale, shift, weight, out_scale, out_shift, x2, weight2, out_scale2, residual, y, mask,
    M, H, W, C, K, P, Q, H2, W2, C2,
    WINDOW: tl.constexpr, WINDOW2: tl.constexpr, RELU: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, EVEN2: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """y [M, K] = act(out_scale*conv(a) + out_shift + residual, or out_scale2*conv(x2)), with a = relu(scale*x + shift)
    or x, and its bits to mask [ceil(K/32), M]."""
    C, K = whole(C), whole(K)
    _, group, m, n = output_tile(M, K, WINDOW, BM, BN)
    zero = tl.zeros((BM, BN), tl.float32)
    acc = convolved(zero, x, scale, shift, weight, m, n, group, M, H, W, C, K, P, Q, WINDOW, BK, EVEN, ONCE)
    k = whole(K // WINDOW.groups)
    rows, exists = m < M, n < k
    own = group * k + n
    z = acc * load_vector(out_scale, own, exists, False)[None, :] + load_vector(out_shift, own, exists, False)[None, :]
    if x2 is not None:  # with an accumulator of its own: nothing is divided by a scale
        acc2 = convolved(
            zero, x2, None, None, weight2, m, n, 0, M, H2, W2, whole(C2), K, P, Q, WINDOW2, BK, EVEN2, ONCE
        )
        z += acc2 * load_vector(out_scale2, own, exists, False)[None, :]
    inside = rows[:, None] & exists[None, :]
    at = (m.to(tl.int64) * K)[:, None] + own[None, :]
    if residual is not None:
        z += tl.load(residual + at, inside, other=0.0).to(tl.float32)
    if mask is not None:
        store_bits(mask, passes(z) & inside, m, rows, tl.min(own, 0), K, M, BM, BN)
    tl.store(y + at, (relu(z) if RELU else z).to(y.dtype.element_ty), inside)


@triton.jit
def expand_dgrad_kernel(
    dy, mask, weight, x, scale, shift, q, constant, mean, addend, addend_mask, dx, partial, N, H, W, C, K, P, Q,
    WINDOW: tl.constexpr, WINDOW2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr, EVEN2: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """da = (dy * mask) W + a q + constant at the pixels that dy [N, P, Q, K] read, with a = relu(scale*x + shift) or x;
    dx [N, H, W, C] is da gated by a's ReLU, with its sums to partial, or da + addend * addend_mask. WINDOW2: q's."""
    C, K = whole(C), whole(K)
    tile, group, m, n, phase = input_tile(N, H, W, C, WINDOW, BM, BN)
    rows, h, w, pixel = input_pixels(m, phase, N, H, W, WINDOW)
    acc, read = transposed(
        dy, mask, None, None, None, None, None, None, None, weight, h, w, pixel, n, group, phase, N, H, W, C, K, P, Q,
        WINDOW, BM, BN, BK, EVEN, ONCE,
    )  # fmt: skip
    exists = n < C
    # q is symmetric: its row n is what a 1x1 convolution's output channel n multiplies.
    acc = convolved(acc, x, scale, shift, q, pixel, n, 0, N * H * W, H, W, C, C, H, W, WINDOW2, BK, EVEN2, ONCE)
    acc = tl.where(read, acc + load_vector(constant, n, exists, False)[None, :], 0.0)
    if scale is not None:
        at = pixel.to(tl.int64) * C
        store_gated(dx, partial, acc, x, scale, shift, mean, at, rows, tile, n, exists, C)
    else:
        store_added(dx, acc, addend, addend_mask, 1.0, rows, h, w, pixel, n, exists, N, H, W, C, 0, 0, 0, BN, True)


# ----------------------------------------------------------------------------------------------------- launches


def bn_act(
    op: str, x: Tensor, scale, shift, weight: Tensor, out_scale: Tensor, out_shift: Tensor, x2, weight2, out_scale2,
    window: Window, window2: Window, residual, relu: bool, save_mask: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, its mask or an empty one) of checked arguments; window2 is x2's."""
    (n, c, h, w), k, groups = x.shape, weight.shape[0], window.groups
    p, q = window.outputs(h, w)
    y, m = empty_nhwc(x, (n, k, p, q)), n * p * q
    _, c2, h2, w2 = (x if x2 is None else x2).shape
    check_operands(op, x, y, C=c // groups, K=k // groups, C2=8 if x2 is None else c2)
    mask = x.new_empty(mask_shape(k, m) if save_mask else (0,), dtype=torch.int32)
    transforms = (scale is not None) + (x2 is not None)  # a second accumulator takes registers like a transformation
    product = Product(m, k // groups, c // groups, arch_of(x), 1, transforms, groups)
    config = default(product)
    config = config._replace(n=max(config.n, PANEL))
    packs = save_mask and (groups == 1 or product.n % PANEL == 0)  # else a word has bits of several programs
    launch(
        bn_act_kernel,
        (product.programs(config),),
        [
            *(x, scale, shift, weight, out_scale, out_shift, x2, weight2, out_scale2, residual, y),
            *(mask if packs else None, m, h, w, c, k, p, q, h2, w2, c2),
        ],
        {"WINDOW": window, "WINDOW2": window2, "RELU": relu, "EVEN": product.k % config.k == 0}
        | {"EVEN2": c2 % config.k == 0, "ONCE": product.once, **config.constexprs},
        **options(config),
    )
    return y, relu_mask(y) if save_mask and not packs else mask


def expand(
    x: Tensor, scale, shift, weight: Tensor, out_scale: Tensor, out_shift: Tensor, x2, weight2, out_scale2, stride: int,
    residual, relu: bool, save_mask: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_expand(
        x, scale, shift, weight, out_scale, out_shift, x2, weight2, out_scale2, stride, residual, relu, save_mask
    )
    return bn_act(
        "expand", x, scale, shift, weight, out_scale, out_shift, x2, weight2, out_scale2, Window(),
        Window(stride_h=stride, stride_w=stride), residual, relu, save_mask,
    )  # fmt: skip


def expand_dgrad(
    dy: Tensor, mask, weight: Tensor, x: Tensor, scale, shift, q: Tensor, constant: Tensor, mean, stride: int, addend,
    addend_mask,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_expand_dgrad(dy, mask, weight, x, scale, shift, q, constant, mean, stride, addend, addend_mask)
    (n, c, h, w), k, gated = x.shape, dy.shape[1], scale is not None
    check_operands("expand_dgrad", x, dy, C=c, K=k)
    if gated:
        require_pixels("expand_dgrad", x.numel(), "sum over")
    window = Window(stride_h=stride, stride_w=stride)
    dx = empty_nhwc(x, x.shape)
    product = Product(n * strided(h, stride) * strided(w, stride), c, max(c, k), arch_of(x), 1, transforms=2)
    config = default(product)
    sums = vector_like(x, c, gated), vector_like(x, c, gated)
    by = Tiles(triton.cdiv(product.m, config.m), c, 8, 1, config.n, config.warps, chunk=1)
    partial = empty_partials(sums[0], by, 2) if gated else None
    launch(
        expand_dgrad_kernel,
        (product.programs(config), window.phases),
        [
            *(dy, mask, weight, x, scale, shift, q, constant, mean, addend, addend_mask, dx, partial),
            *(n, h, w, c, k, *dy.shape[2:]),
        ],
        {"WINDOW": window, "WINDOW2": Window(), "EVEN": k % config.k == 0, "EVEN2": c % config.k == 0}
        | {"ONCE": product.once, **config.constexprs},
        **options(config),
    )
    if partial is not None:
        sum_partials(by, partial, *sums)
    return dx, *sums
