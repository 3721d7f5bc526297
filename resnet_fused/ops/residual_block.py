"""The ops `residual_block` and `residual_block_backward`: schemas, fakes and autograd around `block.py`.

Their schemas are flat, so that they trace, export and compile as one node each:

    geometry  10 integers a unit: stride, padding, dilation (2 each), groups, batch_stats, plan (index into
              spec.PLANS), track_gamma; behind them a padded shortcut's stride and channels in front
    groups    of each unit the name of the process group over which its norm goes, none for this process alone; commas
              between
    stats     (mean, var) of every unit that normalises with the batch's statistics, in the units' order; with a group
              (mean, var, count [1]) of all of its processes
    saved     see block.py; the fake below lists it shape by shape
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import block, kernel_block
from .aten import Geometry
from .autograd import forbid_gradients
from .layout import Padded, acc_dtype, autocast_type, empty_nhwc, laid_out_as, mask_shape, to_nhwc
from .spec import PLANS, BlockSpec, UnitParams, UnitSpec
from .sync import groups_named, names_of

_LIB = torch.library.Library("resnet_fused", "FRAGMENT")
_CONFIG = "int[] geometry, float[] eps, str groups, str shortcut, bool relu, float shortcut_scale"
_PARAMS = "Tensor[] weights, Tensor[] gammas, Tensor[] betas, Tensor[] means, Tensor[] vars"
_LIB.define(f"residual_block(Tensor x, Tensor? residual, {_PARAMS}, {_CONFIG}, bool save) -> Tensor[]")
_LIB.define(
    f"residual_block_backward(Tensor dy, Tensor x, {_PARAMS}, Tensor[] stats, Tensor[] saved, {_CONFIG}, "
    "bool needs_x, bool needs_residual, bool[] needs_weight) -> Tensor[]"
)
_FIELDS = 10  # integers a unit in `geometry`
CONFIG = ("geometry", "eps", "groups", "shortcut", "relu", "shortcut_scale")  # the names of what `encode` gives


def encode(spec: BlockSpec) -> tuple[list[int], list[float], str, str, bool, float]:
    """The flat arguments that `decode` reads back."""
    geometry: list[int] = []
    for u in spec.units:
        g = u.geometry
        geometry += [*g.stride, *g.padding, *g.dilation, g.groups]
        geometry += [int(u.batch_stats), PLANS.index(u.plan), int(u.track_gamma)]
    geometry += spec.padded if spec.shortcut == "padded" else ()
    eps, groups = [u.eps for u in spec.units], names_of(u.group for u in spec.units)
    return geometry, eps, groups, spec.shortcut, spec.relu, spec.shortcut_scale


def decode(
    geometry: list[int],
    eps: list[float],
    groups: str,
    shortcut: str,
    relu: bool,
    shortcut_scale: float,
    save: bool,
) -> BlockSpec:
    units = []
    for i, (e, group) in enumerate(zip(eps, groups_named(groups), strict=True)):
        g = geometry[i * _FIELDS : (i + 1) * _FIELDS]
        where = Geometry((g[0], g[1]), (g[2], g[3]), (g[4], g[5]), g[6])
        units.append(UnitSpec(where, e, bool(g[7]), PLANS[g[8]], bool(g[9]), group))
    padded = Padded(*geometry[len(eps) * _FIELDS :])
    return BlockSpec(tuple(units), shortcut, relu, save, shortcut_scale, padded)


def _params(*lists: list[Tensor]) -> list[UnitParams]:
    return [UnitParams(*tensors) for tensors in zip(*lists, strict=True)]


def _forward(
    x, residual, weights, gammas, betas, means, vars, geometry, eps, groups, shortcut, relu, shortcut_scale, save
) -> list[Tensor]:  # fmt: skip
    spec = decode(geometry, eps, groups, shortcut, relu, shortcut_scale, save)
    params = _params(weights, gammas, betas, means, vars)
    with torch.autocast(autocast_type(x), enabled=False):  # the small matrix products stay in fp32
        x, residual = to_nhwc(x), None if residual is None else to_nhwc(residual)
        engine = kernel_block if kernel_block.serves(params, spec, x, residual) else block
        y, stats, saved = engine.forward(x, residual, params, spec)
    return [to_nhwc(y), *stats, *saved]


def _fake_forward(
    x, residual, weights, gammas, betas, means, vars, geometry, eps, groups, shortcut, relu, shortcut_scale, save
) -> list[Tensor]:
    spec = decode(geometry, eps, groups, shortcut, relu, shortcut_scale, save)
    acc = acc_dtype(x.dtype)
    shapes, shape = [], x.shape
    for unit, w in zip(spec.units[: spec.chain], weights, strict=False):
        shape = unit.geometry.out_shape(shape, w.shape)
        shapes.append(shape)
    branch = shapes[-1]
    y_shape = spec.out_shape(branch, x.shape)
    stats = [
        x.new_empty((size,), dtype=acc)
        for unit, w in zip(spec.units, weights, strict=True)
        for size in (w.shape[0], w.shape[0], 1)[: unit.n_stats]
    ]
    saved = []
    if save:
        saved += [empty_nhwc(x, s) for s in shapes[:-1]]
        for unit, w in list(zip(spec.units, weights, strict=True))[spec.chain - 1 :]:
            c = w.shape[1]
            if unit.plan == "gram":
                saved += [x.new_empty(s, dtype=acc) for s in ((c,), (c,), (c, c))]
            elif block.saved_count(unit):
                saved.append(empty_nhwc(x, branch))
        if relu:
            n, k, p, q = branch
            saved.append(x.new_empty(mask_shape(k, n * p * q), dtype=torch.int32))
    return [empty_nhwc(x, y_shape), *stats, *saved]


def _backward(
    dy, x, weights, gammas, betas, means, vars, stats, saved, geometry, eps, groups, shortcut, relu, shortcut_scale,
    needs_x, needs_residual, needs_weight,
) -> list[Tensor]:  # fmt: skip
    spec = decode(geometry, eps, groups, shortcut, relu, shortcut_scale, True)
    params = _params(weights, gammas, betas, means, vars)
    norms = block.norms_of(params, stats, spec)
    with torch.autocast(autocast_type(x), enabled=False):
        x, dy = to_nhwc(x), to_nhwc(dy)
        engine = kernel_block if kernel_block.serves(params, spec, x, dy) else block
        grads = engine.backward(dy, x, params, norms, saved, spec, block.Needs(needs_x, needs_weight))
    out = [grads.x if needs_x else dy.new_empty(0), grads.dz if needs_residual and relu else dy.new_empty(0)]
    for p, g, need in zip(params, grads.units, needs_weight, strict=True):
        out += [laid_out_as(g.weight, p.weight) if need else dy.new_empty(0), g.gamma, g.beta]
    return out


def _fake_backward(
    dy, x, weights, gammas, betas, means, vars, stats, saved, geometry, eps, groups, shortcut, relu, shortcut_scale,
    needs_x, needs_residual, needs_weight,
) -> list[Tensor]:  # fmt: skip
    out = [empty_nhwc(x, x.shape) if needs_x else dy.new_empty((0,))]
    out.append(empty_nhwc(dy, dy.shape) if needs_residual and relu else dy.new_empty((0,)))
    for w, gamma, beta, need in zip(weights, gammas, betas, needs_weight, strict=True):
        out += [
            torch.empty_like(w) if need else dy.new_empty((0,)),
            torch.empty_like(gamma),
            torch.empty_like(beta),
        ]
    return out


for _name, _impl, _fake in (
    ("residual_block", _forward, _fake_forward),
    ("residual_block_backward", _backward, _fake_backward),
):
    for _key in ("CPU", "CUDA"):
        _LIB.impl(_name, _impl, _key)
    torch.library.register_fake(f"resnet_fused::{_name}", _fake, lib=_LIB)

# What each op runs, for counting.
COMPOSITIONS: dict[str, Callable[..., list[Tensor]]] = {
    "residual_block": _forward,
    "residual_block_backward": _backward,
}

forbid_gradients("residual_block_backward")  # a second derivative raises


# ------------------------------------------------------------------------------------------- autograd


def _call_backward(ctx: Any, dy: Tensor, x: Tensor, lists: list[list[Tensor]], stats, saved, needs) -> list:
    needs_x, needs_residual, needs_weight = needs
    grads = torch.ops.resnet_fused.residual_block_backward(
        dy, x, *lists, stats, saved, *ctx.config, needs_x, needs_residual, needs_weight
    )
    grads = list(grads)
    *_, relu, scale = ctx.config
    if needs_residual and not relu:  # no ReLU: the residual's gradient is the output's
        grads[1] = dy if scale == 1 else dy * scale
    return grads


class ResidualBlock(torch.autograd.Function):
    """The block under autograd: (spec, x, residual, *[weight, gamma, beta, mean, var] a unit) -> (y, *stats)."""

    @staticmethod
    def forward(ctx, spec: BlockSpec, x: Tensor, residual: Tensor | None, *tensors: Tensor):
        lists = [list(tensors[i::5]) for i in range(5)]
        ctx.config = encode(spec)
        outputs = torch.ops.resnet_fused.residual_block(x, residual, *lists, *ctx.config, spec.save)
        n_stats = sum(u.n_stats for u in spec.units)
        ctx.counts = (len(spec.units), n_stats)
        ctx.save_for_backward(x, *tensors, *outputs[1:])
        ctx.mark_non_differentiable(*outputs[1 : 1 + n_stats])
        return tuple(outputs[: 1 + n_stats])

    @staticmethod
    def backward(ctx, dy: Tensor, *_dstats: Tensor):
        n, n_stats = ctx.counts
        x, *rest = ctx.saved_tensors
        tensors, rest = rest[: 5 * n], rest[5 * n :]
        stats, saved = rest[:n_stats], rest[n_stats:]
        need = ctx.needs_input_grad[1:]
        needs = (need[0], need[1], [need[2 + 5 * i] for i in range(n)])
        grads = _call_backward(ctx, dy, x, [list(tensors[i::5]) for i in range(5)], stats, saved, needs)
        out: list[Tensor | None] = [None, grads[0] if need[0] else None, grads[1] if need[1] else None]
        for i in range(n):
            wanted = need[2 + 5 * i : 5 + 5 * i]
            out += [g if w else None for g, w in zip(grads[2 + 3 * i : 5 + 3 * i], wanted, strict=True)]
            out += [None, None]
        return tuple(out)


def _setup(ctx, inputs, output) -> None:
    x, _residual, *lists, geometry, eps, groups, shortcut, relu, shortcut_scale, save = inputs
    ctx.config = (geometry, eps, groups, shortcut, relu, shortcut_scale)
    ctx.save = save
    ctx.n = len(eps)
    spec = decode(geometry, eps, groups, shortcut, relu, shortcut_scale, save)
    ctx.n_stats = sum(u.n_stats for u in spec.units)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, *[t for tensors in lists for t in tensors], *output[1:])


def _registered_backward(ctx, dout: list[Tensor]):
    """Gradients of a direct call, e.g. from an exported graph; only y (output 0) carries one."""
    if not ctx.save:
        raise RuntimeError("resnet_fused::residual_block was called with save=False: it kept nothing for backward")
    x, *rest = ctx.saved_tensors
    n = ctx.n
    lists, rest = [list(rest[i * n : (i + 1) * n]) for i in range(5)], rest[5 * n :]
    stats, saved = rest[: ctx.n_stats], rest[ctx.n_stats :]
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], [True] * n)
    grads = _call_backward(ctx, dout[0], x, lists, stats, saved, needs)
    units = [[grads[2 + 3 * i + j] for i in range(n)] for j in range(3)]
    return (
        grads[0] if needs[0] else None, grads[1] if needs[1] else None, *units, [None] * n, [None] * n,
        None, None, None, None, None, None, None,
    )  # fmt: skip


torch.library.register_autograd("resnet_fused::residual_block", _registered_backward, setup_context=_setup, lib=_LIB)
