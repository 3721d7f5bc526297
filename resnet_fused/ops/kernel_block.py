"""`residual_block` on the matrix kernels: the same mathematics as `block.py`, with every 1x1 unit fused.

A batch norm's output never exists here. A unit's input is the raw output u of the unit before it; relu(s u + t) is
formed on the way into the tensor cores, forward and backward, and the gradient that flows between units is dz, the one
of z = s u + t, with its two sums over pixels taken in the epilogue of the kernel that wrote it.

    forward    inner unit    conv1x1 or conv2d (its statistics in the epilogue)
               end unit      gram -> statistics -> expand (shortcut, ReLU and mask in the epilogue)
    backward   end unit      conv1x1_wgrad on dy * mask (pass W), expand_dgrad (pass D)
               inner unit    conv1x1_wgrad and conv1x1_dgrad, or conv2d's, with the batch norm's backward on load; the
                             first one's epilogue adds the shortcut's gradient dy * mask

An end unit that is not 1x1 (BasicBlock's) is an inner unit whose output bn_act joins with the shortcut. What no kernel
takes (`routes.py`) goes through ATen, with bn_act and its backward around it. What is saved is what `block.py` saves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .aten import Geometry, conv, conv_backward
from .block import BlockGrads, Needs, add_shortcut, split_end_saved
from .conv2d import encoded
from .dispatch import ops as _ops
from .end_unit import UnitGrads, raw_stats, reduce, settled
from .gram_form import Gram, conv_stats, drift, output_sums, sample_center, taken_away, weight_gradient
from .layout import Padded, pixels_of, to_nhwc
from .pointwise import masked, matrix_kernels_take
from .routes import NO_NORM, Route, arch_of, is_pointwise, route_of
from .spec import BlockSpec, Norm, UnitParams, UnitSpec
from .sync import combined, summed

Pair = tuple[Tensor | None, Tensor | None]


class Source(NamedTuple):
    """A unit's input: relu(norm(u)), or u itself."""

    u: Tensor  # [N, C, H, W]
    norm: Norm | None

    @property
    def affine(self) -> Pair:
        return (None, None) if self.norm is None else (self.norm.scale, self.norm.shift)

    def activated(self) -> Tensor:
        return self.u if self.norm is None else self.norm.operand(self.u)

    def route(self, unit: UnitSpec, weight: Tensor) -> Route:
        activated, u = self.norm is not None, self.u
        return route_of(unit.geometry, tuple(weight.shape), activated, tuple(u.shape), u.dtype, arch_of(u))


class Shortcut(NamedTuple):
    """What is added to the gradient of a block's input: scale * tensor * mask."""

    tensor: Tensor | None = None  # as the input, or where the shortcut is padded, as the output
    mask: Tensor | None = None
    scale: float = 1.0
    padded: Padded | None = None

    @property
    def place(self) -> tuple[float, int, int]:
        """(scale, stride, offset) as dgrads take them."""
        return (self.scale, *(self.padded or (0, 0)))

    def added_to(self, dx: Tensor) -> Tensor:
        if self.tensor is None:
            return dx
        dz = masked(self.tensor, self.mask)
        return dx.add_(dz, alpha=self.scale) if self.padded is None else self.padded.adjoint(dz, dx, self.scale)


class Flow(NamedTuple):
    """The gradient that reaches a unit: of z with its sums (dz, dz (u - mean)), or of relu(z) without."""

    grad: Tensor
    sums: tuple[Tensor, Tensor] | None = None


def serves(params: list[UnitParams], spec: BlockSpec, *activations: Tensor | None) -> bool:
    """Whether a block runs here: the matrix kernels take its activations (the input first) and some unit."""
    x = activations[0]
    if x is None or not x.numel() or not matrix_kernels_take(x):
        return False
    if any(t.data_ptr() % 16 for t in (*activations, *(p.weight for p in params)) if t is not None):
        return False  # a view into something: the kernels read 16 bytes at a time
    weights = [p.weight for p in params]
    if any(u.plan == "gram" and any(n % 8 for n in w.shape[:2]) for u, w in zip(spec.units, weights, strict=True)):
        return False  # planned for a CPU
    return any(own.kernel != "aten" for own in routes_of(spec, weights, tuple(x.shape), x.dtype, arch_of(x)))


def routes_of(
    spec: BlockSpec, weights: Sequence[Tensor], x_shape: tuple[int, ...], dtype: torch.dtype, arch: int = 80
) -> list[Route]:
    """How each unit's convolution runs, the projection last, for an input [N, C, H, W]."""
    found, shape = [], x_shape
    for i, (unit, weight) in enumerate(zip(spec.units, weights, strict=False)):
        shape = x_shape if i == spec.chain else shape
        found.append(route_of(unit.geometry, tuple(weight.shape), 0 < i < spec.chain, shape, dtype, arch))
        shape = unit.geometry.out_shape(shape, weight.shape)
    return found


def _channels_last(params: list[UnitParams]) -> list[UnitParams]:
    """Weights as the kernels read them: a copy of each that lies otherwise, which none does after `fuse_`."""
    return [p._replace(weight=to_nhwc(p.weight)) for p in params]


# --------------------------------------------------------------------------------------------- forward


class End(NamedTuple):
    """An end unit after its statistics; `raw` [N, K, P, Q] is None in the Gram form."""

    source: Source
    weight: Tensor
    geometry: Geometry
    norm: Norm
    raw: Tensor | None
    stats: tuple[Tensor, ...]
    saved: tuple[Tensor, ...]

    @property
    def stride(self) -> int:
        return self.geometry.stride[0]

    @property
    def pointwise(self) -> bool:
        return is_pointwise(self.geometry, tuple(self.weight.shape), self.source.norm is not None)


def forward(
    x: Tensor, residual: Tensor | None, params: list[UnitParams], spec: BlockSpec
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(y, statistics, saved), as `block.forward`."""
    params = _channels_last(params)
    stats: list[Tensor] = []
    saved: list[Tensor] = []
    source, last = Source(x, None), spec.chain - 1
    for unit, p in zip(spec.units[:last], params[:last], strict=True):
        u, own = _conv(unit, p.weight, source, unit.batch_stats)
        own = settled(unit, own, u)
        stats += own
        saved += [u] if spec.save else []
        source = Source(u, p.norm(unit, *own))
    sources = [source, *([Source(x, None)] if spec.shortcut == "projection" else [])]
    ends = _ends(list(zip(spec.units[last:], params[last:], sources, strict=True)), spec)
    y, mask = _join(ends, x if spec.from_x else residual, spec)
    for end in ends:
        stats += end.stats
        saved += end.saved
    return y, stats, saved + ([mask] if spec.save and spec.relu else [])


def _conv(unit: UnitSpec, weight: Tensor, source: Source, stats: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(raw output, its mean and variance if they are wanted)"""
    own_route = source.route(unit, weight)
    if own_route.fprop is None:
        u, *own = own_route.conv(source.u, weight, source.affine, unit.geometry, stats)
        return u, tuple(own) if stats else ()
    u = conv(source.activated(), weight, unit.geometry)
    return u, raw_stats(unit, u) if stats else ()


def _ends(units: list[tuple[UnitSpec, UnitParams, Source]], spec: BlockSpec) -> list[End]:
    found = [_end(*at, spec) for at in units]
    (unit, p, source), *_ = units
    n, _, *size = unit.geometry.out_shape(source.u.shape, p.weight.shape)
    stats = combined([own for _, own, _ in found], n * math.prod(size), [unit.group for unit, *_ in units])
    return [
        End(source, p.weight, unit.geometry, p.norm(unit, *own), raw, own, saved)
        for (unit, p, source), (raw, _, saved), own in zip(units, found, stats, strict=True)
    ]


def _end(
    unit: UnitSpec, p: UnitParams, source: Source, spec: BlockSpec
) -> tuple[Tensor | None, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(raw output, None in the Gram form or where no pass needs it; statistics of this process; saved)"""
    geometry, save = unit.geometry, spec.save
    if unit.plan == "gram":
        center = sample_center(source.u, *source.affine)
        gram = Gram(center, *_ops.gram(source.u, *source.affine, center, geometry.stride[0]))
        return None, conv_stats(gram, p.weight), tuple(gram) if save else ()
    takes = source.route(unit, p.weight).fprop is None
    raw_wanted = unit.batch_stats or (save and unit.needs_raw) or not spec.adds_as_it_is
    if takes and not raw_wanted:  # statistics are given: one product does all
        return None, (), ()
    raw, own = _conv(unit, p.weight, source, unit.batch_stats)
    kept = save and unit.plan == "keep" and unit.needs_raw
    return raw, own, (raw,) if kept else ()


def _expand(end: End, residual: Tensor | None, relu: bool, save_mask: bool) -> tuple[Tensor, Tensor]:
    norm, tail = end.norm, (residual, relu, save_mask)
    if not end.pointwise:
        geometry = encoded(end.geometry)
        return _ops.conv2d_bn_act(
            end.source.u, end.weight, *end.source.affine, geometry, norm.scale, norm.shift, *tail
        )  # fmt: skip
    u = (
        end.source.u
        if end.stride == 1
        else end.source.u[:, :, :: end.stride, :: end.stride].contiguous(memory_format=torch.channels_last)
    )  # only where a projection has no main path in the Gram form to go with
    return _ops.expand(u, *end.source.affine, end.weight, norm.scale, norm.shift, None, None, None, 1, *tail)


def _join(ends: list[End], residual: Tensor | None, spec: BlockSpec) -> tuple[Tensor, Tensor]:
    """act(sum of the ends + residual), and its mask."""
    main, *projection = ends
    tail = (spec.relu, spec.relu and spec.save)
    unformed = all(end.raw is None for end in ends)
    if projection and unformed and main.pointwise and main.source.norm is not None and projection[0].pointwise:
        other = projection[0]  # the dual GEMM: both products, both batch norms, the sum and the ReLU
        return _ops.expand(
            main.source.u, *main.source.affine, main.weight, main.norm.scale, main.norm.shift + other.norm.shift,
            other.source.u, other.weight, other.norm.scale, other.stride, None, *tail,
        )  # fmt: skip
    other_affine: Pair = (None, None)
    if projection:
        other = projection[0]
        if other.raw is None:
            residual = _expand(other, None, False, False)[0]
        elif main.raw is None:
            residual = _ops.bn_act(other.raw, other.norm.scale, other.norm.shift, None, None, None, False, False)[0]
        else:
            residual, other_affine = other.raw, (other.norm.scale, other.norm.shift)
    if main.raw is None:
        return _expand(main, residual, *tail)
    if projection:
        return _ops.bn_act(main.raw, main.norm.scale, main.norm.shift, residual, *other_affine, *tail)
    return add_shortcut(main.raw, main.norm, residual, spec, *tail)


# -------------------------------------------------------------------------------------------- backward


class Gate(NamedTuple):
    """How dz follows from the gradient at hand: through a mask, the sign of scale*u + shift, or as it is."""

    mask: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None


def backward(
    dy: Tensor,
    x: Tensor,
    params: list[UnitParams],
    norms: list[Norm],
    saved: list[Tensor],
    spec: BlockSpec,
    needs: Needs,
) -> BlockGrads:
    """As `block.backward`; `dz` is formed only where a residual's gradient is asked for."""
    params, last = _channels_last(params), spec.chain - 1
    raws, mask = saved[:last], saved[-1] if spec.relu else None
    ends = split_end_saved(saved[last:], spec)
    sources = [Source(x, None), *map(Source, raws, norms[:last])]
    shortcut = Shortcut()
    if spec.from_x and needs.x and spec.shortcut_scale != 0:
        concat, padded = spec.shortcut == "concat", spec.shortcut in ("padded", "concat")
        shortcut = Shortcut(dy, None if concat else mask, spec.shortcut_scale, spec.padded if padded else None)

    def wanted(i: int) -> tuple[bool, bool]:
        return i > 0 or needs.x, needs.weights[i]

    at = (spec.units[last], params[last], norms[last], ends[0], sources[last])
    before = x.shape[1] if spec.shortcut == "concat" else 0
    flow, grads = _end_backward(*at, dy, mask, wanted(last), Shortcut() if last else shortcut, before)
    units = [grads]
    for i in reversed(range(last)):
        first = shortcut if i == 0 else Shortcut()
        flow, grads = _inner_backward(spec.units[i], params[i], norms[i], raws[i], sources[i], flow, wanted(i), first)
        units.insert(0, grads)
    dx = flow.grad
    if spec.shortcut == "projection":
        at = (spec.units[-1], params[-1], norms[-1], ends[1], sources[0])
        flow, grads = _end_backward(*at, dy, mask, (needs.x, needs.weights[-1]), Shortcut(dx if needs.x else None))
        units.append(grads)
        dx = flow.grad
    dz = masked(dy, mask) if spec.shortcut == "residual" else dy
    if spec.shortcut == "residual" and spec.shortcut_scale != 1:
        dz = dz * spec.shortcut_scale
    return BlockGrads(dx, dz, units)


def _end_backward(
    unit: UnitSpec, p: UnitParams, norm: Norm, saved: list[Tensor], source: Source, dy: Tensor, mask: Tensor | None,
    needs: tuple[bool, bool], shortcut: Shortcut, before: int = 0,
) -> tuple[Flow, UnitGrads]:  # fmt: skip
    """before: how many channels of dy lie in front of the unit's."""
    if unit.plan == "gram":
        return _gram_backward(unit, p, norm, Gram(*saved), source, dy, mask, needs[0], shortcut)
    if not unit.needs_raw:  # given statistics and no gradient for gamma: du = s dz
        dz, (dbeta, _) = reduce(dy, mask, None, norm, True, before)
        du = _ops.bn_act(dz, norm.scale, torch.zeros_like(norm.scale), None, None, None, False, False)[0]
        flow, dw = _through_conv(unit, p.weight, source, (du, *NO_NORM), needs, shortcut)
        return flow, UnitGrads(dw, torch.zeros_like(norm.scale), dbeta)
    raw = saved[0] if unit.plan == "keep" else _conv(unit, p.weight, source, False)[0]
    dz, (dbeta, dzx) = reduce(dy, mask, raw, norm, False, before)
    if before:  # a tensor of its own, as the convolution's kernels read it
        dy, mask = dz, None
    flow, dw = _conv_backward(unit, p.weight, norm, raw, source, dy, Gate(mask), (dbeta, dzx), needs, shortcut)
    return flow, UnitGrads(dw, norm.rstd * dzx, dbeta)


def _inner_backward(
    unit: UnitSpec, p: UnitParams, norm: Norm, raw: Tensor, source: Source, flow: Flow, needs: tuple[bool, bool],
    shortcut: Shortcut,
) -> tuple[Flow, UnitGrads]:  # fmt: skip
    sums, gate = flow.sums, Gate()
    if sums is None:
        gate = Gate(None, norm.scale, norm.shift)
        _, *own = _ops.bn_act_backward_reduce(flow.grad, *gate[:1], raw, *gate[1:], norm.mean, False)
        sums = (own[0], own[1])
    flow, dw = _conv_backward(unit, p.weight, norm, raw, source, flow.grad, gate, sums, needs, shortcut)
    return flow, UnitGrads(dw, norm.rstd * sums[1], sums[0])


def _conv_backward(
    unit: UnitSpec, weight: Tensor, norm: Norm, raw: Tensor, source: Source, grad: Tensor, gate: Gate,
    sums: tuple[Tensor, Tensor], needs: tuple[bool, bool], shortcut: Shortcut,
) -> tuple[Flow, Tensor]:  # fmt: skip
    """From the gradient at a unit's output to (that of its input, dW): du = s (dz - dbeta/M - xhat dgamma/M)."""
    whole = summed(*sums, pixels_of(raw), unit.group) if unit.batch_stats else None
    prologue = (gate.mask, raw, gate.scale, gate.shift, norm.mean, norm.scale, *norm.coefficients(whole))
    return _through_conv(unit, weight, source, (grad, *prologue), needs, shortcut)


def _through_conv(
    unit: UnitSpec, weight: Tensor, source: Source, du: tuple, needs: tuple[bool, bool], shortcut: Shortcut
) -> tuple[Flow, Tensor]:
    """(gradient of the unit's input, dW). du: dy, and what the batch norm's backward makes of it on load."""
    own = source.route(unit, weight)
    by_aten = (needs[0] and own.dgrad is not None, needs[1] and own.wgrad is not None)
    dw, flow = weight.new_empty(0), Flow(du[0].new_empty(0))
    if any(by_aten):
        formed = du[0] if du[2] is None else _ops.bn_act_backward_apply(*du)
        da, dw = conv_backward(formed, source.activated(), weight, unit.geometry, *by_aten)
        flow = Flow(shortcut.added_to(da) if by_aten[0] else da)
    if needs[1] and not by_aten[1]:
        dw = own.conv_wgrad(du, source.u, source.affine, weight, unit.geometry)
    if needs[0] and not by_aten[0]:
        flow = _dgrad(own, unit, weight, du, source, shortcut)
    return flow, dw


def _dgrad(own: Route, unit: UnitSpec, weight: Tensor, du: tuple, source: Source, shortcut: Shortcut) -> Flow:
    u = source.u
    end: tuple[Any, ...] = (*shortcut[:2], None, None, None, None, *shortcut.place)
    if source.norm is not None:
        end = (None, None, u, source.norm.scale, source.norm.shift, source.norm.mean)
    dx, *sums = own.conv_dgrad(du, weight, u, unit.geometry, end)
    return Flow(dx, (sums[0], sums[1]) if source.norm is not None else None)


def _gram_backward(
    unit: UnitSpec, p: UnitParams, norm: Norm, gram: Gram, source: Source, dy: Tensor, mask: Tensor | None,
    need_input: bool, shortcut: Shortcut,
) -> tuple[Flow, UnitGrads]:  # fmt: skip
    """Pass W and pass D; the formulas are at the head of `gram_form.py`."""
    stride, dtype = unit.geometry.stride[0], dy.dtype
    none = (None,) * 7
    g, dbeta = _ops.conv1x1_wgrad(dy, mask, *none, source.u, *source.affine, stride, True, True)
    w = p.weight.flatten(1).to(dbeta.dtype)  # [K, C]
    mean = gram.center + gram.mean
    g = g.flatten(1).addr(dbeta, mean, alpha=-1)
    away = None if unit.group is None else drift(gram, p.weight, norm.mean)
    dzx = output_sums(g, p.weight, dbeta, away)
    taken = taken_away(norm.rstd, summed(dbeta, dzx, pixels_of(dy), unit.group), away)
    dw = weight_gradient(g, gram, p.weight, norm.scale, dbeta, taken, pixels_of(dy), away is not None)
    grads = UnitGrads(dw, norm.rstd * dzx, dbeta)
    if not need_input:
        return Flow(dy.new_empty(0)), grads
    minus_q = (w.t() @ (w * (-norm.scale * taken.slope).unsqueeze(1))).to(dtype)
    # With the rounded Q: rounding it then moves no channel's mean, however far that is from 0.
    constant = -(mean @ minus_q.to(mean.dtype)) - w.t() @ (norm.scale * taken.level)
    into_a = (w * norm.scale.unsqueeze(1)).to(dtype).view_as(p.weight)
    end: tuple[Any, ...]
    if source.norm is None:
        end = (None, None, minus_q, constant, None, stride, *shortcut[:2])
        return Flow(_ops.expand_dgrad(dy, mask, into_a, source.u, *end)[0]), grads
    end = (*source.affine, minus_q, constant, source.norm.mean, 1, None, None)
    dz, *sums = _ops.expand_dgrad(dy, mask, into_a, source.u, *end)
    return Flow(dz, (sums[0], sums[1])), grads
