"""Training: a recipe in, a best checkpoint and an accuracy curve out."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from . import models
from .console import make_console
from .data import Digits, mnist_5k, require
from .evaluate import accuracy, save_checkpoint

SEEDS = range(-(2**63), 2**64)  # what torch takes


@dataclass(frozen=True)
class Recipe:
    """What is trained and how; the defaults are the MNIST recipe."""

    model: str = "mnist_resnet"
    epochs: int = 20
    batch_size: int = 30
    lr: float = 0.005
    momentum: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.seed not in SEEDS:
            raise ValueError(f"seed is {self.seed}, expected -2**63 to 2**64 - 1")


RECIPES = {"mnist": Recipe()}


class DivergenceError(RuntimeError):
    """The loss stopped being a finite number."""


@dataclass
class Run:
    """What a training run leaves behind."""

    recipe: Recipe
    folder: Path
    accuracies: list[float] = field(default_factory=list)  # on the held-out images, after each epoch
    seconds: float = 0.0

    @property
    def checkpoint(self) -> Path:
        return self.folder / "best.safetensors"

    @property
    def curve(self) -> Path:
        return self.folder / "accuracy.png"

    @property
    def best(self) -> float:
        return max(self.accuracies, default=0.0)

    @property
    def best_epoch(self) -> int:
        """Counted from 1; 0 before the first epoch is over."""
        return self.accuracies.index(self.best) + 1 if self.accuracies else 0

    def __str__(self) -> str:
        if not self.accuracies:
            return "no epoch was finished, so there is no checkpoint"
        return (
            f"best accuracy {self.best:.2%} after epoch {self.best_epoch} of {len(self.accuracies)} "
            f"({self.seconds:.0f} s); checkpoint {self.checkpoint}, curve {self.curve}"
        )


def train(recipe: Recipe, folder: Path, device: str = "cpu", console=None) -> Run:
    """Trains on the packaged MNIST digits and keeps the best weights in `folder`.

    A seed gives the same weights again on the same machine. On Ctrl-C the best checkpoint and the
    curve so far stay. Raises DivergenceError, naming the iteration, once the loss is not finite.
    """
    console = console or make_console()
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = models.create(recipe.model).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=recipe.momentum)
    shuffle = torch.Generator().manual_seed(recipe.seed)
    train_set, test_set = mnist_5k()
    # After everything that a bad argument fails, and before the first epoch.
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(recipe, folder)
    start = time.perf_counter()
    try:
        with _Bar(console, recipe, len(train_set.labels)) as bar:
            for epoch in range(1, recipe.epochs + 1):
                _train_epoch(model, optimizer, train_set.batches(recipe.batch_size, shuffle), bar)
                run.accuracies.append(accuracy(model, test_set))
                run.seconds = time.perf_counter() - start
                bar.end_epoch(epoch, run.accuracies[-1])
                if run.best_epoch == epoch:
                    metadata = {"model": recipe.model, "epoch": epoch, "accuracy": run.best}
                    save_checkpoint(model, run.checkpoint, metadata)
    except KeyboardInterrupt:
        console.print(f"interrupted: {run}", soft_wrap=True)
        raise
    finally:
        if run.accuracies:
            plot_curve(run)
    return run


def _train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, batches, bar: _Bar) -> None:
    device = next(model.parameters()).device
    model.train()
    for batch in batches:
        logits = model(batch.images.to(device))
        labels = batch.labels.to(device)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        bar.step(loss.item(), batch, (logits.argmax(1) == labels).sum().item())


class _Bar:
    """The progress bar: loss and training accuracy (running means), images/s, time left."""

    def __init__(self, console, recipe: Recipe, images: int) -> None:
        progress = require("rich.progress", "training")
        self._progress = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TextColumn("loss {task.fields[loss]:.3f}  accuracy {task.fields[hits]:.1%}"),
            progress.TextColumn("{task.fields[rate]:.0f} images/s"),
            progress.TimeRemainingColumn(),
            console=console,
        )
        self._epochs, self._iteration = recipe.epochs, 0
        self._task = self._progress.add_task(
            "epoch 1", total=recipe.epochs * images, loss=math.log(10), hits=0.1, rate=0.0
        )

    def __enter__(self) -> _Bar:
        self._progress.start()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()

    def step(self, loss: float, batch: Digits, hits: int) -> None:
        self._iteration += 1
        if not math.isfinite(loss):
            raise DivergenceError(f"the loss is {loss} at iteration {self._iteration}: try a smaller learning rate")
        n = len(batch.labels)
        task = self._progress.tasks[0]
        decay = 0.95  # a window of about 20 iterations
        self._progress.update(
            self._task,
            advance=n,
            loss=decay * task.fields["loss"] + (1 - decay) * loss,
            hits=decay * task.fields["hits"] + (1 - decay) * hits / n,
            rate=(task.completed + n) / (time.perf_counter() - self._start),
        )

    def end_epoch(self, epoch: int, held_out: float) -> None:
        task = self._progress.tasks[0]
        self._progress.console.print(
            f"epoch {epoch:2}/{self._epochs}  loss {task.fields['loss']:.3f}  held-out {held_out:.2%}"
        )
        self._progress.update(self._task, description=f"epoch {min(epoch + 1, self._epochs)}")


def plot_curve(run: Run) -> None:
    """Draws the held-out accuracy of each epoch into `run.curve`."""
    figure = require("matplotlib.figure", "the accuracy curve").Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    epochs = range(1, len(run.accuracies) + 1)
    axes.plot(epochs, [100 * a for a in run.accuracies], marker="o", markersize=3)
    axes.plot(run.best_epoch, 100 * run.best, marker="*", markersize=12, label=f"best: {run.best:.2%}")
    axes.set(xlabel="epoch", ylabel="held-out accuracy, %", title=run.recipe.model)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(run.curve, dpi=120)
