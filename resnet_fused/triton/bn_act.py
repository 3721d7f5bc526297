"""`bn_act`, `relu_mask` and the two passes of bn_act's backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.layout import empty_nhwc, mask_shape
from ..ops.pointwise import Checks, strided, vector_like
from .launch import launch
from .partials import empty_partials, sum_partials
from .tile import (
    Tiles,
    affine,
    check_rows,
    checked,
    chunked,
    inside,
    load_mask,
    matrix,
    offsets,
    place,
    pointwise_checks,
    relu,
    store_mask,
    strided_rows,
    tiles,
    vector,
    whole,
)


@triton.jit
def bn_act_kernel(
    x, scale, shift, residual, residual_scale, residual_shift, y, mask, M, C, H, W, residual_C, residual_offset,
    RELU: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """H, W, residual_C and residual_offset are of the residual [N, H, W, residual_C] that STRIDE > 0 strides over."""
    C = whole(C, WIDTH)
    first, c0 = place(C, ROWS, CHANNELS)
    c = c0 + tl.arange(0, CHANNELS)
    valid, left = inside(first, M, c, C, ROWS)
    at = offsets(c, C, ROWS)
    z = affine(tl.load(x + first * C + at, valid, other=0.0).to(tl.float32), scale, shift, c, C)
    if residual is not None:
        if STRIDE > 0:
            own_C = whole(residual_C, WIDTH)
            own_c = c - whole(residual_offset, WIDTH)
            rows = strided_rows(first, H, W, STRIDE, ROWS)
            held = valid & ((own_c >= 0) & (own_c < own_C))[None, :]
            r = tl.load(residual + rows[:, None] * own_C + own_c[None, :], held, other=0.0).to(tl.float32)
        else:
            r = tl.load(residual + first * C + at, valid, other=0.0).to(tl.float32)
        z += r if residual_scale is None else affine(r, residual_scale, residual_shift, c, C)
    if mask is not None:
        store_mask(mask, ~(z <= 0.0), first, left, c0, C, M, ROWS, CHANNELS)
    tl.store(y + first * C + at, relu(z) if RELU else z, valid)


def bn_act(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, residual_scale: Tensor | None,
    residual_shift: Tensor | None, relu: bool, save_mask: bool, residual_stride: int = 0, residual_offset: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y like x [N, C, H, W], mask int32 [ceil(C/32), M] or [0]); vectors are float32 [C]."""
    check = pointwise_checks("bn_act", relu, save_mask, x=x)
    check.vectors(x.shape[1], scale=scale, shift=shift)
    _check_residual(check, x, residual, residual_stride, residual_offset)
    check.together(residual_scale=residual_scale, residual_shift=residual_shift)
    check.needs("residual", residual, residual_scale=residual_scale)
    check.vectors(x.shape[1], residual_scale=residual_scale, residual_shift=residual_shift)
    M, C = matrix(x)
    y = empty_nhwc(x, x.shape)
    mask = x.new_empty(mask_shape(C, M) if save_mask else (0,), dtype=torch.int32)
    by = tiles(M, C, x, residual, offset=residual_offset)
    _, own_C, H, W = (x if residual is None else residual).shape
    operands = (x, scale, shift, residual, residual_scale, residual_shift)
    launch(
        bn_act_kernel,
        by.grid,
        (*operands, y, mask if save_mask else None, M, C, H, W, own_C, residual_offset),
        {"RELU": relu, "STRIDE": residual_stride, **by.constexprs},
        by.num_warps,
    )
    return y, mask


def _check_residual(check: Checks, x: Tensor, residual: Tensor | None, stride: int, offset: int) -> None:
    """A residual like x or, with a stride, one that a padded shortcut brings to x's shape."""
    check.require(stride >= 0, f"residual_stride is {stride}, expected 0 or more")
    check.require(stride > 0 or offset == 0, "residual_offset is given without residual_stride")
    if stride == 0 or residual is None:
        check.require(stride == 0, "residual_stride is given without residual")
        return check.activation("residual", residual, x.shape)
    check_rows(check, matrix(x)[0])
    check.activation("residual", residual)
    n, c, h, w = residual.shape
    check.require(
        (n, strided(h, stride), strided(w, stride)) == (x.shape[0], *x.shape[2:]),
        f"residual has shape {list(residual.shape)}, of which stride {stride} does not make x's pixels, x is "
        f"{list(x.shape)}",
    )
    check.require(
        0 <= offset <= x.shape[1] - c,
        f"residual_offset is {offset}, expected 0 to {x.shape[1] - c} (x has {x.shape[1]} channels, residual {c})",
    )


@triton.jit
def relu_mask_kernel(y, mask, M, C, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    C = whole(C, WIDTH)
    first, c0 = place(C, ROWS, CHANNELS)
    c = c0 + tl.arange(0, CHANNELS)
    valid, left = inside(first, M, c, C, ROWS)
    value = tl.load(y + first * C + offsets(c, C, ROWS), valid, other=0.0).to(tl.float32)
    store_mask(mask, ~(value <= 0.0), first, left, c0, C, M, ROWS, CHANNELS)


def relu_mask(y: Tensor) -> Tensor:
    """int32 [ceil(C/32), M]: where y [N, C, H, W] has passed a ReLU."""
    checked("relu_mask", "y", y)
    M, C = matrix(y)
    mask = y.new_empty(mask_shape(C, M), dtype=torch.int32)
    by = tiles(M, C, y)
    launch(relu_mask_kernel, by.grid, (y, mask, M, C), by.constexprs, by.num_warps)
    return mask


# ----------------------------------------------------------------------------------------------------- backward


@triton.jit
def gated(dy, mask, x, scale, shift, first, left, c0, c, C, M, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """dz [ROWS, CHANNELS]: dy where the mask, or the sign of scale*x + shift, lets it pass. x is None or a tile."""
    if mask is not None:
        return tl.where(load_mask(mask, first, left, c0, C, M, ROWS, CHANNELS), dy, 0.0)
    elif scale is not None:
        return tl.where(affine(x, scale, shift, c, C) <= 0.0, 0.0, dy)
    else:
        return dy


@triton.jit
def bn_act_backward_reduce_kernel(
    dy, mask, x, scale, shift, mean, dz, partial, M, C, dy_pitch, chunk,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dy_pitch: elements from one row of dy to the next."""
    C = whole(C, WIDTH)
    dy_pitch = whole(dy_pitch, WIDTH)
    begin, c0 = place(C, chunk, CHANNELS)
    c = c0 + tl.arange(0, CHANNELS)
    sum_dz = tl.zeros((ROWS, CHANNELS), tl.float32)
    sum_dz_xc = tl.zeros((ROWS, CHANNELS), tl.float32)
    for step in range(0, chunk, ROWS):
        first = begin + step
        valid, left = inside(first, M, c, C, ROWS)
        at = first * C + offsets(c, C, ROWS)
        g = tl.load(dy + first * dy_pitch + offsets(c, dy_pitch, ROWS), valid, other=0.0).to(tl.float32)
        u = None if x is None else tl.load(x + at, valid, other=0.0).to(tl.float32)
        g = gated(g, mask, u, scale, shift, first, left, c0, c, C, M, ROWS, CHANNELS)
        sum_dz += g
        if mean is not None:
            sum_dz_xc += g * (u - vector(mean, c, C))
        if dz is not None:
            tl.store(dz + at, g, valid)
    sums: tl.constexpr = 1 if mean is None else 2
    out = partial + begin // chunk * sums * C + c
    tl.store(out, tl.sum(sum_dz, 0), c < C)
    if mean is not None:
        tl.store(out + C, tl.sum(sum_dz_xc, 0), c < C)


def bn_act_backward_reduce(
    dy: Tensor, mask: Tensor | None, x: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    mean: Tensor | None, write_dz: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dz like dy [N, C, H, W] or [0], sum of dz [C], sum of dz * (x - mean) [C] or [0])."""
    _check_backward("bn_act_backward_reduce", dy, mask, x, scale, shift, mean=mean)
    dz = empty_nhwc(dy, dy.shape) if write_dz else dy.new_empty(0)
    by = chunked(*matrix(dy), dy, x)
    return dz, *reduce(dy, dy.shape[1], mask, x, scale, shift, mean, dz if write_dz else None, by)


def reduce(
    dy: Tensor, dy_pitch: int, mask: Tensor | None, x: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    mean: Tensor | None, dz: Tensor | None, by: Tiles,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sums of `bn_act_backward_reduce`, and dz into a tensor if there is one; rows of dy are dy_pitch elements
    apart."""
    M, C = matrix(dy)
    sum_dz, sum_dz_xc = vector_like(dy, C), vector_like(dy, C, mean is not None)
    partial = empty_partials(sum_dz, by, 1 if mean is None else 2)
    launch(
        bn_act_backward_reduce_kernel,
        by.grid,
        (dy, mask, x, scale, shift, mean, dz, partial, M, C, dy_pitch, by.chunk),
        by.constexprs,
        by.num_warps,
    )
    sum_partials(by, partial, sum_dz, None if mean is None else sum_dz_xc)
    return sum_dz, sum_dz_xc


@triton.jit
def bn_act_backward_apply_kernel(
    dy, mask, x, scale, shift, mean, coef_dz, coef_x, coef_1, addend, dx, M, C,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    C = whole(C, WIDTH)
    first, c0 = place(C, ROWS, CHANNELS)
    c = c0 + tl.arange(0, CHANNELS)
    valid, left = inside(first, M, c, C, ROWS)
    at = first * C + offsets(c, C, ROWS)
    u = tl.load(x + at, valid, other=0.0).to(tl.float32)
    g = tl.load(dy + at, valid, other=0.0).to(tl.float32)
    g = gated(g, mask, u, scale, shift, first, left, c0, c, C, M, ROWS, CHANNELS)
    g = vector(coef_dz, c, C) * g + (vector(coef_x, c, C) * (u - vector(mean, c, C)) + vector(coef_1, c, C))
    if addend is not None:
        g += tl.load(addend + at, valid, other=0.0).to(tl.float32)
    tl.store(dx + at, g, valid)


def bn_act_backward_apply(
    dy: Tensor, mask: Tensor | None, x: Tensor, scale: Tensor | None, shift: Tensor | None, mean: Tensor,
    coef_dz: Tensor, coef_x: Tensor, coef_1: Tensor, addend: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """coef_dz * dz + coef_x * (x - mean) + coef_1 [+ addend], like x [N, C, H, W]."""
    coefs = {"mean": mean, "coef_dz": coef_dz, "coef_x": coef_x, "coef_1": coef_1}
    check = _check_backward("bn_act_backward_apply", dy, mask, x, scale, shift, **coefs)
    check.activation("addend", addend, dy.shape)
    M, C = matrix(dy)
    dx = empty_nhwc(x, x.shape)
    by = tiles(M, C, dy)
    operands = (dy, mask, x, scale, shift, *coefs.values(), addend, dx, M, C)
    launch(bn_act_backward_apply_kernel, by.grid, operands, by.constexprs, by.num_warps)
    return dx


def _check_backward(op: str, dy: Tensor, mask, x, scale, shift, **vectors: Tensor | None) -> Checks:
    """The arguments that both passes share; vectors [C]: mean, which goes with x, and the coefficients."""
    check = checked(op, "dy", dy)
    check.mask("mask", mask, dy.shape)
    check.activation("x", x, dy.shape)
    check.together(scale=scale, shift=shift)
    check.vectors(dy.shape[1], scale=scale, shift=shift, **vectors)
    check.needs("x", x, scale=scale, mean=vectors["mean"])
    return check
