"""What a block is made of: its constants, the tensors of its units, and a batch norm ready for use."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from .aten import Geometry
from .dispatch import ops as _ops
from .layout import Padded, acc_dtype
from .sync import Group, Sums

SHORTCUTS = ("none", "identity", "residual", "projection", "padded", "concat")
PLANS = ("keep", "recompute", "gram")


class UnitSpec(NamedTuple):
    """The constants of one conv + batch norm unit."""

    geometry: Geometry
    eps: float
    batch_stats: bool  # normalise with the batch's statistics, else with the given ones
    plan: str  # one of PLANS; inner units are always "keep"
    track_gamma: bool  # gamma's gradient may be asked for, so the raw output is needed in backward
    group: Group | None = None  # the processes whose batches are normalised as one; only with batch_stats

    @property
    def n_stats(self) -> int:
        """How many tensors its statistics are: (mean, var), and with a group the count."""
        return 0 if not self.batch_stats else 2 if self.group is None else 3

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
    shortcut_scale: float = 1.0  # of identity, residual and padded; a projection's is in its gamma and beta
    padded: Padded = Padded()  # with shortcut "padded"; of "concat" the gradient is that of one without a stride

    @property
    def adds_as_it_is(self) -> bool:
        """Whether the shortcut, if any, is a tensor like the output to be added to it."""
        return self.shortcut not in ("padded", "concat") and self.shortcut_scale == 1

    @property
    def from_x(self) -> bool:
        """Whether the shortcut is x, whose gradient it adds to."""
        return self.shortcut in ("identity", "padded", "concat")

    def out_shape(self, branch: tuple[int, ...], x: tuple[int, ...]) -> tuple[int, ...]:
        """That of y for a branch [N, K, P, Q]: with "concat" [N, C + K, P, Q]."""
        n, k, p, q = branch
        return (n, k + x[1] * (self.shortcut == "concat"), p, q)

    def add_to_gradient(self, dx: Tensor, dz: Tensor) -> Tensor:
        """dx += the gradient of x through the shortcut from_x; returns dx. dz: that of the sum before the ReLU, or with
        "concat" that of y."""
        if self.shortcut in ("padded", "concat"):
            return self.padded.adjoint(dz, dx, self.shortcut_scale)
        return dx.add_(dz, alpha=self.shortcut_scale)

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

    def coefficients(self, sums: Sums | None) -> tuple[Tensor, Tensor]:
        """(coef_x, coef_1), each [K], of du = scale dz + coef_x (u - mean) + coef_1; None: statistics were given."""
        if sums is None:
            return torch.zeros_like(self.scale), torch.zeros_like(self.scale)
        return self.scale * self.rstd.square() * sums.dzx / -sums.pixels, self.scale * sums.dz / -sums.pixels

    def rows(self, rows: Tensor) -> Norm:
        """That of the channels `rows`."""
        return Norm(*(getattr(self, field.name)[rows] for field in fields(self)))

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
        mean, var = stats[:2] if spec.batch_stats else (self.mean, self.var)
        return Norm.of(mean, var, self.gamma, self.beta, spec.eps)

    def rows(self, rows: Tensor) -> UnitParams:
        """Those of the output channels `rows`, the weight in the accumulation type too."""
        weight, *vectors = self
        return UnitParams(weight[rows].to(acc_dtype(weight.dtype)), *(v[rows] if v.numel() else v for v in vectors))
