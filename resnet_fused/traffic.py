"""Bytes that a unit moves through memory, forward and backward: eager PyTorch's and ours, counted by passes.

A pass is one read or one write of a whole activation. Eager's, in training (an op's passes over its tensors):

    conv      read input, write output           dgrad: read dout, write din;  wgrad: read dout, input
    norm      read input twice, write output     backward: read dout and input twice, write din
    relu      read, write (in place)             backward: read dout and output, write din
    add       read both, write                   backward: add the two gradients of x: read both, write

torch.compile's: convolutions as above, and between them kernels that read and write each tensor once: statistics,
normalise + ReLU (+ add), the two sums of the backward, and its application.

Ours is what `ops/block.py`, or on a GPU `ops/kernel_block.py`, executes, op by op. Per-channel vectors and weights are
left out: they are small. `counting.py` has another measure, of a run.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .ops import kernel_block
from .ops.spec import BlockSpec


class Bytes(NamedTuple):
    """Traffic of a forward and a backward pass, and what is kept between them."""

    forward: float
    backward: float
    saved: float

    @property
    def moved(self) -> float:
        return self.forward + self.backward

    def plus(self, other: Bytes) -> Bytes:
        return Bytes(*(a + b for a, b in zip(self, other, strict=True)))


class Sizes(NamedTuple):
    """Bytes of a block's activations."""

    x: int
    strided: int  # of the pixels of x that a projection reads
    outs: list[int]  # of each chain unit's raw output, equal to its activation's
    shortcut: int  # what the sum reads of it; 0 without one
    projected: bool
    pointwise: bool  # whether the first unit is a 1x1 convolution
    mask: float

    @property
    def ins(self) -> list[int]:
        return [self.x, *self.outs[:-1]]


def sizes_of(x_shape: tuple[int, ...], itemsize: int, units: tuple, spec: BlockSpec) -> Sizes:
    """Sizes for ConvBN `units` (main path only) and the block's spec."""
    shape, outs = x_shape, []
    for unit in units:
        shape = unit.geometry.out_shape(shape, unit.weight.shape)
        outs.append(math.prod(shape) * itemsize)
    n, k, p, q = shape
    rows, columns = spec.units[-1].geometry.stride
    mask = 4 * math.ceil(k / 32) * n * p * q if spec.relu else 0
    shortcut = 0 if spec.shortcut == "none" else outs[-1]
    if spec.shortcut == "concat":
        shortcut = math.prod(x_shape) * itemsize
    if spec.shortcut == "padded":
        shortcut = n * x_shape[1] * p * q * itemsize
    return Sizes(
        x=math.prod(x_shape) * itemsize,
        strided=x_shape[0] * x_shape[1] * math.ceil(x_shape[2] / rows) * math.ceil(x_shape[3] / columns) * itemsize,
        outs=outs,
        shortcut=shortcut,
        projected=spec.shortcut == "projection",
        pointwise=tuple(units[0].weight.shape[2:]) == (1, 1),
        mask=mask,
    )


def eager_bytes(s: Sizes, spec: BlockSpec) -> Bytes:
    """Eager PyTorch's passes in a training step (see the module's head)."""
    fwd = bwd = saved = 0.0
    for i, (a, u) in enumerate(zip(s.ins, s.outs, strict=True)):
        last = i == len(s.outs) - 1
        relu = not last or spec.relu
        fwd += (a + u) + 3 * u + 2 * u * relu
        bwd += 3 * u * relu + 5 * u + (u + a) + (u + a)
        saved += u + u * relu
    y = s.outs[-1]
    if s.shortcut:
        fwd += 2 * (s.x + y) if spec.shortcut == "concat" else 2 * y + y
        bwd += 3 * s.x
    if spec.shortcut == "padded":  # made as a tensor of its own; its gradient read, and scattered
        fwd += s.shortcut + y
        bwd += s.shortcut + s.x
    if s.projected:
        fwd += s.x + y + 3 * y
        bwd += 5 * y + 2 * (y + s.x)
        saved += y
    return Bytes(fwd, bwd, saved + s.x)


def compile_bytes(s: Sizes, spec: BlockSpec) -> Bytes:
    """torch.compile's passes in a training step (see the module's head)."""
    fwd = bwd = saved = 0.0
    for i, (a, u) in enumerate(zip(s.ins, s.outs, strict=True)):
        last = i == len(s.outs) - 1
        fwd += (a + u) + u + 2 * u  # convolution, statistics, normalise
        bwd += 2 * u + 3 * u + (u + a) + (u + a)  # sums, application, dgrad, wgrad
        saved += u + u * (not last or spec.relu)
    y = s.outs[-1]
    if s.shortcut:
        fwd += 2 * s.x if spec.shortcut == "concat" else y  # the residual, read by the last kernel
        bwd += y * spec.relu * 2 + s.x * 3  # relu' of y in both passes; the gradients of x added
    if s.projected:
        fwd += s.x + y + y  # convolution, statistics
        bwd += 2 * y + 3 * y + 2 * (y + s.x)
        saved += y
    return Bytes(fwd, bwd, saved + s.x)


def kernel_bytes(s: Sizes, spec: BlockSpec, on_kernels: list[bool]) -> Bytes:
    """What `ops/kernel_block.py` moves. `on_kernels`: which units (the projection last) the matrix kernels take; the
    others go through ATen with the fused tails around it."""
    fwd = bwd = 0.0
    saved = s.x + s.mask
    y, last = s.outs[-1], len(s.outs) - 1
    flows = False  # whether dz comes with its sums from the unit behind
    for i in reversed(range(last + 1)):
        a, u, kernel = s.ins[i], s.outs[i], on_kernels[i]
        if i == last:
            unit = _kernel_end(spec.units[last].plan, a, u, s.mask, kernel, last > 0)
        else:
            sums = 0 if flows else 2 * u
            unit = Bytes(
                (a + u) + (0 if kernel else u + (2 * a if i else 0)), sums + _conv_backward(a, u, kernel, i), u
            )
        flows = kernel
        fwd, bwd, saved = fwd + unit.forward, bwd + unit.backward, saved + unit.saved
    grams = sum(u.plan == "gram" for u in spec.units)
    joined = s.ins[-1] if spec.units[last].plan == "gram" else y
    fwd += joined + y + s.mask + (s.shortcut if not s.projected else s.x if grams == 2 else y)
    if s.projected and grams == 1:  # the two ends have no product in common: one's output is the other's residual
        gram = spec.units[-1].plan == "gram"  # a product of its own, of a strided input's copy, or a batch norm's pass
        fwd += ((3 if s.strided < s.x else 1) * s.strided + y) if gram else 2 * y
    if s.projected:
        end = _kernel_end(spec.units[-1].plan, s.x, y, s.mask, on_kernels[-1], False)
        fwd, bwd, saved = fwd + end.forward, bwd + end.backward + s.x, saved + end.saved
    elif spec.shortcut == "concat":  # x written; dz, written for the kernels, gated; dy, read by the first unit's dgrad
        fwd, bwd = fwd + s.x, bwd + y - (2 if on_kernels[last] else 1) * s.mask + s.x
    elif s.shortcut:
        bwd += s.shortcut + s.mask  # dy * mask, read by the first unit's dgrad
    return Bytes(fwd, bwd, saved)


def _conv_backward(a: float, u: float, kernel: bool, inner: int) -> float:
    """dgrad and wgrad of a unit from dz and u; an inner unit's input is relu of a raw output."""
    if kernel:  # both read dz, u and their operand (dgrad's is a gate, where there is one)
        return (2 * u + a + (a if inner else 0)) + (2 * u + a)
    return 3 * u + (2 * a if inner else 0) + (u + a) + (u + a)


def _kernel_end(plan: str, a: float, u: float, mask: float, kernel: bool, inner: bool) -> Bytes:
    """An end unit before the join, and its backward from dy and the mask; `a` is its operand, `u` its output."""
    if plan == "gram":
        return Bytes(a, (u + mask + a) + (u + mask + a + a), 0)  # gram; pass W; pass D
    forward = (a + u) + (0 if kernel else u + (2 * a if inner else 0))
    backward = 2 * u + mask + _conv_backward(a, u, kernel, inner) + (2 * mask if kernel else mask)
    if plan == "recompute":
        backward += a + u + (0 if kernel or not inner else 2 * a)
    return Bytes(forward, backward, u if plan == "keep" else 0)


def _end_bytes(plan: str, a: float, u: float, prologue: bool, sums: float) -> Bytes:
    """An end unit before the join, and its backward after dz; `a` is its operand's size, `u` its output's, `sums` what
    the two sums of its batch norm read beside what forms dz."""
    operand = 2 * a if prologue else 0  # read the raw output, write the activation
    if plan == "gram":
        operand = 2 * a
        forward = operand + 2 * a  # the Gram product reads its operand on both sides
        return Bytes(forward, operand + (a + u) + (u + a) + 3 * a, 0)
    backward = operand + sums + 3 * u + (u + a) + (u + a)
    if plan == "recompute":
        backward += a + u
    return Bytes(operand + (a + u) + u, backward, u if plan == "keep" else 0)


def fused_bytes(s: Sizes, spec: BlockSpec) -> Bytes:
    """What `ops/block.py` moves through ATen convolutions and the fused tails."""
    last = len(s.outs) - 1
    fwd = bwd = 0.0
    saved = s.x + s.mask
    for i, (a, u) in enumerate(zip(s.ins[:-1], s.outs[:-1], strict=True)):
        operand = 2 * a if i else 0
        fwd += operand + (a + u) + u
        bwd += 2 * u + 3 * u + operand + (u + a) + (u + a)
        saved += u
    y = s.outs[last]
    ends = [_end_bytes(spec.units[last].plan, s.ins[-1], y, last > 0, y)]  # in the pass that forms dz
    if s.projected:
        ends.append(_end_bytes(spec.units[-1].plan, s.x, y, False, 2 * y))
    for end in ends:
        fwd, bwd, saved = fwd + end.forward, bwd + end.backward, saved + end.saved
    grams = sum(u.plan == "gram" for u in spec.units)
    # The join reads each operand (a Gram unit's instead of its raw output), writes y and the mask.
    joined = s.ins[-1] if spec.units[last].plan == "gram" else y
    fwd += joined + y + s.mask + (s.shortcut if not s.projected else s.x if grams == 2 else y)
    bwd += (2 * y + s.mask) if spec.relu else y
    if spec.shortcut == "concat":  # x written; dz written in any case; dy added
        fwd, bwd = fwd + s.x, bwd + (0 if spec.relu else y) + 3 * s.x
    elif spec.shortcut == "padded":  # added to every stride-th pixel
        bwd += 3 * s.shortcut
    elif s.shortcut:  # a 1x1 convolution's dgrad adds the identity's gradient
        bwd += s.x if last > 0 and not s.projected and s.pointwise else 3 * s.x
    return Bytes(fwd, bwd, saved)


def block_sizes(call: Any) -> Sizes:
    """Of a recorded call of a block."""
    return sizes_of(call.x_shape, call.dtype.itemsize, call.units, call.spec)


def block_bytes(call: Any) -> tuple[Bytes, Bytes]:
    """(eager, ours) of a recorded call."""
    sizes = block_sizes(call)
    if call.kernels and any(on_kernels := units_on_kernels(call)):
        return eager_bytes(sizes, call.spec), kernel_bytes(sizes, call.spec, on_kernels)
    return eager_bytes(sizes, call.spec), fused_bytes(sizes, call.spec)


def units_on_kernels(call: Any) -> list[bool]:
    """Which units of a recorded block (the projection last) the matrix kernels take."""
    weights = [conv.weight for conv in (*call.units, call.shortcut)[: len(call.spec.units)]]
    routes = kernel_block.routes_of(call.spec, weights, call.x_shape, call.dtype)
    return [own.kernel != "aten" for own in routes]


class StemSizes(NamedTuple):
    """Bytes of the stem: its image (0 where the call is of its tail alone), the convolution's output u, the pooled y;
    and how many elements y has."""

    image: int
    u: int
    y: int
    pooled: int

    @classmethod
    def of(cls, call: Any) -> StemSizes:
        shape, image, pool, size = call.x_shape, 0, call.spec, call.dtype.itemsize
        if call.units:
            (unit,) = call.units
            shape, image = unit.geometry.out_shape(shape, unit.weight.shape), math.prod(shape) * size
        n, c, h, w = shape
        pooled = n * c * math.prod((side + 2 * pool.padding - pool.kernel) // pool.stride + 1 for side in (h, w))
        return cls(image, math.prod(shape) * size, pooled * size, pooled)


def stem_bytes(call: Any) -> tuple[Bytes, Bytes]:
    """(eager, ours) of batch norm + ReLU + max pool; the argmax is int64 there and int8 here.

    With a unit in the call that unit's convolution, on the kernels, is counted too. An image needs no gradient.
    """
    image, u, p, pooled = StemSizes.of(call)
    eager = Bytes(3 * u + 2 * u + (u + p + 8 * pooled), (p + 8 * pooled + u) + 3 * u + 5 * u, 2 * u + 8 * pooled)
    if not call.units:
        return eager, Bytes(u + (u + p + pooled), (p + pooled + u) + 2 * u + 3 * u, u + pooled)
    backward = (p + pooled + u) + 2 * u + (2 * u + image)  # unpool, sums, wgrad
    return eager.plus(Bytes(image + u, u + image, image)), Bytes(
        image + u + (u + p + pooled), backward, image + u + pooled
    )


def compiled_stem(call: Any, image: int) -> Bytes:
    """torch.compile's, with an int8 argmax, of an image of so many bytes."""
    _, u, p, pooled = StemSizes.of(call)
    forward = (image + u) + u + 2 * u + (u + p + pooled)
    return Bytes(forward, (p + pooled + u) + 2 * u + 3 * u + (u + image), image + 2 * u + pooled)
