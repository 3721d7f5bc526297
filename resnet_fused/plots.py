"""Pictures of results, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .data import require


def figure(width: float = 6, height: float = 4) -> Any:
    """An empty figure that needs no display."""
    return require("matplotlib.figure", "a picture").Figure(figsize=(width, height), layout="constrained")


def save(fig: Any, path: Path) -> None:
    """As PNG, whole or not at all. Raises SaveError."""
    import io

    from .checkpoint import write

    content = io.BytesIO()
    fig.savefig(content, dpi=120, format="png")
    write(path, content.getvalue())


def save_curves(fig: Any, path: Path) -> None:
    """`save` of axes with curves, on a grid and explained by their labels."""
    for axes in fig.axes:
        axes.grid(alpha=0.3)
        axes.legend()
    save(fig, path)


def plot_history(history: Sequence[Mapping[str, float]], folder: Path, title: str) -> None:
    """accuracy.png and loss.png: on the training and on the held-out images, after each epoch."""
    epochs = [row["epoch"] for row in history]
    for what, unit, scale in (("accuracy", ", %", 100), ("loss", "", 1)):
        fig = figure()
        axes = fig.subplots()
        for part, name in (("train", "training"), ("test", "held-out")):
            axes.plot(epochs, [scale * row[f"{part}_{what}"] for row in history], marker="o", markersize=3, label=name)
        if what == "accuracy":
            best = max(history, key=lambda row: row["test_accuracy"])
            y = best["test_accuracy"]
            axes.plot(best["epoch"], 100 * y, marker="*", markersize=12, linestyle="none", label=f"best: {y:.2%}")
        axes.set(xlabel="epoch", ylabel=what + unit, title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        save_curves(fig, folder / f"{what}.png")


def plot_confusion(counts: Tensor, classes: Sequence[str], path: Path, title: str) -> None:
    """A square for each (true, predicted) pair of classes, int64 [K, K], shaded by its share of the true class."""
    shares = counts.double() / counts.sum(1, keepdim=True).clamp_min(1)
    side = min(12.0, 3 + 0.35 * len(classes))
    fig = figure(side + 1, side)
    axes = fig.subplots()
    picture = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    fig.colorbar(picture, label="share of the true class")
    axes.set(xlabel="predicted", ylabel="true", title=title)
    if len(classes) <= 30:
        axes.set_xticks(range(len(classes)), classes, rotation=90 if max(map(len, classes)) > 2 else 0)
        axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= 20:
        for row, line in enumerate(counts.tolist()):
            for column, n in enumerate(line):
                if n:
                    colour = "white" if shares[row, column] > 0.5 else "black"
                    axes.text(column, row, str(n), ha="center", va="center", color=colour, fontsize=7)
    save(fig, path)
