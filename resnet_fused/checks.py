"""Checks at the API's edge: each error names the argument, what came and what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backend
from .ops.layout import Padded, acc_dtype

if TYPE_CHECKING:
    from .functional import ConvBN

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_memory(memory: str) -> None:
    if memory not in ("lean", "fast"):
        raise ValueError(f'memory is {memory!r}, expected "lean" or "fast"')


def fallback_reason(x: Tensor, has_norm: bool = True, shared: bool = False) -> str | None:
    """Why eager PyTorch, which takes these arguments, must run them; None if the fused ops can.

    shared: whether other processes wait for statistics of x, even of an empty one.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}, expected a Tensor")
    if x.dim() == 4 and x.numel() == 0 and not shared:
        return "empty input"
    if x.dim() == 3 and not has_norm:
        return "no batch dimension"  # which a convolution takes and a batch norm does not
    if not backend.fuses():
        return "fusion is switched off"
    if x.dtype.is_complex:
        return f"{x.dtype} has no kernel"
    if x.device.type not in ("cpu", "cuda", "meta"):  # of meta tensors the ops give the shapes
        return f"device {x.device.type} has no kernel"
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside a torch.func transform"
    if forward_ad._current_level >= 0:
        return "inside forward-mode differentiation"
    return None


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether a tensor of `shape` can be added in place to one of shape `to`."""
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape[::-1], to[::-1], strict=False))


def check_padded(padded: Padded, x_shape: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a padded shortcut gives x [N, C, H, W] in a block whose chain gives `shape`."""
    stride, before = padded
    if stride < 1:
        raise ValueError(f"shortcut.stride is {stride}, expected at least 1")
    if not 0 <= before <= shape[1] - x_shape[1]:
        raise ValueError(
            f"shortcut.before is {before}, expected 0 to {shape[1] - x_shape[1]}: x has {x_shape[1]} channels, the "
            f"chain gives {shape[1]}"
        )
    return padded.shape(x_shape, shape[1])


def check_unit(name: str, unit: ConvBN, x_shape: tuple[int, ...], x: Tensor) -> tuple[int, int, int, int]:
    """Checks one unit against its input's shape [N, C, H, W]; its output's shape."""
    if len(x_shape) != 4:
        raise ValueError(f"x has shape {list(x_shape)}, expected 4 dimensions [N, C, H, W]")
    w = unit.weight
    if w.dim() != 4:
        raise ValueError(f"{name}.weight has shape {list(w.shape)}, expected 4 dimensions [K, C/groups, R, S]")
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if w.dtype != x.dtype:
        raise ValueError(f"{name}.weight is {w.dtype}, expected {x.dtype} (that of x)")
    k, per_group = w.shape[:2]
    groups = unit.groups
    if groups < 1 or k % groups:
        raise ValueError(f"{name}.groups is {groups}, expected a divisor of the {k} output channels")
    if per_group * groups != x_shape[1]:
        raise ValueError(
            f"{name}.weight has shape {list(w.shape)} with groups={groups}, which takes {per_group * groups} "
            f"channels; its input has {x_shape[1]} (shape {list(x_shape)})"
        )
    _check_geometry(name, unit)
    for field in ("bias", "gamma", "beta", "running_mean", "running_var"):
        t = getattr(unit, field)
        if t is not None and tuple(t.shape) != (k,):
            raise ValueError(f"{name}.{field} has shape {list(t.shape)}, expected [{k}] (output channels)")
    for field in ("weight", "bias", "gamma", "beta", "running_mean", "running_var"):
        t = getattr(unit, field)
        if t is not None and t.device != x.device:
            raise ValueError(f"{name}.{field} is on {t.device}, expected {x.device} (that of x)")
    if (unit.running_mean is None) != (unit.running_var is None):
        raise ValueError(f"{name}: running_mean and running_var must both be given, or neither")
    shape = unit.geometry.out_shape(x_shape, w.shape)
    if shape[2] < 1 or shape[3] < 1:
        raise ValueError(
            f"{name}: a {list(w.shape[2:])} kernel (dilation {list(unit.dilation)}, padding {list(unit.padding)}) "
            f"does not fit into an input of shape {list(x_shape)}"
        )
    _check_values(name, unit, shape)
    return shape


def check_preact(
    x: Tensor, units: Sequence[ConvBN], projection: ConvBN | Padded | None, stats: tuple[Tensor, Tensor] | None
) -> list[tuple[int, ...]]:
    """Checks a pre-activation block's arguments; the shape [N, C, H, W] of each unit's input."""
    shape = tuple(x.shape)
    shapes: list[tuple[int, ...]] = []
    for i, unit in enumerate(units):
        after = check_unit(f"units[{i}]", _conv_of(unit), shape, x)
        _check_norm(f"units[{i}]", unit, shape, x)
        shapes.append(shape)
        shape = after
    got = tuple(x.shape)
    if isinstance(projection, Padded):
        got = check_padded(projection, got, shape)
    elif projection is not None:
        if projection.has_norm:
            raise ValueError("projection has a norm, expected has_norm=False: its input is normalised already")
        got = check_unit("projection", projection, got, x)
    if got != shape:
        what = "x has" if projection is None else "projection gives"
        raise ValueError(f"preact_block: {what} shape {list(got)}, expected {list(shape)} (the chain's)")
    for name, t in zip(("mean", "var"), stats or (), strict=False):
        if tuple(t.shape) != (x.shape[1],) or t.dtype != acc_dtype(x.dtype) or t.device != x.device:
            raise ValueError(
                f"stats: {name} is {list(t.shape)} {t.dtype} on {t.device}, expected [{x.shape[1]}] "
                f"{acc_dtype(x.dtype)} on {x.device}"
            )
    return shapes


def _conv_of(unit: ConvBN) -> ConvBN:
    """The unit's convolution alone."""
    return replace(unit, gamma=None, beta=None, running_mean=None, running_var=None, has_norm=False, training=False)


def _check_values(name: str, unit: ConvBN, shape: tuple[int, ...]) -> None:
    """Whether what the unit normalises, [N, K, P, Q], has a variance."""
    if unit.batch_stats and shape[0] * shape[2] * shape[3] == 1 and unit.shared is None:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {torch.Size(shape)} ({name})"
        )


def _check_norm(name: str, unit: ConvBN, shape: tuple[int, ...], x: Tensor) -> None:
    """The norm in front of a convolution, of an input of this shape [N, C, H, W]."""
    if not unit.has_norm:
        raise ValueError(f"{name} has no norm, expected has_norm=True")
    for field in ("gamma", "beta", "running_mean", "running_var"):
        t = getattr(unit, field)
        if t is not None and (tuple(t.shape) != (shape[1],) or t.device != x.device):
            raise ValueError(
                f"{name}.{field} has shape {list(t.shape)} on {t.device}, expected [{shape[1]}] (input channels) on "
                f"{x.device}"
            )
    if (unit.running_mean is None) != (unit.running_var is None):
        raise ValueError(f"{name}: running_mean and running_var must both be given, or neither")
    _check_values(name, unit, shape)


def _check_geometry(name: str, unit: ConvBN) -> None:
    for field, least in (("stride", 1), ("padding", 0), ("dilation", 1)):
        value = getattr(unit, field)
        if len(value) != 2 or any(v < least for v in value):
            raise ValueError(f"{name}.{field} is {value}, expected two integers >= {least}")
