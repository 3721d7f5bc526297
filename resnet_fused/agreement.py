"""How near two implementations of a model come to float64: outputs, running statistics, every gradient."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("outputs", "running statistics", "gradients")
Observed = dict[tuple[str, str], Tensor]  # (kind, name) -> tensor


class Error(NamedTuple):
    """||got - reference|| / ||reference|| of one tensor, for eager and for fused."""

    kind: str
    name: str
    eager: float
    fused: float

    def passes(self, floor: float) -> bool:
        """The package's rule: at most twice eager's own error, give or take rounding."""
        return self.fused <= 2 * self.eager + floor


class Agreement(NamedTuple):
    """The errors of all tensors of one kind."""

    kind: str
    errors: list[Error]
    floor: float

    @property
    def medians(self) -> tuple[float, float]:
        """(eager, fused)."""
        return median(e.eager for e in self.errors), median(e.fused for e in self.errors)

    def worst(self, which: str) -> Error:
        return max(self.errors, key=lambda error: getattr(error, which))

    @property
    def failures(self) -> list[Error]:
        return [error for error in self.errors if not error.passes(self.floor)]


def observe(model: nn.Module, x: Tensor, labels: Tensor, training: bool) -> Observed:
    """One forward and backward of cross entropy: x [N, 3, H, W], labels [N]. The model is left untouched."""
    model = copy.deepcopy(model).train(training)
    model.zero_grad(set_to_none=True)
    output = model(x)
    F.cross_entropy(output, labels).backward()
    return {("outputs", "logits"): output.detach()} | dict(_statistics(model)) | dict(_gradients(model))


def _statistics(model: nn.Module) -> Iterator[tuple[tuple[str, str], Tensor]]:
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            yield ("running statistics", name), buffer


def _gradients(model: nn.Module) -> Iterator[tuple[tuple[str, str], Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            raise RuntimeError(f"{name} got no gradient")
        yield ("gradients", name), parameter.grad


def compare(
    eager: nn.Module, fused: nn.Module, x: Tensor, labels: Tensor, training: bool, floor: float = 1e-6
) -> list[Agreement]:
    """Both models against a float64 run of `eager`, one Agreement for each of KINDS.

    Raises RuntimeError where the models do not have the same parameters and buffers.
    """
    exact = observe(copy.deepcopy(eager).double(), x.double(), labels, training)
    runs = [observe(model, x, labels, training) for model in (eager, fused)]
    for run in runs:
        if run.keys() != exact.keys():
            raise RuntimeError(f"the models differ in {sorted(run.keys() ^ exact.keys())}")
    errors = [Error(*key, *(_relative(run[key], exact[key]) for run in runs)) for key in exact]
    return [Agreement(kind, [e for e in errors if e.kind == kind], floor) for kind in KINDS]


def _relative(got: Tensor, exact: Tensor) -> float:
    """NaN counts as infinitely wrong."""
    error = torch.linalg.vector_norm(got.double() - exact) / torch.linalg.vector_norm(exact)
    return float(error.nan_to_num(nan=float("inf")))
