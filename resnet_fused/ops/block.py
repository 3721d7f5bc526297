"""`residual_block`: a chain of conv + batch norm units with its shortcut, forward and backward.

    y = act(bn_n(conv_n(... relu(bn_1(conv_1(x))))) + shortcut(x))

This file holds the mathematics of the whole block on tensors that are already checked: the op's schema is in
`residual_block.py` beside its fake and its autograd, the user's edge in `functional.py`.

Saved for backward: x, the raw conv outputs of the inner units, one bit per output element, and per end unit
(the last of the chain, and the projection) what its plan says:

    keep        its raw output
    recompute   nothing: the convolution runs again in backward
    gram        the small Gram matrices of its operand: the raw output is never formed as such

Activations relu(s u + t) are never stored: they are recomputed from u.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .aten import POINTWISE, Geometry, conv, conv_backward, fused_conv, has_fused_conv
from .gram import Branch, Gram, conv_stats, expand, gram_backward, gram_of, sample_center

_ops = torch.ops.resnet_fused

SHORTCUTS = ("none", "identity", "residual", "projection")
PLANS = ("keep", "recompute", "gram")


class UnitSpec(NamedTuple):
    """The constants of one conv + batch norm unit."""

    geometry: Geometry
    eps: float
    batch_stats: bool  # normalise with the batch's statistics, else with the given ones
    plan: str  # one of PLANS; inner units are always "keep"
    track_gamma: bool  # gamma's gradient may be asked for, so the raw output is needed in backward

    @property
    def needs_raw(self) -> bool:
        """Whether backward needs this (end) unit's raw output."""
        return self.batch_stats or self.track_gamma


class BlockSpec(NamedTuple):
    """The constants of a block; `units` ends with the projection if `shortcut` is "projection"."""

    units: tuple[UnitSpec, ...]
    shortcut: str  # one of SHORTCUTS
    relu: bool
    save: bool  # whether a backward may follow

    @property
    def chain(self) -> int:
        """Number of units on the main path."""
        return len(self.units) - (self.shortcut == "projection")


@dataclass
class Norm:
    """A batch norm ready for use, all [K] in the accumulation type: z = scale*u + shift."""

    mean: Tensor
    var: Tensor
    rstd: Tensor
    scale: Tensor
    shift: Tensor
    beta: Tensor

    @classmethod
    def of(cls, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Norm:
        rstd = torch.rsqrt(var + eps)
        scale = gamma * rstd
        return cls(mean, var, rstd, scale, beta - mean * scale, beta)

    def operand(self, u: Tensor, relu: bool = True) -> Tensor:
        """relu(scale*u + shift), the next unit's input."""
        return _ops.bn_act(u, self.scale, self.shift, None, None, None, relu, False)[0]


class UnitParams(NamedTuple):
    """The tensors of one unit. gamma, beta and the given mean and var are [K] in the accumulation type."""

    weight: Tensor  # [K, C/groups, R, S]
    gamma: Tensor
    beta: Tensor
    mean: Tensor  # empty with batch statistics
    var: Tensor

    def norm(self, spec: UnitSpec, *stats: Tensor) -> Norm:
        mean, var = stats if spec.batch_stats else (self.mean, self.var)
        return Norm.of(mean, var, self.gamma, self.beta, spec.eps)


def raw_stats(spec: UnitSpec, u: Tensor) -> tuple[Tensor, ...]:
    """(mean, var) of u if the unit normalises with the batch's statistics, else ()."""
    return _ops.bn_stats(u) if spec.batch_stats else ()


# --------------------------------------------------------------------------------------------- forward


class End(NamedTuple):
    """An end unit after its statistics: either `raw` [N, K, P, Q] or a Gram branch is there."""

    norm: Norm
    raw: Tensor | None
    branch: Branch | None
    stats: tuple[Tensor, ...]  # (mean, var), or ()
    saved: tuple[Tensor, ...]


def _end_unit(spec: UnitSpec, p: UnitParams, u: Tensor, prologue: Norm | None, save: bool) -> End:
    """An end unit's input is relu(prologue(u)), or u itself."""
    if spec.plan == "gram":
        a, gram = gram_operand(spec, u, prologue)
        mean, var = conv_stats(gram, p.weight)
        norm = p.norm(spec, mean, var)
        branch = Branch(a, gram.mean, p.weight, norm.scale, norm.beta)
        return End(norm, None, branch, (mean, var), tuple(gram) if save else ())
    raw = conv(u if prologue is None else prologue.operand(u), p.weight, spec.geometry)
    stats = raw_stats(spec, raw)
    kept = save and spec.plan == "keep" and spec.needs_raw
    return End(p.norm(spec, *stats), raw, None, stats, (raw,) if kept else ())


def gram_operand(spec: UnitSpec, u: Tensor, prologue: Norm | None) -> tuple[Tensor, Gram]:
    """The centred, strided operand of a Gram unit [N, C, P, Q] and its statistics."""
    scale, shift = (None, None) if prologue is None else (prologue.scale, prologue.shift)
    center = sample_center(u, scale, shift)
    a, mean = _ops.gram_operand(u, scale, shift, prologue is not None, center, spec.geometry.stride[0])
    return a, gram_of(a, mean, center)


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
        own = raw_stats(unit, u)
        prologue = p.norm(unit, *own)
        stats += own
        saved += [u] if spec.save else []
    ends = [_end_unit(spec.units[last], params[last], u, prologue, spec.save)]
    if spec.shortcut == "projection":
        ends.append(_end_unit(spec.units[-1], params[-1], x, None, spec.save))
    y, mask = _join(ends, x if spec.shortcut == "identity" else residual, spec)
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
    return _ops.bn_act(main.raw, main.norm.scale, main.norm.shift, residual, None, None, *tail)


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
    elif spec.shortcut == "identity":
        residual = x
    return fused_conv(a, *folded(*chain[-1]), residual=residual, relu=spec.relu, into_residual=projected)


# -------------------------------------------------------------------------------------------- backward


class UnitGrads(NamedTuple):
    """[K, C/groups, R, S], [K], [K]; the weight's is empty where it was not asked for."""

    weight: Tensor
    gamma: Tensor
    beta: Tensor


def _bn_backward(
    spec: UnitSpec, norm: Norm, raw: Tensor, dz: Tensor, sums: tuple[Tensor, Tensor], gate: tuple
) -> Tensor:
    """Gradient of a unit's raw output u [N, K, P, Q] from that of z; sums are (sum dz, sum dz (u - mean)).

    du = s (dz - dbeta/M - xhat dgamma/M) with batch statistics, s dz with given ones; `gate` is (scale, shift)
    where dz must still be multiplied by relu'(scale*u + shift).
    """
    if spec.batch_stats:
        pixels = raw.numel() // raw.shape[1]
        coef_x = norm.scale * norm.rstd.square() * sums[1] / -pixels
        coef_1 = norm.scale * sums[0] / -pixels
    else:
        coef_x = coef_1 = torch.zeros_like(norm.scale)
    return _ops.bn_act_backward_apply(dz, None, raw, *gate, norm.mean, norm.scale, coef_x, coef_1)


def _inner_backward(spec: UnitSpec, norm: Norm, raw: Tensor, da: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(du, dgamma, dbeta) of an inner unit from the gradient da of relu(z)."""
    gate = (norm.scale, norm.shift)
    _, dbeta, dzx = _ops.bn_act_backward_reduce(da, None, raw, *gate, norm.mean, False)
    return _bn_backward(spec, norm, raw, da, (dbeta, dzx), gate), norm.rstd * dzx, dbeta


class EndInput(NamedTuple):
    """What an end unit's backward starts from."""

    operand: Tensor  # [N, C, H, W], recomputed; a Gram unit's is centred and strided
    raw: Tensor | None  # [N, K, P, Q], kept or recomputed; None where backward does without


def _end_input(spec: UnitSpec, p: UnitParams, saved: list[Tensor], u: Tensor, prologue: Norm | None) -> EndInput:
    if spec.plan == "gram":
        gate = (None, None) if prologue is None else (prologue.scale, prologue.shift)
        center = Gram(*saved).center
        return EndInput(_ops.gram_operand(u, *gate, prologue is not None, center, spec.geometry.stride[0])[0], None)
    a = u if prologue is None else prologue.operand(u)
    if not spec.needs_raw:
        return EndInput(a, None)
    return EndInput(a, saved[0] if spec.plan == "keep" else conv(a, p.weight, spec.geometry))


class EndSums(NamedTuple):
    """Sums over pixels, [K]: dz, and dz (raw - mean) (empty where there is no raw output)."""

    dz: Tensor
    dzx: Tensor


def _reduce(dy: Tensor, mask: Tensor | None, raw: Tensor | None, norm: Norm, write: bool) -> tuple[Tensor, EndSums]:
    """(dz = dy * mask if `write`, its sums), in one pass over dy and raw."""
    mean = None if raw is None else norm.mean
    dz, *sums = _ops.bn_act_backward_reduce(dy, mask, raw, None, None, mean, write)
    return dz, EndSums(*sums)


def _end_backward(
    spec: UnitSpec,
    p: UnitParams,
    norm: Norm,
    saved: list[Tensor],
    source: EndInput,
    dz: Tensor,
    sums: EndSums,
    needs: tuple[bool, bool],
) -> tuple[Tensor, UnitGrads]:
    """(gradient of the unit's input, or of its strided pixels for a Gram unit; those of its parameters)."""
    a, raw = source
    if spec.plan == "gram":
        grads = gram_backward(a, Gram(*saved), p.weight, norm.scale, norm.rstd, dz, sums.dz, needs[0])
        return grads.operand, UnitGrads(grads.weight, grads.gamma, sums.dz)
    if raw is not None:
        dgamma = norm.rstd * sums.dzx
        du = _bn_backward(spec, norm, raw, dz, sums, (None, None))
    else:  # given statistics and no gradient for gamma: du = s dz
        dgamma = torch.zeros_like(norm.scale)
        du = _ops.bn_act(dz, norm.scale, torch.zeros_like(norm.scale), None, None, None, False, False)[0]
    da, dw = conv_backward(du, a, p.weight, spec.geometry, *needs)
    return da, UnitGrads(dw, dgamma, sums.dz)


class BlockGrads(NamedTuple):
    x: Tensor  # empty where it was not asked for
    dz: Tensor  # the gradient of the sum before the ReLU: the residual's
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
    end_saved = _split_end_saved(saved[last:], spec)
    source = (raws[-1], norms[last - 1]) if last else (x, None)
    main = _end_input(spec.units[last], params[last], end_saved[0], *source)
    dz, sums = _reduce(dy, saved[-1] if spec.relu else None, main.raw, norms[last], spec.relu)
    if not spec.relu:
        dz = dy
    identity = dz if spec.shortcut == "identity" and needs.x else None
    wanted = (last > 0 or needs.x, needs.weights[last])
    da, grads = _end_backward(spec.units[last], params[last], norms[last], end_saved[0], main, dz, sums, wanted)
    del main  # its memory may serve the next gradients, and so may da's below
    units = [grads]
    for i in reversed(range(last)):
        du, dgamma, own_dbeta = _inner_backward(spec.units[i], norms[i], raws[i], da)
        del da
        a = norms[i - 1].operand(raws[i - 1]) if i else x
        da, dw = _conv_backward_add(
            du,
            a,
            params[i].weight,
            spec.units[i].geometry,
            (i > 0 or needs.x, needs.weights[i]),
            None if i else identity,
        )
        units.insert(0, UnitGrads(dw, dgamma, own_dbeta))
    if identity is not None and last == 0:
        da = da + identity
    if spec.shortcut == "projection":
        projected = _end_input(spec.units[-1], params[-1], end_saved[1], x, None)
        dbeta = sums.dz.clone()  # an op's outputs must not share memory
        if projected.raw is not None:
            sums = _reduce(dz, None, projected.raw, norms[-1], False)[1]
        dx, grads = _end_backward(
            spec.units[-1], params[-1], norms[-1], end_saved[1], projected, dz, EndSums(dbeta, sums.dzx),
            (needs.x, needs.weights[-1]),
        )  # fmt: skip
        units.append(grads)
        if needs.x:
            _add_projected(da, dx, spec.units[-1])
    return BlockGrads(da, dz, units)


def _add_projected(da: Tensor, dx: Tensor, unit: UnitSpec) -> None:
    """da += the projection's gradient, which a Gram unit gives at its strided pixels only."""
    sh, sw = unit.geometry.stride if unit.plan == "gram" else (1, 1)
    da[:, :, ::sh, ::sw] += dx


def _conv_backward_add(
    du: Tensor, a: Tensor, weight: Tensor, geometry: Geometry, needs: tuple[bool, bool], add: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dgrad + `add`, and wgrad. A 1x1 dgrad is a fprop with the transposed weights, which adds for free."""
    if add is None:
        return conv_backward(du, a, weight, geometry, *needs)
    if geometry == POINTWISE and weight.shape[2:] == (1, 1) and has_fused_conv(du):
        _, dw = conv_backward(du, a, weight, geometry, False, needs[1])
        return fused_conv(du, weight.transpose(0, 1).contiguous(), None, POINTWISE, residual=add), dw
    da, dw = conv_backward(du, a, weight, geometry, *needs)
    return da.add_(add), dw


def _split_end_saved(saved: list[Tensor], spec: BlockSpec) -> list[list[Tensor]]:
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
    return [
        p.norm(u, *((next(it), next(it)) if u.batch_stats else ())) for p, u in zip(params, spec.units, strict=True)
    ]
