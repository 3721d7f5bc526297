"""`gram_operand`: the centred, rounded operand of a Gram matrix, a = act(scale*x + shift) - center, and its mean."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..ops.layout import empty_nhwc
from ..ops.pointwise import strided, vector_like
from .launch import launch
from .partials import empty_partials, sum_partials
from .tile import (
    affine,
    check_rows,
    checked,
    chunked,
    inside,
    matrix,
    offsets,
    place,
    relu,
    strided_rows,
    vector,
    whole,
)


@triton.jit
def gram_operand_kernel(
    x, scale, shift, center, a, partial, M, C, H, W, chunk,
    RELU: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """x [N, H, W, C], a [M, C]."""
    C = whole(C, WIDTH)
    begin, c0 = place(C, chunk, CHANNELS)
    c = c0 + tl.arange(0, CHANNELS)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for step in range(0, chunk, ROWS):
        first = begin + step
        valid, _ = inside(first, M, c, C, ROWS)
        at = first * C + offsets(c, C, ROWS)
        source = at if STRIDE == 1 else strided_rows(first, H, W, STRIDE, ROWS)[:, None] * C + c[None, :]
        z = tl.load(x + source, valid, other=0.0).to(tl.float32)
        if scale is not None:
            z = affine(z, scale, shift, c, C)
        z = ((relu(z) if RELU else z) - vector(center, c, C)).to(a.dtype.element_ty)
        tl.store(a + at, z, valid)
        total += tl.where(valid, z.to(tl.float32), 0.0)
    tl.store(partial + begin // chunk * C + c, tl.sum(total, 0), c < C)


def gram_operand(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, relu: bool, center: Tensor, stride: int
) -> tuple[Tensor, Tensor]:
    """(a [N, C, ceil(H/stride), ceil(W/stride)] in x's type, its mean float32 [C])."""
    check = checked("gram_operand", "x", x)
    check.together(scale=scale, shift=shift)
    n, c, h, w = x.shape
    check.vectors(c, scale=scale, shift=shift, center=center)
    check.stride(stride)
    a, mean = empty_nhwc(x, (n, c, strided(h, stride), strided(w, stride))), vector_like(x, c)
    M, C = matrix(a)
    if stride > 1:
        check_rows(check, M)
    by = chunked(M, C, x)
    partial = empty_partials(mean, by, 1)
    launch(
        gram_operand_kernel,
        by.grid,
        (x, scale, shift, center, a, partial, M, C, h, w, by.chunk),
        {"RELU": relu, "STRIDE": stride, **by.constexprs},
        by.num_warps,
    )
    sum_partials(by, partial, mean, factor=1 / M if M else float("nan"))
    return a, mean
