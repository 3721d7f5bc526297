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
from .bn_stats import batch_stats
from .dispatch import ops as _ops
from .gram_form import (
    Branch,
    Gram,
    cancelling,
    conv_stats,
    drift,
    expand,
    gram_backward,
    gram_of,
    gram_sums,
    output_mean,
    sample_center,
    taken_away,
    weight_gradient,
)
from .layout import acc_dtype, pixels_of, to_nhwc
from .norm_relu import relu_bn_backward
from .spec import BlockSpec, Norm, UnitParams, UnitSpec
from .sync import Sums, agreed, combined, summed


def channels(t: Tensor, rows: Tensor) -> Tensor:
    """The channels `rows` of t [N, K, P, Q], in the accumulation type."""
    return to_nhwc(t.index_select(1, rows).to(acc_dtype(t.dtype)))


def raw_stats(spec: UnitSpec, u: Tensor) -> tuple[Tensor, ...]:
    """(mean, var) of u if the unit normalises with the batch's statistics, else (): those of this process."""
    return batch_stats(u) if spec.batch_stats else ()


def settled(spec: UnitSpec, stats: tuple[Tensor, ...], u: Tensor) -> tuple[Tensor, ...]:
    """A unit's statistics as it normalises with, from those of this process's u."""
    return stats if spec.group is None else agreed(stats, pixels_of(u), spec.group)


# --------------------------------------------------------------------------------------------- forward


class Source(NamedTuple):
    """An end unit before it runs; its input is relu(prologue(u)), or u itself."""

    spec: UnitSpec
    params: UnitParams
    u: Tensor
    prologue: Norm | None

    def centred(self, center: Tensor) -> tuple[Tensor, Tensor]:
        """A Gram unit's operand [N, C, P, Q], strided and minus `center`, and its mean."""
        gate = (None, None) if self.prologue is None else (self.prologue.scale, self.prologue.shift)
        return _ops.gram_operand(self.u, *gate, self.prologue is not None, center, self.spec.geometry.stride[0])

    def center(self) -> Tensor:
        """A constant [C] near the operand's mean."""
        return sample_center(self.u, *(() if self.prologue is None else (self.prologue.scale, self.prologue.shift)))


class Multiplied(NamedTuple):
    """An end unit before its statistics are settled: its raw output [N, K, P, Q], or its operand and Gram matrix."""

    source: Source
    raw: Tensor | None
    operand: Tensor | None
    gram: Gram | None
    stats: tuple[Tensor, ...]  # of this process


class End(NamedTuple):
    """An end unit after its statistics: either `raw` [N, K, P, Q] or a Gram branch is there."""

    norm: Norm
    raw: Tensor | None
    branch: Branch | None
    stats: tuple[Tensor, ...]  # as of `UnitSpec.n_stats`
    saved: tuple[Tensor, ...]
    gram: Gram | None = None


def _multiply(source: Source) -> Multiplied:
    spec, p, u, prologue = source
    if spec.plan != "gram":
        raw = conv(u if prologue is None else prologue.operand(u), p.weight, spec.geometry)
        return Multiplied(source, raw, None, None, raw_stats(spec, raw))
    center = source.center()
    a, mean_a = source.centred(center)
    gram = gram_of(a, mean_a, center)
    stats = conv_stats(gram, p.weight)
    if spec.group is not None:  # what is sent is final: outputs that cancel are convolved now, not only after the join
        rows = cancelling(gram, p.weight, stats[1])
        if rows.numel():
            for stat, exact in zip(stats, Recomputed.of(rows, source, center).stats(), strict=True):
                stat[rows] = exact
    return Multiplied(source, None, a, gram, stats)


def _finish(unit: Multiplied, stats: tuple[Tensor, ...], save: bool) -> End:
    (spec, p, *_), raw, a, gram, _ = unit
    norm = p.norm(spec, *stats)
    if gram is None or a is None:
        kept = (raw,) if raw is not None and save and spec.plan == "keep" and spec.needs_raw else ()
        return End(norm, raw, None, stats, kept)
    beta = norm.beta if spec.group is None else norm.beta + norm.scale * drift(gram, p.weight, norm.mean)
    branch = Branch(a, gram.mean, p.weight, norm.scale, beta)
    return End(norm, None, branch, stats, tuple(gram) if save else (), gram)


def _end_units(sources: list[Source], save: bool) -> list[End]:
    units = [_multiply(source) for source in sources]
    written = units[0].operand if units[0].raw is None else units[0].raw
    assert written is not None
    stats = combined([unit.stats for unit in units], pixels_of(written), [source.spec.group for source in sources])
    return [_finish(unit, own, save) for unit, own in zip(units, stats, strict=True)]


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
    ends = _end_units(sources, spec.save)
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
    thin = [_end_rows(rows, source, end) for source, end in zip(sources, ends, strict=True)]
    part, _ = _join(thin, None if residual is None else channels(residual, rows), spec._replace(save=False))
    y[:, rows] = part.to(y.dtype)
    for end, own in zip(ends, thin, strict=True):
        for stat, exact in zip(end.stats, own.stats, strict=False):  # a group's are settled already
            stat[rows] = exact
    return _ops.relu_mask(y) if mask.numel() else mask


def _end_rows(rows: Tensor, source: Source, end: End) -> End:
    """An end unit's output channels `rows`, with their raw output, and their statistics where they are news."""
    if end.gram is None:
        assert end.raw is not None
        return End(end.norm.rows(rows), channels(end.raw, rows), None, (), ())
    own = Recomputed.of(rows, source, end.gram.center)
    norm = own.norm(source.spec, end.norm.rows(rows))
    stats = (norm.mean + own.offset.to(norm.mean.dtype), norm.var) if source.spec.group is None else ()
    return End(norm, own.raw, None, stats, ())


class Recomputed(NamedTuple):
    """Output channels of a Gram unit by a convolution after all: of its centred operand, and in the accumulation
    type, so that rounding this operand, which eager need not do, costs nothing that shows."""

    params: UnitParams
    operand: Tensor  # [N, C, P, Q]
    raw: Tensor  # [N, K', P, Q], its mean near 0
    offset: Tensor  # [K'] in float64, by which the output's mean is larger

    @classmethod
    def of(cls, rows: Tensor, source: Source, center: Tensor) -> Recomputed:
        p = source.params.rows(rows)
        operand, _ = source._replace(u=source.u.to(center.dtype)).centred(center)
        return cls(p, operand, conv(operand, p.weight, POINTWISE), output_mean(p.weight, center))

    def stats(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of the output, of this process."""
        mean, var = _ops.bn_stats(self.raw)
        return mean + self.offset.to(mean.dtype), var

    def norm(self, spec: UnitSpec, norm: Norm) -> Norm:
        """The batch norm of raw. `norm`: the output's by the Gram form, with statistics that a group has agreed on."""
        if spec.group is None:
            return self.params.norm(spec, *_ops.bn_stats(self.raw))
        return self.params.norm(spec, (norm.mean.double() - self.offset).to(norm.mean.dtype), norm.var)


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


class UnitGrads(NamedTuple):
    """[K, C/groups, R, S], [K], [K]; the weight's is empty where it was not asked for."""

    weight: Tensor
    gamma: Tensor
    beta: Tensor


def _bn_backward(spec: UnitSpec, norm: Norm, raw: Tensor, dz: Tensor, sums: Sums) -> Tensor:
    """Gradient of a unit's raw output u [N, K, P, Q] from that of z; sums are those of the whole batch.

    du = s (dz - dbeta/M - xhat dgamma/M) with batch statistics, s dz with given ones.
    """
    coef_x, coef_1 = norm.coefficients(sums if spec.batch_stats else None)
    return _ops.bn_act_backward_apply(dz, None, raw, None, None, norm.mean, norm.scale, coef_x, coef_1)


class EndInput(NamedTuple):
    """What an end unit's backward starts from."""

    operand: Tensor  # [N, C, H, W], recomputed; a Gram unit's is centred and strided
    raw: Tensor | None  # [N, K, P, Q], kept or recomputed; None where backward does without


def _end_input(source: Source, saved: list[Tensor]) -> EndInput:
    spec, p, u, prologue = source
    if spec.plan == "gram":
        return EndInput(source.centred(Gram(*saved).center)[0], None)
    a = u if prologue is None else prologue.operand(u)
    if not spec.needs_raw:
        return EndInput(a, None)
    return EndInput(a, saved[0] if spec.plan == "keep" else conv(a, p.weight, spec.geometry))


class EndSums(NamedTuple):
    """Sums over pixels, [K]: dz, and dz (raw - mean) (empty where there is no raw output)."""

    dz: Tensor
    dzx: Tensor


def reduce(
    dy: Tensor, mask: Tensor | None, raw: Tensor | None, norm: Norm, write: bool, before: int = 0
) -> tuple[Tensor, EndSums]:
    """(dz = dy * mask if `write`, its sums), in one pass over dy and raw; of dy's channels behind the first `before`,
    which are no tensor of their own, dz is written in any case."""
    mean = None if raw is None else norm.mean
    if before:
        dz, *sums = _ops.concat_act_backward(dy, mask, raw, mean, before)
    else:
        dz, *sums = _ops.bn_act_backward_reduce(dy, mask, raw, None, None, mean, write)
    return dz, EndSums(*sums)


def _end_backward(
    source: Source,
    norm: Norm,
    saved: list[Tensor],
    inputs: EndInput,
    dz: Tensor,
    sums: EndSums,
    needs: tuple[bool, bool],
) -> tuple[Tensor, UnitGrads]:
    """(gradient of the unit's input, or of its strided pixels for a Gram unit; those of its parameters)."""
    spec, p, *_ = source
    a, raw = inputs
    if spec.plan == "gram":
        return _gram_end_backward(source, norm, Gram(*saved), a, dz, sums.dz, needs)
    if raw is not None:
        dgamma = norm.rstd * sums.dzx
        du = _bn_backward(spec, norm, raw, dz, summed(*sums, pixels_of(raw), spec.group))
    else:  # given statistics and no gradient for gamma: du = s dz
        dgamma = torch.zeros_like(norm.scale)
        du = _ops.bn_act(dz, norm.scale, torch.zeros_like(norm.scale), None, None, None, False, False)[0]
    da, dw = conv_backward(du, a, p.weight, spec.geometry, *needs)
    return da, UnitGrads(dw, dgamma, sums.dz)


def _gram_end_backward(
    source: Source, norm: Norm, gram: Gram, a: Tensor, dz: Tensor, dbeta: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor, UnitGrads]:
    """The Gram form's backward; the outputs that cancel in it are taken out (scale 0) and recomputed.

    `norm` has the variance that forward settled on, so near the threshold an output may change sides: both are
    accurate there.
    """
    spec, weight = source.spec, source.params.weight
    away = None if spec.group is None else drift(gram, weight, norm.mean)
    g, dzx = gram_sums(a, gram, weight, dz, dbeta, away)
    rows = cancelling(gram, weight, norm.var)
    if rows.numel():
        thin, thin_dz = Recomputed.of(rows, source, gram.center), channels(dz, rows)
        thin_norm = thin.norm(spec, norm.rows(rows))
        dzx[rows] = reduce(thin_dz, None, thin.raw, thin_norm, False)[1].dzx
    sums = summed(dbeta, dzx, pixels_of(dz), spec.group)
    scale = norm.scale.index_fill(0, rows, 0) if rows.numel() else norm.scale
    taken = taken_away(norm.rstd, sums, away)
    dw = weight_gradient(g, gram, weight, scale, dbeta, taken, pixels_of(dz), away is not None)
    da = gram_backward(a, gram, weight, scale, dz, taken) if needs[0] else dz.new_empty(0)
    if rows.numel():
        sums = Sums(sums.dz[rows], sums.dzx[rows], sums.pixels)
        du = _bn_backward(spec, thin_norm, thin.raw, thin_dz, sums)
        thin_da, thin_dw = conv_backward(du, thin.operand, thin.params.weight, POINTWISE, *needs)
        if needs[0]:
            da += thin_da
        if needs[1]:
            if spec.group is not None:  # du sums to 0 over the group's pixels only: the operand's center counts
                thin_dw.add_(torch.outer(du.sum((0, 2, 3)), gram.center).view_as(thin_dw))
            dw[rows] = thin_dw
    return da, UnitGrads(dw, norm.rstd * dzx, dbeta)


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
    main = _end_input(source, end_saved[0])
    mask = saved[-1] if spec.relu else None
    concat = spec.shortcut == "concat"
    dz, sums = reduce(dy, mask, main.raw, norms[last], spec.relu, x.shape[1] if concat else 0)
    dz = dz if spec.relu or concat else dy
    identity = (dy if concat else dz) if spec.from_x and needs.x else None
    wanted = (last > 0 or needs.x, needs.weights[last])
    da, grads = _end_backward(source, norms[last], end_saved[0], main, dz, sums, wanted)
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
        projected = _end_input(source, end_saved[1])
        dbeta = sums.dz.clone()  # an op's outputs must not share memory
        if projected.raw is not None:
            sums = reduce(dz, None, projected.raw, norms[-1], False)[1]
        sums, wanted = EndSums(dbeta, sums.dzx), (needs.x, needs.weights[-1])
        dx, grads = _end_backward(source, norms[-1], end_saved[1], projected, dz, sums, wanted)
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


def saved_count(unit: UnitSpec) -> int:
    """How many tensors an end unit saves."""
    if unit.plan == "gram":
        return len(Gram._fields)
    return int(unit.plan == "keep" and unit.needs_raw)


def norms_of(params: list[UnitParams], stats: list[Tensor], spec: BlockSpec) -> list[Norm]:
    """The batch norms again, from the statistics that `forward` returned."""
    it = iter(stats)
    return [p.norm(u, *itertools.islice(it, u.n_stats)) for p, u in zip(params, spec.units, strict=True)]
