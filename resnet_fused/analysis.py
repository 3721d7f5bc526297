"""What trained networks show: their layers' responses, degradation with depth, and that fused and eager curves agree.

After He et al., "Deep Residual Learning for Image Recognition" (2015), figures 6 and 7.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import metrics, plots, recipe
from .checkpoint import STATE, CheckpointError, read_state
from .recipe import Recipe
from .train import Run, train

# ---------------------------------------------------------------- responses


@torch.no_grad()
def responses(model: nn.Module, batches: Sequence[Tensor]) -> dict[str, float]:
    """The standard deviation of each batch norm's output, before what follows it, in the order of execution.

    `model` in eval mode on `batches` of images [n, C, H, W]. A shortcut's norm is no layer and left out. A hook on its
    norm makes a fused block run module by module. Raises ValueError for a network without batch norms.
    """
    sums: dict[str, Tensor] = {}  # [count, sum, sum of squares]

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: object, y: Tensor) -> None:
            own = torch.stack(
                [torch.tensor(y.numel(), dtype=torch.float64), y.double().sum(), y.double().square().sum()]
            )
            sums[name] = sums[name] + own if name in sums else own

        return hook

    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and not {"downsample", "shortcut"} & {*name.split(".")}
    }
    if not norms:
        raise ValueError(f"{type(model).__name__} has no batch norms, whose outputs are the responses")
    handles = [module.register_forward_hook(watch(name)) for name, module in norms.items()]
    was_training = model.training
    try:
        model.eval()
        for x in batches:
            model(x)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    found = {}
    for name, (count, total, squares) in sums.items():
        mean = total / count
        found[name] = (squares / count - mean**2).clamp_min(0).sqrt().item()
    return found


def plot_responses(found: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """For each network its layers' responses, in their order and from the largest to the smallest."""
    fig = plots.figure(7, 7)
    panels = fig.subplots(2, 1, sharey=True)
    for name, stds in found.items():
        layers = range(1, len(stds) + 1)
        panels[0].plot(layers, list(stds.values()), marker="o", markersize=2, label=name)
        panels[1].plot(layers, sorted(stds.values(), reverse=True), marker="o", markersize=2, label=name)
    for axes, label in zip(panels, ("layer, in order", "layer, by magnitude"), strict=True):
        axes.set(xlabel=label, ylabel="standard deviation of the response")
    plots.save_curves(fig, path)


# ---------------------------------------------------------------- degradation


@dataclass(frozen=True)
class Curve:
    """A run's iterations, and its tests."""

    name: str
    iterations: list[dict[str, Any]]
    history: list[dict[str, float]]
    seconds: float

    @classmethod
    def of(cls, name: str, folder: Path) -> Curve:
        """Raises CheckpointError or FileNotFoundError where the folder has no run."""
        state, _ = read_state(folder)
        rows = metrics.rows(folder / metrics.FILE)
        if not rows:
            raise CheckpointError(f"{folder / metrics.FILE} has no iterations, though there is a {STATE}")
        return cls(name, rows, state["history"], state["seconds"])

    def smoothed(self, column: str, window: int) -> tuple[list[int], list[float]]:
        """(iterations, means of a column over the `window` iterations up to each)."""
        values = [row[column] for row in self.iterations]
        window = min(window, len(values))
        totals = [0.0, *accumulate(values)]
        means = [(totals[i] - totals[i - window]) / window for i in range(window, len(totals))]
        return [row["iteration"] for row in self.iterations[window - 1 :]], means


DEPTHS = ("cifar_plain20", "cifar_plain56", "cifar_resnet20", "cifar_resnet56")


def degradation(names: Sequence[str], base: Recipe, folder: Path, console: Any, device: str = "cpu") -> list[Run]:
    """Trains each network alike, in a folder of its own, and plots the errors; finished ones are not trained again."""
    runs = []
    for name in names:
        console.rule(f"[bold]{name}")
        own = recipe.changed(base, {"model": name})
        runs.append(train(own, folder / name, device, console, resume=(folder / name / STATE).exists()))
    plot_errors([Curve.of(name, folder / name) for name in names], folder / "degradation.png")
    return runs


def plot_errors(curves: Sequence[Curve], path: Path, window: int = 50) -> None:
    """Errors over the iterations: thin on the training images (means over `window`), bold on the held-out ones."""
    fig = plots.figure(8, 5)
    axes = fig.subplots()
    for i, curve in enumerate(curves):
        x, accuracy = curve.smoothed("accuracy", window)
        axes.plot(x, [100 * (1 - a) for a in accuracy], color=f"C{i}", linewidth=0.8, linestyle="--")
        errors = [100 * (1 - row["test_accuracy"]) for row in curve.history]
        at = [row["iteration"] for row in curve.history]
        axes.plot(at, errors, color=f"C{i}", linewidth=2, marker="o", markersize=3, label=curve.name)
    axes.set(xlabel="iteration", ylabel="error, % (dashed: training)", ylim=(0, None))
    plots.save_curves(fig, path)


# ---------------------------------------------------------------- fused against eager


@dataclass(frozen=True)
class Coincidence:
    """How far two runs lie apart: the largest difference of their losses, smoothed, and of their test accuracies."""

    loss: float
    accuracy: float
    iterations: int  # that both have


def coincidence(first: Curve, second: Curve, window: int = 50) -> Coincidence:
    """Over the iterations and tests that both runs have. Raises ValueError if there are none."""
    losses = [dict(zip(*curve.smoothed("loss", window), strict=True)) for curve in (first, second)]
    tests = [{row["iteration"]: row["test_accuracy"] for row in curve.history} for curve in (first, second)]
    shared, tested = losses[0].keys() & losses[1].keys(), tests[0].keys() & tests[1].keys()
    if not shared:
        raise ValueError(f"{first.name} and {second.name} have no iterations in common")
    return Coincidence(
        max(abs(losses[0][i] - losses[1][i]) for i in shared),
        max((abs(tests[0][i] - tests[1][i]) for i in tested), default=0.0),
        max(shared),
    )


def plot_coincidence(curves: Sequence[Curve], path: Path, window: int = 50) -> None:
    """Training loss (means over `window`) and held-out accuracy of the runs on top of each other."""
    fig = plots.figure(10, 4)
    left, right = fig.subplots(1, 2)
    styles = ["-", "--", ":", "-."]
    for i, curve in enumerate(curves):
        label = f"{curve.name}, {curve.seconds:.0f} s"
        style = {"linestyle": styles[i % len(styles)], "linewidth": 3 if i == 0 else 1.5, "label": label}
        left.plot(*curve.smoothed("loss", window), **style)
        right.plot(
            [row["iteration"] for row in curve.history],
            [100 * row["test_accuracy"] for row in curve.history],
            marker="o",
            markersize=3,
            **style,
        )
    left.set(xlabel="iteration", ylabel=f"training loss, mean of {window}")
    low, high = right.get_ylim()
    beside = max(0.0, 10 - (high - low)) / 2  # at least ten points, so that what is noise looks small
    right.set(xlabel="iteration", ylabel="held-out accuracy, %", ylim=(low - beside, high + beside))
    plots.save_curves(fig, path)
