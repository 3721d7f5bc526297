"""The fused ops as functions: one conv + batch norm unit, or the whole chain of a residual block.

Everything is checked here, before anything is written; what eager PyTorch takes and no kernel serves runs as
plain PyTorch (`resnet_fused.reference`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from . import reference
from .checks import DTYPES, broadcasts, check_memory, check_padded, check_preact, check_unit, fallback_reason
from .ops.aten import Geometry
from .ops.layout import Padded, acc_dtype, autocast_type, to_nhwc
from .ops.pointwise import matrix_kernels_take
from .ops.preact_block import PreActSpec
from .ops.residual_block import ResidualBlock, encode
from .ops.spec import BlockSpec, UnitSpec
from .ops.sync import Group
from .planner import plan_units, special_shortcut
from .recorder import Pass, record

__all__ = ["BNConv", "ConvBN", "Padded", "conv_bn_act", "gate_act", "preact_block", "residual_block"]

Memory = Literal["lean", "fast"]


@dataclass(frozen=True)
class ConvBN:
    """The tensors and constants of one conv + batch norm unit.

    weight: [K, C/groups, R, S]; bias, gamma, beta, running_mean, running_var: [K] or None.
    `training` normalises with the batch's statistics and moves the running ones in place as nn.BatchNorm2d does,
    by `momentum`, or with None by the cumulative mean over `num_batches_tracked` (0-d int64, counted up).
    `has_norm=False` is a convolution with its bias alone. stride, padding, dilation, groups: F.conv2d's, and `eps`
    F.batch_norm's. The weight has the input's dtype, vectors any floating one; the functions check all of them.
    `group`, a torch.distributed.ProcessGroup, makes a training norm that of all its processes' batches together, which
    may differ in size, as nn.SyncBatchNorm does: each of them makes the call.
    """

    weight: Tensor
    bias: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    training: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    has_norm: bool = True
    group: Any = None

    @property
    def geometry(self) -> Geometry:
        """Stride, padding, dilation and groups together."""
        return Geometry(self.stride, self.padding, self.dilation, self.groups)

    @property
    def batch_stats(self) -> bool:
        """Whether this call normalises with the batch's statistics."""
        return self.has_norm and (self.training or self.running_mean is None)

    @property
    def shared(self) -> Group | None:
        """The processes whose batches this call normalises as one; None where that is this process alone."""
        return Group.of(self.group) if self.has_norm and self.training else None


def conv_bn_act(
    x: Tensor, unit: ConvBN, residual: Tensor | None = None, relu: bool = True, memory: Memory = "lean"
) -> Tensor:
    """act(bn(conv(x)) + residual), one unit.

    Equivalent to: ``y = F.batch_norm(F.conv2d(x, weight, ...), ...); y = F.relu(y + residual)``

    x: [N, C, H, W] float32, bfloat16, float16 or float64, any strides; residual: [N, K, P, Q] of the same dtype.
    unit: its weight of x's dtype. relu: whether there is an act. memory: as in `residual_block`, and so are the errors.
    Returns [N, K, P, Q] channels_last.
    """
    return residual_block(x, [unit], residual, relu=relu, memory=memory)


def residual_block(
    x: Tensor,
    units: Sequence[ConvBN],
    shortcut: Literal["identity", "concat"] | Tensor | ConvBN | Padded | None = "identity",
    relu: bool = True,
    memory: Memory = "lean",
    branch_scale: float = 1.0,
    shortcut_scale: float = 1.0,
) -> Tensor:
    """act(bn_n(conv_n(... relu(bn_1(conv_1(x))))) + shortcut(x)): a whole block, forward and backward fused.

    x: [N, C, H, W] float32, bfloat16, float16 or float64, any strides. units: of the chain, in order; their weights
    have x's dtype (under autocast each may have any). relu: whether there is an act.
    `shortcut`: "identity", a tensor [N, K, P, Q] to add, a ConvBN (projection of x), a `Padded` (x strided, with
    channels of zeros), or None. A shortcut that broadcasts to [N, K, P, Q] runs as plain PyTorch.
    "concat" puts x in front of the chain's channels instead of adding it, outside of the ReLU: [N, C + K, P, Q].
    `branch_scale` and `shortcut_scale` multiply the two terms of the sum; they cost no pass over memory.
    `memory`: "lean" never keeps the last unit's raw output, "fast" keeps it.
    Returns [N, K, P, Q] channels_last (or as "concat" says); running statistics of training units are moved in place.
    Source of the mathematics: He et al., "Deep Residual Learning for Image Recognition" (2015), figure 5;
    the backward of `resnet_fused.ops.block`.
    Raises, before anything is written, TypeError for an x that is no Tensor and ValueError naming the argument, what
    came and what was expected; second derivatives raise RuntimeError.
    """
    check_memory(memory)
    if not units:
        raise ValueError("units is empty, expected at least one ConvBN")
    kind = _kind(shortcut)
    if kind == "concat" and fallback_reason(x) is None and operand_dtype(x) != x.dtype:
        y = residual_block(x, units, None, relu, memory, branch_scale)  # autocast: eager's cat leaves x as it is
        return torch.cat([reference.scaled(x, shortcut_scale), y], 1)
    everything = [*units, shortcut] if isinstance(shortcut, ConvBN) else list(units)
    plain = x
    shared = any(unit.shared is not None for unit in everything)
    reason = fallback_reason(x, any(unit.has_norm for unit in everything), shared)
    if reason is None:
        x, everything, residual = _autocast(x, everything, shortcut)
        shapes, reason = _check(x, everything, shortcut, residual)
        if shortcut_scale != 1 and kind == "concat":
            reason = "the shortcut is scaled and concatenated"
    if reason is not None:
        record(plain, units, shortcut, None, reason)
        return reference.residual_block(plain, units, shortcut, relu, branch_scale, shortcut_scale)
    spec = _specify(x, everything, residual, shortcut, relu, memory, shortcut_scale)
    record(x, units, shortcut, spec, None)
    factors = [1.0] * (len(units) - 1) + [branch_scale, shortcut_scale]
    tensors = [t for unit, factor in zip(everything, factors, strict=False) for t in _flat(unit, x, spec.save, factor)]
    if spec.save:
        y, *stats = ResidualBlock.apply(spec, x, residual, *tensors)
    else:
        lists = [tensors[i::5] for i in range(5)]
        y, *stats = torch.ops.resnet_fused.residual_block(x, residual, *lists, *encode(spec), False)
    _update_running(everything, stats, shapes)
    return y


def _kind(shortcut: object) -> str:
    """The shortcut's kind, one of `ops.spec.SHORTCUTS`."""
    if isinstance(shortcut, Tensor):
        return "residual"
    if isinstance(shortcut, ConvBN):
        return "projection"
    if isinstance(shortcut, Padded):
        return "padded"
    if shortcut is None:
        return "none"
    if shortcut not in ("identity", "concat"):
        raise ValueError(
            f'shortcut is {shortcut!r}, expected "identity", "concat", a Tensor, a ConvBN, a Padded or None'
        )
    return str(shortcut)


def operand_dtype(t: Tensor) -> torch.dtype:
    """That in which a convolution takes `t`: under autocast its dtype, as in eager PyTorch."""
    device = autocast_type(t)
    autocast = t.dtype != torch.float64 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else t.dtype


def _autocast(x: Tensor, units: list[ConvBN], shortcut: object) -> tuple[Tensor, list[ConvBN], Tensor | None]:
    """Under autocast the operands take its dtype, as eager's convolutions do."""
    residual = shortcut if isinstance(shortcut, Tensor) else None
    if x.dtype != torch.float64 and torch.is_autocast_enabled(autocast_type(x)):
        dtype = operand_dtype(x)
        units = [replace(u, weight=u.weight.to(dtype)) for u in units]
        x = x.to(dtype)
        residual = residual if residual is None else residual.to(dtype)
    return x, units, residual


def _check(x: Tensor, units: list[ConvBN], shortcut: object, residual: Tensor | None) -> tuple[list[tuple], str | None]:
    """Checks every argument; the output shape [N, K, P, Q] of each unit, and why eager PyTorch must run them."""
    projected = isinstance(shortcut, ConvBN)
    shape = tuple(x.shape)
    shapes = []
    for i, unit in enumerate(units[:-1] if projected else units):
        shape = check_unit(f"units[{i}]", unit, shape, x)
        shapes.append(shape)
    if shortcut is None:
        return shapes, None
    got = tuple((x if residual is None else residual).shape)
    if projected:
        got = check_unit("shortcut", units[-1], tuple(x.shape), x)
        shapes.append(got)
    if isinstance(shortcut, Padded):
        got = check_padded(shortcut, got, shape)
    if _kind(shortcut) == "concat":
        if got[:1] + got[2:] != shape[:1] + shape[2:]:
            raise ValueError(
                f'residual_block: shortcut "concat" has shape {list(got)}, the chain gives {list(shape)}: expected the '
                "same N, H and W"
            )
        return shapes, None
    if not broadcasts(got, shape):
        raise ValueError(f"residual_block: shortcut gives shape {list(got)}, expected {list(shape)} (the chain's)")
    if residual is not None and (residual.dtype, residual.device) != (x.dtype, x.device):
        raise ValueError(
            f"residual_block: shortcut is {residual.dtype} on {residual.device}, expected {x.dtype} on {x.device}"
        )
    return shapes, None if got == shape else f"the shortcut {list(got)} broadcasts to {list(shape)}"


def _specify(
    x: Tensor, units: list[ConvBN], residual: Tensor | None, shortcut: object, relu: bool, memory: Memory, scale: float
) -> BlockSpec:
    kind = _kind(shortcut)
    scale = 1.0 if kind in ("projection", "none") else scale
    special = special_shortcut(kind, scale)
    tensors = [x, residual, *(t for u in units for t in (u.weight, u.gamma, u.beta, u.bias))]
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors if t is not None)
    asked = (kind == "projection", memory, x.dtype, matrix_kernels_take(x), special, x.device)
    plans = plan_units(tuple(x.shape), units, *asked)
    specs = tuple(
        UnitSpec(
            u.geometry,
            u.eps if u.has_norm else 0.0,
            u.batch_stats,
            plan,
            save and u.gamma is not None and u.gamma.requires_grad,
            u.shared,
        )
        for u, plan in zip(units, plans, strict=True)
    )
    return BlockSpec(specs, kind, relu, save, scale, shortcut if isinstance(shortcut, Padded) else Padded())


def vector(t: Tensor | None, default: float, like: Tensor, size: int) -> Tensor:
    """`t` [size] in the accumulation type of `like`; where it is None, all `default`."""
    acc = acc_dtype(like.dtype)
    return like.new_full((size,), default, dtype=acc) if t is None else t.to(acc)


def given_stats(running_mean: Tensor | None, running_var: Tensor | None, like: Tensor, size: int, save: bool):
    """(mean, var) to normalise with, each [size]; own copies if a backward may follow.

    A training step in between moves the running ones in place.
    """
    stats = vector(running_mean, 0, like, size), vector(running_var, 1, like, size)
    return tuple(t.clone() for t in stats) if save else stats


def _flat(unit: ConvBN, x: Tensor, save: bool, factor: float = 1.0) -> tuple[Tensor, ...]:
    """(weight, gamma, beta, mean, var) as the op takes them: those of `factor` times the unit."""
    weight, gamma, beta, *stats = _normalised(unit, x, save)
    if factor != 1:
        gamma, beta = gamma * factor, beta * factor
    return weight, gamma, beta, *stats


def _normalised(unit: ConvBN, x: Tensor, save: bool) -> tuple[Tensor, ...]:
    """(weight, gamma, beta, mean, var): a missing norm is the identity's."""
    k = unit.weight.shape[0]
    if not unit.has_norm:
        beta = vector(unit.bias, 0, x, k)
        return unit.weight, vector(None, 1, x, k), beta, vector(None, 0, x, k), vector(None, 1, x, k)
    gamma, beta = vector(unit.gamma, 1, x, k), vector(unit.beta, 0, x, k)
    if unit.batch_stats:
        mean, var = (vector(None, 0, x, 0) for _ in range(2))  # not one twice: torch.compile refuses that
        if unit.bias is not None:  # the batch's mean takes it away again: its gradient is zero
            beta = beta + 0 * unit.bias.to(beta.dtype)
        return unit.weight, gamma, beta, mean, var
    mean, var = given_stats(unit.running_mean, unit.running_var, x, k, save)
    if unit.bias is not None:
        beta = beta + gamma * torch.rsqrt(var + unit.eps) * unit.bias.to(beta.dtype)
    return unit.weight, gamma, beta, mean, var


def _update_running(units: list[ConvBN], stats: Sequence[Tensor], shapes: list[tuple]) -> None:
    """Moves the running statistics of the units that used the batch's."""
    it = iter(stats)
    for unit, (n, _, p, q) in zip(units, shapes, strict=True):
        if not unit.batch_stats:
            continue
        mean, var = next(it), next(it)
        pixels = n * p * q if unit.shared is None else next(it)
        if not unit.training or unit.running_mean is None or unit.running_var is None:
            continue
        if unit.bias is not None:
            mean = mean + unit.bias.detach()
        factor = reference.average_factor(unit.num_batches_tracked, unit.momentum)
        move_running(unit.running_mean, unit.running_var, mean, var, pixels, factor)


@torch.no_grad()
def move_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, pixels: int | Tensor, factor: float | Tensor
) -> None:
    """running += factor (batch - running) in place, with the unbiased variance, as PyTorch does. All [K]."""
    if isinstance(factor, Tensor):
        factor = factor.to(mean.dtype)
    for running, batch in ((running_mean, mean), (running_var, var * (pixels / (pixels - 1)))):
        if running.dtype == batch.dtype:
            running.lerp_(batch, factor)
        else:  # one rounding, at the end
            running.copy_(torch.lerp(running.to(batch.dtype), batch, factor))


# -------------------------------------------------------------------------------------------- pre-activation

Stats = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class BNConv(ConvBN):
    """One unit conv(relu(bn(x))): fields and dtypes as `ConvBN`'s, but the norm's are [C], of the input's channels."""


def preact_block(
    x: Tensor,
    units: Sequence[BNConv],
    projection: ConvBN | Padded | None = None,
    stats: Stats | None = None,
    hand_on: bool = False,
) -> tuple[Tensor, Stats | None]:
    """u_n + x with u_i = conv_i(relu(bn_i(u_{i-1}))), u_0 = x: a pre-activation block, forward and backward fused.

    x: [N, C, H, W] float32, bfloat16, float16 or float64, any strides. units: in order, their weights of x's dtype.
    `projection` stands in for the identity: a convolution without a norm, which takes relu(bn_1(x)), or a Padded, x
    strided and with channels of zeros.
    `stats`: mean and biased variance of x, each [C] in the accumulation type, from the block that wrote x (this
    process's x, also where a norm has a group); without them a pass over x takes them. Their gradient is part of x's.
    `hand_on`: whether to return those of y, which the pass that writes y takes. Returns (y [N, K, P, Q] channels_last,
    (mean, var) or None); running statistics of training units are moved in place. Source: He et al., "Identity
    Mappings in Deep Residual Networks" (2016), figure 1. Errors as `residual_block`'s: ValueError naming the argument.
    Second derivatives raise.
    """
    if not units:
        raise ValueError("units is empty, expected at least one BNConv")
    plain, padded = x, projection if isinstance(projection, Padded) else None
    everything = [*units, *([projection] if isinstance(projection, ConvBN) else [])]
    reason = fallback_reason(x, shared=any(unit.shared is not None for unit in units))
    if reason is None:
        x, cast, _ = _autocast(x, [*everything], None)
        other = cast[-1] if len(cast) > len(units) else padded
        shapes = check_preact(x, cast[: len(units)], other, stats)
        biased = any(unit.bias is not None for unit in everything)
        reason = "a convolution has a bias" if biased else None
    if reason is not None:
        record(plain, units, projection, None, reason)
        return reference.preact_block(plain, units, projection), None
    own, eps, groups = zip(*((u.batch_stats, u.eps, u.shared) for u in units), strict=True)
    spec = PreActSpec(tuple(u.geometry for u in cast), own, eps, groups, padded)
    tensors = [x, *(t for u in cast for t in (u.weight, u.gamma, u.beta))]
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors if t is not None)
    record(x, units, projection, spec, None)
    vectors = [_norm_vectors(unit, x, shape[1], save) for unit, shape in zip(units, shapes, strict=True)]
    lists = [list(v) for v in zip(*vectors, strict=True)]
    used = stats if stats is not None and units[0].batch_stats else ()
    y, *rest = torch.ops.resnet_fused.preact_block(
        to_nhwc(x), [u.weight for u in cast], *lists, list(used), *spec.encode(), hand_on, save
    )
    handed, rest = rest[: 2 * hand_on], rest[2 * hand_on :]
    _update_running(list(units), rest, shapes)
    return y, (handed[0], handed[1]) if hand_on else None


def _norm_vectors(unit: ConvBN, x: Tensor, size: int, save: bool) -> tuple[Tensor, ...]:
    """(gamma, beta, mean, var) of the norm in front; mean and var are empty with batch statistics."""
    affine = vector(unit.gamma, 1, x, size), vector(unit.beta, 0, x, size)
    if unit.batch_stats:
        return *affine, vector(None, 0, x, 0), vector(None, 0, x, 0)
    return *affine, *given_stats(unit.running_mean, unit.running_var, x, size, save)


# ------------------------------------------------------------------------------------------------------ gate


def gate_act(v: Tensor, x: Tensor, f: Tensor, relu: bool = True) -> Tensor:
    """act((1 - g) x + g f) with g = sigmoid(v): one pass forward, one backward.

    v, x, f: [N, C, H, W] of one dtype, any strides; what eager PyTorch broadcasts or promotes runs as plain PyTorch.
    relu: whether there is an act. Returns [N, C, H, W] channels_last. Raises TypeError for a v that is no Tensor;
    second derivatives raise RuntimeError.
    """
    reason = fallback_reason(v)
    if reason is None and (v.dim() != 4 or not v.shape == x.shape == f.shape):
        reason = "its operands differ in shape"
    if reason is None and not v.dtype == x.dtype == f.dtype:
        reason = "its operands differ in dtype"
    if reason is None and v.dtype not in DTYPES:
        reason = f"{v.dtype} has no kernel"
    record(v, (), None, None if reason else Pass("fused", "the gate, the sum and the ReLU in one pass"), reason)
    if reason is not None:
        return reference.gate_act(v, x, f, relu)
    save = relu and torch.is_grad_enabled() and any(t.requires_grad for t in (v, x, f))
    return torch.ops.resnet_fused.gate_act(to_nhwc(v), to_nhwc(x), to_nhwc(f), relu, save)[0]
