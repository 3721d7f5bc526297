"""`residual_block`: a chain of conv + batch norm units with its shortcut, forward and backward.

    y = act(bn_n(conv_n(... relu(bn_1(conv_1(x))))) + shortcut(x))

or with shortcut "concat", [x | act(bn_n(...))] along the channels.

This file holds the mathematics of the whole block on tensors that are already checked: the op's schema is in
`residual_block.py` beside its fake and its autograd, the user's edge in `functional.py`.

Saved for backward: x, the raw conv outputs of the inner units, one bit per output element, and per end unit
(the last of the chain, and the projection) what its plan says:

    keep        its raw output
    recompute   nothing: the convolution runs again in backward
    gram        the small Gram matrices of its operand: the raw output is never formed as such, but for the output
                channels whose variance cancels in it (`gram.cancelling`): those are convolved in both passes

Activations relu(s u + t) are never stored: they are recomputed from u.

A norm whose unit has a group normalises with the statistics of all of its processes' batches, and its backward uses
sums over them (`sync.py`). What is recomputed is each process's own affair.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from .aten import POINTWISE, Geometry, conv, conv_backward, fused_conv, has_fused_conv
from .dispatch import ops as _ops
from .end_unit import (
    End,
    EndSums,
    Source,
    UnitGrads,
    channels,
    end_backward,
    end_input,
    end_rows,
    end_units,
    raw_stats,
    reduce,
    saved_count,
    settled,
)
from .gram_form import cancelling, expand
from .norm_relu import relu_bn_backward
from .spec import BlockSpec, Norm, UnitParams, UnitSpec

# --------------------------------------------------------------------------------------------- forward


def forward(
    x: Tensor, residual: Tensor | None, params: list[UnitParams], spec: BlockSpec
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(y, statistics, saved): see the module's head and `residual_block.py` for the order of the lists."""
    if not spec.save and all(not u.batch_stats for u in spec.units) and has_fused_conv(x):
        return forward_folded(x, residual, params, spec), [], []
    stats: list[Tensor] = []
    saved: list[Tensor] = []
    u, prologue = x, None
    last = spec.chain - 1
    for unit, p in zip(spec.units[:last], params[:last], strict=True):
        u = conv(u if prologue is None else prologue.operand(u), p.weight, unit.geometry)
        own = settled(unit, raw_stats(unit, u), u)
        prologue = p.norm(unit, *own)
        stats += own
        saved += [u] if spec.save else []
    sources = [Source(spec.units[last], params[last], u, prologue)]
    if spec.shortcut == "projection":
        sources.append(Source(spec.units[-1], params[-1], x, None))
    ends = end_units(sources, spec.save)
    residual = x if spec.from_x else residual
    y, mask = _join(ends, residual, spec)
    found = [cancelling(e.gram, s.params.weight, e.norm.var) for s, e in zip(sources, ends, strict=True) if e.gram]
    if any(rows.numel() for rows in found):
        mask = _recompute_rows(torch.cat(found).unique(), sources, ends, y, mask, residual, spec)
    for end in ends:
        stats += end.stats
        saved += end.saved
    return y, stats, saved + ([mask] if spec.save and spec.relu else [])


def _join(ends: list[End], residual: Tensor | None, spec: BlockSpec) -> tuple[Tensor, Tensor]:
    """act(sum of the ends + residual), and relu's mask."""
    branches = [e.branch for e in ends if e.branch is not None]
    raws = [e for e in ends if e.raw is not None]
    if not raws:
        return expand(branches, residual, spec.relu, spec.save)
    tail = (spec.relu, spec.relu and spec.save)
    main = raws[0]
    if branches:  # one of the two is a Gram unit: its output is the other's residual
        residual, _ = expand(branches, None, False, False)
        return _ops.bn_act(main.raw, main.norm.scale, main.norm.shift, residual, None, None, *tail)
    if len(raws) == 2:
        other = raws[1]
        return _ops.bn_act(
            main.raw, main.norm.scale, main.norm.shift, other.raw, other.norm.scale, other.norm.shift, *tail
        )
    assert main.raw is not None
    return add_shortcut(main.raw, main.norm, residual, spec, *tail)


def add_shortcut(
    raw: Tensor, norm: Norm, residual: Tensor | None, spec: BlockSpec, relu: bool, save_mask: bool
) -> tuple[Tensor, Tensor]:
    """act(norm(raw) + the shortcut that is no projection) and its mask, in one pass; with "concat" [x | act(norm(raw))]
    and the mask of the second part."""
    if spec.shortcut == "concat":
        assert residual is not None
        return _ops.concat_act(residual, raw, norm.scale, norm.shift, relu, save_mask)
    if spec.adds_as_it_is or residual is None:
        return _ops.bn_act(raw, norm.scale, norm.shift, residual, None, None, relu, save_mask)
    place = spec.padded if spec.shortcut == "padded" else (0, 0)
    scale = shift = None
    if spec.shortcut_scale != 1:
        scale, shift = torch.full_like(norm.scale, spec.shortcut_scale), torch.zeros_like(norm.shift)
    return _ops.bn_act(raw, norm.scale, norm.shift, residual, scale, shift, relu, save_mask, *place)


def _recompute_rows(
    rows: Tensor, sources: list[Source], ends: list[End], y: Tensor, mask: Tensor, residual: Tensor | None,
    spec: BlockSpec,
) -> Tensor:  # fmt: skip
    """Computes the output channels `rows` without the Gram form, into y and the statistics; returns relu's mask."""
    thin = [end_rows(rows, source, end) for source, end in zip(sources, ends, strict=True)]
    part, _ = _join(thin, None if residual is None else channels(residual, rows), spec._replace(save=False))
    y[:, rows] = part.to(y.dtype)
    for end, own in zip(ends, thin, strict=True):
        for stat, exact in zip(end.stats, own.stats, strict=False):  # a group's are settled already
            stat[rows] = exact
    return _ops.relu_mask(y) if mask.numel() else mask


def forward_folded(x: Tensor, residual: Tensor | None, params: list[UnitParams], spec: BlockSpec) -> Tensor:
    """Inference with given statistics: every batch norm folds into its convolution's weights."""

    def folded(unit: UnitSpec, p: UnitParams) -> tuple[Tensor, Tensor, Geometry]:
        norm = p.norm(unit)
        weight = (p.weight * norm.scale.view(-1, 1, 1, 1)).to(x.dtype)
        return weight, norm.shift.to(x.dtype), unit.geometry

    chain = list(zip(spec.units, params, strict=True))[: spec.chain]
    a = x
    for unit, p in chain[:-1]:
        a = fused_conv(a, *folded(unit, p), relu=True)
    projected = spec.shortcut == "projection"
    if projected:
        residual = fused_conv(x, *folded(spec.units[-1], params[-1]))
    elif spec.from_x:
        residual = x
    if not spec.adds_as_it_is:
        unit, p = chain[-1]
        return add_shortcut(conv(a, p.weight, unit.geometry), p.norm(unit), residual, spec, spec.relu, False)[0]
    return fused_conv(a, *folded(*chain[-1]), residual=residual, relu=spec.relu, into_residual=projected)


# -------------------------------------------------------------------------------------------- backward


class BlockGrads(NamedTuple):
    x: Tensor  # empty where it was not asked for
    dz: Tensor  # the residual's gradient
    units: list[UnitGrads]


class Needs(NamedTuple):
    """Which gradients of large tensors are asked for."""

    x: bool
    weights: list[bool]


def backward(
    dy: Tensor,
    x: Tensor,
    params: list[UnitParams],
    norms: list[Norm],
    saved: list[Tensor],
    spec: BlockSpec,
    needs: Needs,
) -> BlockGrads:
    """Gradients of `forward`; `saved` as it returned them, `norms` from its statistics."""
    last = spec.chain - 1
    raws = saved[:last]
    end_saved = split_end_saved(saved[last:], spec)
    u, prologue = (raws[-1], norms[last - 1]) if last else (x, None)
    source = Source(spec.units[last], params[last], u, prologue)
    main = end_input(source, end_saved[0])
    mask = saved[-1] if spec.relu else None
    concat = spec.shortcut == "concat"
    dz, sums = reduce(dy, mask, main.raw, norms[last], spec.relu, x.shape[1] if concat else 0)
    dz = dz if spec.relu or concat else dy
    identity = (dy if concat else dz) if spec.from_x and needs.x else None
    wanted = (last > 0 or needs.x, needs.weights[last])
    da, grads = end_backward(source, norms[last], end_saved[0], main, dz, sums, wanted)
    del main  # its memory may serve the next gradients, and so may da's below
    units = [grads]
    for i in reversed(range(last)):
        unit = spec.units[i]
        du, dgamma, own_dbeta = relu_bn_backward(da, raws[i], norms[i], unit.batch_stats, unit.group)
        del da
        a = norms[i - 1].operand(raws[i - 1]) if i else x
        da, dw = _conv_backward_add(
            du,
            a,
            params[i].weight,
            unit.geometry,
            (i > 0 or needs.x, needs.weights[i]),
            None if i else identity,
            spec,
        )
        units.insert(0, UnitGrads(dw, dgamma, own_dbeta))
    if identity is not None and last == 0:
        da = spec.add_to_gradient(da, identity)
    if spec.shortcut == "projection":
        source = Source(spec.units[-1], params[-1], x, None)
        projected = end_input(source, end_saved[1])
        dbeta = sums.dz.clone()  # an op's outputs must not share memory
        if projected.raw is not None:
            sums = reduce(dz, None, projected.raw, norms[-1], False)[1]
        sums, wanted = EndSums(dbeta, sums.dzx), (needs.x, needs.weights[-1])
        dx, grads = end_backward(source, norms[-1], end_saved[1], projected, dz, sums, wanted)
        units.append(grads)
        if needs.x:
            _add_projected(da, dx, spec.units[-1])
    if spec.shortcut == "residual" and spec.shortcut_scale != 1:
        dz = dz * spec.shortcut_scale
    return BlockGrads(da, dz, units)


def _add_projected(da: Tensor, dx: Tensor, unit: UnitSpec) -> None:
    """da += the projection's gradient, which a Gram unit gives at its strided pixels only."""
    sh, sw = unit.geometry.stride if unit.plan == "gram" else (1, 1)
    da[:, :, ::sh, ::sw] += dx


def _conv_backward_add(
    du: Tensor, a: Tensor, weight: Tensor, geometry: Geometry, needs: tuple[bool, bool], add: Tensor | None,
    spec: BlockSpec,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dgrad + the shortcut's gradient `add`, and wgrad. A 1x1 dgrad is a fprop with the transposed weights, which adds
    for free."""
    if add is None:
        return conv_backward(du, a, weight, geometry, *needs)
    if spec.adds_as_it_is and geometry == POINTWISE and weight.shape[2:] == (1, 1) and has_fused_conv(du):
        _, dw = conv_backward(du, a, weight, geometry, False, needs[1])
        return fused_conv(du, weight.transpose(0, 1).contiguous(), None, POINTWISE, residual=add), dw
    da, dw = conv_backward(du, a, weight, geometry, *needs)
    return spec.add_to_gradient(da, add), dw


def split_end_saved(saved: list[Tensor], spec: BlockSpec) -> list[list[Tensor]]:
    """The saved tensors of each end unit, main path first."""
    parts, at = [], 0
    for unit in spec.units[spec.chain - 1 :]:
        count = saved_count(unit)
        parts.append(saved[at : at + count])
        at += count
    return parts


def norms_of(params: list[UnitParams], stats: list[Tensor], spec: BlockSpec) -> list[Norm]:
    """The batch norms again, from the statistics that `forward` returned."""
    it = iter(stats)
    return [p.norm(u, *itertools.islice(it, u.n_stats)) for p, u in zip(params, spec.units, strict=True)]
