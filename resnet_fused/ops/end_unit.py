"""A block's end unit: the last convolution + batch norm of its chain, or its projection, by its plan (see `block.py`).

It is apart from the inner units since its plan says what becomes of its raw output, and since statistics of the two end
units travel together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .aten import POINTWISE, conv, conv_backward
from .bn_stats import batch_stats
from .dispatch import ops as _ops
from .gram_form import (
    Branch,
    Gram,
    cancelling,
    conv_stats,
    drift,
    gram_backward,
    gram_of,
    gram_sums,
    output_mean,
    sample_center,
    taken_away,
    weight_gradient,
)
from .layout import acc_dtype, pixels_of, to_nhwc
from .spec import Norm, UnitParams, UnitSpec
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


def end_units(sources: list[Source], save: bool) -> list[End]:
    units = [_multiply(source) for source in sources]
    written = units[0].operand if units[0].raw is None else units[0].raw
    assert written is not None
    stats = combined([unit.stats for unit in units], pixels_of(written), [source.spec.group for source in sources])
    return [_finish(unit, own, save) for unit, own in zip(units, stats, strict=True)]


def end_rows(rows: Tensor, source: Source, end: End) -> End:
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


# --------------------------------------------------------------------------------------------- backward


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


def end_input(source: Source, saved: list[Tensor]) -> EndInput:
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


def end_backward(
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


def saved_count(unit: UnitSpec) -> int:
    """How many tensors an end unit saves."""
    if unit.plan == "gram":
        return len(Gram._fields)
    return int(unit.plan == "keep" and unit.needs_raw)
