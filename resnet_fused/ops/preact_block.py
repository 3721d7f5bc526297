"""`preact_block`: a pre-activation residual block (He et al. 2016, "Identity mappings"), forward and backward.

    a_i = relu(bn_i(u_{i-1})),  u_i = conv_i(a_i),  u_0 = x;    y = u_n + x,  or  u_n + conv_s(a_1),  or u_n + x strided
                                                                and padded with channels of zeros

What the join writes, the next block's first batch norm reads: its mean and variance are taken in the same pass
(`add_stats`) and handed on, so that no pass of the next block is for statistics of x.

Saved for backward: x and the raw outputs u_1 .. u_{n-1}. Activations are recomputed from them. Backward ends in one
pass that applies bn_1's and adds the identity's gradient:

    da_i = dgrad(du_i)    dz = da_i relu'    du_{i-1} = s (dz - dbeta/M - xhat dgamma/M)  (+ dy, for dx)

Where a norm has a group (`sync.py`), statistics that are handed on are this process's: who normalises with them
combines them with the others'.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from .aten import Geometry, conv, conv_backward
from .autograd import forbid_gradients
from .bn_stats import batch_stats
from .dispatch import ops as _ops
from .layout import Padded, acc_dtype, autocast_type, empty_nhwc, laid_out_as, pixels_of, to_nhwc
from .pointwise import matrix_kernels_take
from .routes import NO_NORM, Route, arch_of, route_of
from .spec import Norm
from .sync import Group, agreed, groups_named, names_of, summed

_LIB = torch.library.Library("resnet_fused", "FRAGMENT")
_PARAMS = "Tensor[] weights, Tensor[] gammas, Tensor[] betas, Tensor[] means, Tensor[] vars, Tensor[] handed"
_CONFIG = "int[] geometry, float[] eps, str groups"
_LIB.define(f"preact_block(Tensor x, {_PARAMS}, {_CONFIG}, bool hand_on, bool save) -> Tensor[]")
_LIB.define(
    f"preact_block_backward(Tensor dy, Tensor x, {_PARAMS}, Tensor[] stats, Tensor[] saved, {_CONFIG}, bool needs_x, "
    "bool[] needs_weight) -> Tensor[]"
)
# Integers a convolution in `geometry`: stride, padding, dilation (2 each), groups, batch_stats of its norm. Behind them
# a padded shortcut's stride and channels in front.
_FIELDS = 8


class PreActSpec(NamedTuple):
    """The constants of a block. A projection, conv_s, is behind the chain's convolutions and has no norm."""

    convs: tuple[Geometry, ...]
    batch_stats: tuple[bool, ...]  # of the chain's norms
    eps: tuple[float, ...]
    groups: tuple[Group | None, ...]  # the processes that each norm goes over; only with batch_stats
    padded: Padded | None = None  # the shortcut's, if it is one

    @property
    def chain(self) -> int:
        return len(self.eps)

    @property
    def projected(self) -> bool:
        return len(self.convs) > self.chain

    def n_stats(self) -> list[int]:
        """How many tensors each norm's statistics are: (mean, var), and with a group the count."""
        return [own * (2 + (group is not None)) for own, group in zip(self.batch_stats, self.groups, strict=True)]

    def encode(self) -> tuple[list[int], list[float], str]:
        geometry: list[int] = []
        for i, g in enumerate(self.convs):
            own = i < self.chain and self.batch_stats[i]
            geometry += [*g.stride, *g.padding, *g.dilation, g.groups, 1 if own else 0]
        return geometry + list(self.padded or ()), list(self.eps), names_of(self.groups)

    @classmethod
    def decode(cls, geometry: list[int], eps: list[float], groups: str) -> PreActSpec:
        at = len(geometry) - len(geometry) % _FIELDS
        rows = [geometry[i : i + _FIELDS] for i in range(0, at, _FIELDS)]
        convs = tuple(Geometry((g[0], g[1]), (g[2], g[3]), (g[4], g[5]), g[6]) for g in rows)
        own = tuple(bool(g[7]) for g in rows[: len(eps)])
        padded = Padded(*geometry[at:]) if geometry[at:] else None
        return cls(convs, own, tuple(eps), groups_named(groups), padded)


def _norms(spec: PreActSpec, gammas, betas, means, vars, stats: list[Tensor]) -> list[Norm]:
    """The chain's batch norms; `stats` are those of the ones with batch statistics, in order."""
    it = iter(stats)
    norms = []
    for count, *given, gamma, beta, eps in zip(spec.n_stats(), means, vars, gammas, betas, spec.eps, strict=True):
        mean, var, *_ = list(itertools.islice(it, count)) or given
        norms.append(Norm.of(mean, var, gamma, beta, eps))
    return norms


def _route(geometry: Geometry, weight: Tensor, x: Tensor) -> Route | None:
    """The kernels of a convolution of relu(bn(x)), statistics and sums included; None where ATen runs it."""
    if not x.numel() or not matrix_kernels_take(x) or weight.data_ptr() % 16:
        return None
    found = route_of(geometry, tuple(weight.shape), True, tuple(x.shape), x.dtype, arch_of(x))
    return found if found.whole else None


def _forward(
    x, weights, gammas, betas, means, vars, handed, geometry, eps, groups, hand_on, save
) -> list[Tensor]:  # fmt: skip
    spec = PreActSpec.decode(geometry, eps, groups)
    with torch.autocast(autocast_type(x), enabled=False):
        x = to_nhwc(x)
        stats: list[Tensor] = []
        saved: list[Tensor] = []
        u, own, shortcut = x, tuple(handed), x
        for i in range(spec.chain):
            mean, var = means[i], vars[i]
            if spec.batch_stats[i]:
                found = own or batch_stats(u)
                if spec.groups[i] is not None:
                    found = agreed(found, pixels_of(u), spec.groups[i])
                elif i == 0 and handed:
                    found = tuple(t.clone() for t in found)
                mean, var, *_ = found
                stats += found
            norm = Norm.of(mean, var, gammas[i], betas[i], spec.eps[i])
            wanted = i + 1 < spec.chain and spec.batch_stats[i + 1]
            projects = i == 0 and spec.projected
            own = ()
            route = None if projects else _route(spec.convs[i], weights[i], u)
            if route is not None:
                affine = (norm.scale, norm.shift)
                u, *more = route.conv(u, to_nhwc(weights[i]), affine, spec.convs[i], wanted)
                own = tuple(more) if wanted else ()
            else:
                a = norm.operand(u)
                u = conv(a, weights[i], spec.convs[i])
                if projects:
                    shortcut = conv(a, weights[-1], spec.convs[-1])
            saved += [u] if save and i + 1 < spec.chain else []
        if hand_on and u.numel() and not spec.padded:
            return [*_ops.add_stats(shortcut, u, None, None), *stats, *saved]
        one = torch.ones(u.shape[1], dtype=acc_dtype(u.dtype), device=u.device)
        place = spec.padded or (0, 0)
        y = _ops.bn_act(u, one, torch.zeros_like(one), shortcut, None, None, False, False, *place)[0]
        own = batch_stats(y) if hand_on else ()
    return [y, *own, *stats, *saved]


def _fake_forward(
    x, weights, gammas, betas, means, vars, handed, geometry, eps, groups, hand_on, save
) -> list[Tensor]:  # fmt: skip
    spec = PreActSpec.decode(geometry, eps, groups)
    acc = acc_dtype(x.dtype)
    shapes, shape = [], x.shape
    for g, w in zip(spec.convs[: spec.chain], weights, strict=False):
        shape = g.out_shape(shape, w.shape)
        shapes.append(shape)
    out = [empty_nhwc(x, shape)]
    out += [x.new_empty((shape[1],), dtype=acc) for _ in range(2 * hand_on)]
    for gamma, count in zip(gammas, spec.n_stats(), strict=True):
        out += [gamma.new_empty((size,)) for size in (*gamma.shape, *gamma.shape, 1)[:count]]
    return out + [empty_nhwc(x, s) for s in shapes[:-1] if save]


def _backward(
    dy, x, weights, gammas, betas, means, vars, handed, stats, saved, geometry, eps, groups, needs_x, needs_weight
) -> list[Tensor]:  # fmt: skip
    spec = PreActSpec.decode(geometry, eps, groups)
    with torch.autocast(autocast_type(x), enabled=False):
        x, dy = to_nhwc(x), to_nhwc(dy)
        norms = _norms(spec, gammas, betas, means, vars, stats)
        inputs = [x, *saved]
        grads: list[Tensor] = []
        du, into_s = dy, dy.new_empty(0)
        for i in reversed(range(spec.chain)):
            u, norm = inputs[i], norms[i]
            projects = i == 0 and spec.projected
            dz, sums, dw = _unit_backward(
                du, u, weights[i], norm, spec.convs[i], needs_weight[i], None if not projects else (
                    dy, weights[-1], spec.convs[-1], needs_weight[-1])
            )  # fmt: skip
            if projects:
                dw, into_s = dw
            grads = [laid_out_as(dw, weights[i]) if needs_weight[i] else dw, norm.rstd * sums[1], sums[0], *grads]
            if i or needs_x:
                gate = (None, None) if dz.gated else (norm.scale, norm.shift)
                whole = summed(sums[0], sums[1], pixels_of(u), spec.groups[i]) if spec.batch_stats[i] else None
                coefs = norm.coefficients(whole)
                addend = dy if i == 0 and not (spec.projected or spec.padded) else None
                du = _ops.bn_act_backward_apply(dz.grad, None, u, *gate, norm.mean, norm.scale, *coefs, addend)
        if spec.padded and needs_x:
            du = spec.padded.adjoint(dy, du)
        if spec.projected:
            grads.append(laid_out_as(into_s, weights[-1]) if needs_weight[-1] else into_s)
    return [du if needs_x else dy.new_empty(0), *grads]


class _Gradient(NamedTuple):
    """Of z where it is gated already, else of relu(z)."""

    grad: Tensor
    gated: bool


def _unit_backward(du, u, weight, norm, geometry, needs_weight, projection):
    """((dz or da), its sums, dW) of a unit conv(relu(norm(u))); with a projection of the same operand, (dW, dW_s)."""
    route = None if projection is not None else _route(geometry, weight, u)
    if route is not None:
        dw, plain = du.new_empty(0), (du, *NO_NORM)
        if needs_weight:
            dw = route.conv_wgrad(plain, u, (norm.scale, norm.shift), weight, geometry)
        end = (None, None, u, norm.scale, norm.shift, norm.mean)
        dz, *sums = route.conv_dgrad(plain, to_nhwc(weight), u, geometry, end)
        return _Gradient(dz, True), tuple(sums), dw
    a = norm.operand(u)
    da, dw = conv_backward(du, a, weight, geometry, True, needs_weight)
    if projection is not None:
        dy, other, where, needs = projection
        into_a, dws = conv_backward(dy, a, other, where, True, needs)
        da += into_a
        dw = (dw, dws)
    _, *sums = _ops.bn_act_backward_reduce(da, None, u, norm.scale, norm.shift, norm.mean, False)
    return _Gradient(da, False), tuple(sums), dw


def _fake_backward(
    dy, x, weights, gammas, betas, means, vars, handed, stats, saved, geometry, eps, groups, needs_x, needs_weight
) -> list[Tensor]:  # fmt: skip
    out = [empty_nhwc(x, x.shape) if needs_x else dy.new_empty((0,))]
    own = [torch.empty_like(w) if need else dy.new_empty((0,)) for w, need in zip(weights, needs_weight, strict=True)]
    for w, gamma in zip(own, gammas, strict=False):
        out += [w, torch.empty_like(gamma), torch.empty_like(gamma)]
    return out + own[len(gammas) :]


for _name, _impl, _fake in (
    ("preact_block", _forward, _fake_forward),
    ("preact_block_backward", _backward, _fake_backward),
):
    for _key in ("CPU", "CUDA"):
        _LIB.impl(_name, _impl, _key)
    torch.library.register_fake(f"resnet_fused::{_name}", _fake, lib=_LIB)

forbid_gradients("preact_block_backward")


def _setup(ctx, inputs, output) -> None:
    x, *lists, geometry, eps, groups, hand_on, save = inputs
    ctx.config, ctx.save, ctx.sizes = (geometry, eps, groups), save, [len(tensors) for tensors in lists]
    ctx.n_stats = sum(PreActSpec.decode(*ctx.config).n_stats())
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, *[t for tensors in lists for t in tensors], *output[1 + 2 * hand_on :])


def _registered_backward(ctx, dout: list[Tensor]):
    """Only y (output 0) carries a gradient: handed statistics are x's own, and their part of dx is in this backward."""
    if not ctx.save:
        raise RuntimeError("resnet_fused::preact_block was called with save=False: it kept nothing for backward")
    x, *rest = ctx.saved_tensors
    lists = []
    for size in ctx.sizes:
        lists.append(list(rest[:size]))
        rest = rest[size:]
    stats, saved = list(rest[: ctx.n_stats]), list(rest[ctx.n_stats :])
    needs = (ctx.needs_input_grad[0], list(ctx.needs_input_grad[1]))
    dx, *grads = _ops.preact_block_backward(dout[0], x, *lists, stats, saved, *ctx.config, *needs)
    n = ctx.sizes[1]
    dws = [*grads[0 : 3 * n : 3], *grads[3 * n :]]
    dws = [g if need else None for g, need in zip(dws, needs[1], strict=True)]
    empty = [[None] * size for size in ctx.sizes[3:]]
    vectors = (grads[1 : 3 * n : 3], grads[2 : 3 * n : 3])
    return (dx if needs[0] else None, dws, *vectors, *empty, None, None, None, None, None)


torch.library.register_autograd("resnet_fused::preact_block", _registered_backward, setup_context=_setup, lib=_LIB)
