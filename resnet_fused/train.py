"""Training: a recipe in, checkpoints, measurements and curves out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import torch
import torch.nn.functional as F
from torch import Tensor

from . import checkpoint, evaluate
from .console import make_console
from .data.loading import batches, in_batches, order
from .data.views import HeldOutView, TrainingView, stream
from .metrics import Metrics, summary_writer
from .plots import plot_history
from .prepare import augment_of, check_fit, check_same, pixels_of, splits
from .processes import Interrupted, Processes, Signals, joined
from .progress import Bar
from .recipe import Recipe, build, from_values
from .schedule import Schedule

WINDOW = 10  # iterations between two looks at what a GPU, or another process, has measured


class DivergenceError(RuntimeError):
    """The loss or a weight stopped being a finite number."""


@dataclass
class Run:
    """What a training run leaves behind."""

    recipe: Recipe
    folder: Path
    history: list[dict[str, float]] = field(default_factory=list)  # a row for each test: see `Trainer._test`
    seconds: float = 0.0
    iteration: int = 0

    @property
    def checkpoint(self) -> Path:
        return self.folder / checkpoint.BEST

    @property
    def curve(self) -> Path:
        return self.folder / "accuracy.png"

    @property
    def accuracies(self) -> list[float]:
        """On the held-out images, of each test."""
        return [row["test_accuracy"] for row in self.history]

    @property
    def best(self) -> float:
        return max(self.accuracies, default=0.0)

    @property
    def best_epoch(self) -> int:
        """Counted from 1; 0 before the first test."""
        return int(self.history[self.accuracies.index(self.best)]["epoch"]) if self.history else 0

    def __str__(self) -> str:
        if not self.history:
            return "no epoch was finished, so there is no best checkpoint"
        epochs = int(self.history[-1]["epoch"])
        return (
            f"best accuracy {self.best:.2%} after epoch {self.best_epoch} of {epochs} "
            f"({self.seconds:.0f} s); checkpoint {self.checkpoint}, curve {self.curve}"
        )


def train(
    recipe: Recipe,
    folder: Path,
    device: str = "cpu",
    console: Any = None,
    resume: bool = False,
    restart: bool = False,
) -> Run:
    """Trains by `recipe` and leaves checkpoints, iterations.csv and curves in `folder`.

    With `resume` it goes on from the last checkpoint there: on a CPU, bit for bit as if it had not stopped. A seed
    gives the same weights again on the same machine. On Ctrl-C or SIGTERM a checkpoint is written, and Interrupted
    raised.

    Raises ValueError, RecipeError or DataError before anything is written; DivergenceError, naming the iteration, once
    the loss is not finite; SaveError where a file cannot be written; ValueError too where `folder` has an unfinished
    run and neither `resume` nor `restart` (which begins anew) says what to do.
    """
    with joined(device) as processes, torch.random.fork_rng(_cuda(processes.device)):
        console = (console or make_console()) if processes.main else None
        trainer = Trainer(recipe, folder, processes, resume)
        if processes.main and not (resume or restart):
            _leave_unfinished(folder)
        with _alone(folder) if processes.main else nullcontext(), evaluate.fusion(recipe):
            return trainer.run(console)


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def _leave_unfinished(folder: Path) -> None:
    try:
        state, _ = checkpoint.read_state(folder)
    except (FileNotFoundError, checkpoint.CheckpointError):
        return  # nothing to go on with
    if state["iteration"] < state["total"]:
        at = f"iteration {state['iteration']} of {state['total']}"
        raise ValueError(f"{folder} holds a run that stopped at {at}: --resume goes on with it, --restart begins again")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / ".lock", timeout=0):
            yield
    except filelock.Timeout:
        raise ValueError(f"another process is training in {folder}") from None


class Trainer:
    """One run: everything that its checkpoints hold, and the loop."""

    def __init__(self, recipe: Recipe, folder: Path, processes: Processes, resume: bool = False) -> None:
        self.recipe, self.processes, self.signals = recipe, processes, Signals()
        self.device, self.run_ = processes.device, Run(recipe, folder)
        parts = recipe.accumulate * processes.size
        if recipe.batch_size % parts:
            raise ValueError(
                f"batch_size is {recipe.batch_size}, expected a multiple of {parts} (accumulate, processes)"
            )
        if recipe.tensorboard:
            summary_writer()
        state, trained = checkpoint.read_state(folder) if resume else ({}, None)
        if resume:
            check_same(recipe, from_values(state["recipe"], str(folder / checkpoint.STATE)))
        self.train_set, self.test_set = splits(recipe)
        self.classes = self.train_set.classes
        if self.train_set.count < recipe.batch_size:
            raise ValueError(f"batch_size is {recipe.batch_size}, but there are {self.train_set.count} training images")
        self.epoch_length = self.train_set.count // recipe.batch_size
        self.total = recipe.iterations or recipe.epochs * self.epoch_length
        self.pixels = trained.pixels if trained and trained.pixels else pixels_of(recipe, self.train_set)

        torch.manual_seed(recipe.seed)
        self.model = build(recipe, len(self.classes)).to(self.device)
        check_fit(self.model, recipe, HeldOutView(self.test_set, self.pixels, recipe.size), len(self.classes))
        if recipe.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        if processes.rank:  # each with its own draws, but the first as if it were alone
            torch.manual_seed(stream(recipe.seed, processes.rank).initial_seed())
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay
        )
        self.schedule = Schedule(self.optimizer, recipe)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "fp16")
        self.sums = {"loss": 0.0, "accuracy": 0.0, "seconds": 0.0}  # over the epoch's iterations so far
        if trained:
            self._restore(state, trained)
        self.replica = processes.wrap(self.model, recipe.sync_bn)
        self.forward = torch.compile(self.replica) if recipe.compile else self.replica
        self._measured: list[tuple[Tensor, float]] = []  # ([loss, hits], rate) of iterations not looked at yet
        self._session = time.perf_counter() - self.run_.seconds

    # ---------------------------------------------------------------- the loop

    def run(self, console: Any = None) -> Run:
        """To the end of the recipe; see `train` for what it raises."""
        run, recipe = self.run_, self.recipe
        images = self.total * recipe.batch_size
        self.metrics = Metrics(run.folder, run.iteration, recipe.tensorboard) if self.processes.main else None
        try:
            done = run.iteration * recipe.batch_size
            with self.signals, Bar(console, images, done, len(self.classes)) as self.bar:
                while True:
                    if self._test_is_due():
                        self._test()
                    if run.iteration >= self.total:
                        break
                    self._train_epoch()
        except Interrupted:
            if console:
                console.print(f"interrupted: {run}; --resume goes on at iteration {run.iteration + 1}", soft_wrap=True)
            raise
        finally:
            if self.metrics:
                self.metrics.close()
                if run.history:
                    plot_history(run.history, run.folder, recipe.model)
        return run

    def _train_epoch(self) -> None:
        """From where the run is to the end of the epoch, or of the run."""
        run, recipe = self.run_, self.recipe
        epoch, begun = divmod(run.iteration, self.epoch_length)
        if not begun:
            self.sums = dict.fromkeys(self.sums, 0.0)
        view = TrainingView(self.train_set, self.pixels, augment_of(recipe), recipe.seed, epoch)
        rows = order(self.train_set.count, recipe.seed, epoch, self.processes.size, self.processes.rank)
        steps = in_batches(rows, recipe.batch_size // self.processes.size, whole=True)
        steps = steps[begun : begun + self.total - run.iteration]
        self.model.train()
        pin = self.device.type == "cuda"
        self._looked_at = time.perf_counter()
        for x, labels in batches(view, steps, recipe.workers, pin):
            self._measured.append(self._step(x, labels))
            run.iteration += 1
            at_checkpoint = recipe.checkpoint_every and run.iteration % recipe.checkpoint_every == 0
            last = run.iteration % self.epoch_length == 0 or run.iteration == self.total
            alone = self.processes.size == 1 and self.device.type == "cpu"
            if alone or at_checkpoint or last or run.iteration % WINDOW == 0:
                self._look()
                if self._stopped():
                    self._end()
                if at_checkpoint and not last:
                    self._save()

    def _step(self, x: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        """One iteration, on this process's share of the batch: ([loss, hits] of it, float64; the learning rate)."""
        layout = torch.channels_last if self.recipe.channels_last else torch.contiguous_format
        dtype = torch.float64 if self.recipe.precision == "fp64" else torch.float32
        x = x.to(self.device, dtype, non_blocking=True).contiguous(memory_format=layout)
        labels = labels.to(self.device, non_blocking=True)
        parts = self.recipe.accumulate
        measured = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for i, (images, own) in enumerate(zip(x.chunk(parts), labels.chunk(parts), strict=True)):
            last = i == parts - 1
            with nullcontext() if last else self.processes.without_averaging(self.replica):
                with evaluate.numerics(self.recipe, self.device):
                    logits = self.forward(images)
                loss = F.cross_entropy(logits if dtype == torch.float64 else logits.float(), own)
                self.scaler.scale(loss / parts).backward()
            measured[0] += loss.detach() / parts
            measured[1] += (logits.argmax(1) == own).sum()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        rate = self.optimizer.param_groups[0]["lr"]
        self.schedule.step()
        return measured, rate

    def _look(self) -> None:
        """At the iterations since the last time. Raises DivergenceError."""
        run, recipe = self.run_, self.recipe
        measured, rates = zip(*self._measured, strict=True)
        found = self.processes.sum(torch.stack(measured)).tolist()
        self._measured = []
        first = run.iteration - len(rates) + 1
        for iteration, ((loss, hits), rate) in enumerate(zip(found, rates, strict=True), first):
            loss, accuracy = loss / self.processes.size, hits / recipe.batch_size
            if not math.isfinite(loss):
                raise DivergenceError(self._diverged(f"the loss is {loss} at iteration {iteration}"))
            self.sums["loss"] += loss
            self.sums["accuracy"] += accuracy
            epoch = (iteration - 1) // self.epoch_length + 1
            if self.metrics:
                row = {"iteration": iteration, "epoch": epoch, "loss": loss, "accuracy": accuracy, "lr": rate}
                self.metrics.add(row)
            self.bar.advance(epoch, loss, accuracy, recipe.batch_size)
        now = time.perf_counter()
        self.sums["seconds"] += now - self._looked_at
        self._looked_at = now

    def _diverged(self, what: str) -> str:
        last = self.run_.folder / checkpoint.STATE
        kept = f"; the checkpoints before it are kept in {last.parent}" if last.exists() else ""
        return f"{what}: try a smaller learning rate{kept}"

    # ---------------------------------------------------------------- tests

    def _test_is_due(self) -> bool:
        run = self.run_
        ends = run.iteration % self.epoch_length == 0 or run.iteration == self.total
        tested = run.history[-1]["iteration"] if run.history else 0
        return run.iteration > 0 and ends and tested < run.iteration

    def _test(self) -> None:
        """Of the held-out images; then the best and the last checkpoint."""
        run, recipe = self.run_, self.recipe
        view = HeldOutView(self.test_set, self.pixels, recipe.size)
        score = evaluate.score(
            self.model,
            view,
            workers=recipe.workers,
            processes=self.processes,
            context=lambda: evaluate.numerics(recipe, self.device),
            stop=lambda: bool(self.signals.received),
        )
        if score is None:
            self._end()
        assert score is not None
        steps = (run.iteration - 1) % self.epoch_length + 1
        row: dict[str, float] = {
            "iteration": run.iteration,
            "epoch": (run.iteration - 1) // self.epoch_length + 1,
            "train_loss": self.sums["loss"] / steps,
            "train_accuracy": self.sums["accuracy"] / steps,
            "test_loss": score.loss,
            "test_accuracy": score.top1,
            "test_top5": score.top5,
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": time.perf_counter() - self._session,
        }
        better = score.top1 > run.best or not run.history
        run.history.append(row)
        self.schedule.tested(score.top1)
        rate = steps * recipe.batch_size / self.sums["seconds"] if self.sums["seconds"] else 0.0
        if self.metrics:
            self.metrics.tested({**row, "images_per_second": rate})
        self._save(better)
        epochs = math.ceil(self.total / self.epoch_length)
        figures = f"loss {row['train_loss']:.3f}  held-out {score.top1:.2%}  {rate:.0f} images/s"
        self.bar.print(f"epoch {row['epoch']:2}/{epochs}  {figures}")

    # ---------------------------------------------------------------- checkpoints

    def _stopped(self) -> bool:
        """Whether a signal has come, to any of the processes."""
        received = torch.tensor([self.signals.received], device=self.device)
        return bool(self.processes.sum(received).item())

    def _end(self) -> None:
        self._save()
        raise Interrupted(self.signals.received or 2)

    def _save(self, best: bool = False) -> None:
        """Raises DivergenceError, and writes nothing, if a weight is not finite; SaveError."""
        run = self.run_
        run.seconds = time.perf_counter() - self._session
        generators = self.processes.gather(torch.get_rng_state())
        on_cuda = self.processes.gather(torch.cuda.get_rng_state(self.device)) if self.device.type == "cuda" else []
        for name, tensor in self.model.state_dict().items():
            if not tensor.isfinite().all():
                raise DivergenceError(self._diverged(f"{name} is not finite after iteration {run.iteration}"))
        if not self.metrics:
            return
        self.metrics.flush()
        metadata = {
            "model": self.recipe.model,
            "recipe": json.dumps(self.recipe.as_dict()),
            "classes": json.dumps(self.classes),
            "iteration": run.iteration,
        }
        if run.history:
            metadata |= {"epoch": int(run.history[-1]["epoch"]), "accuracy": run.history[-1]["test_accuracy"]}
        weights = checkpoint.pack(self.model, metadata, self.pixels)
        if best:
            checkpoint.write(run.checkpoint, weights)
        state = {
            "recipe": self.recipe.as_dict(),
            "total": self.total,
            "epoch_length": self.epoch_length,
            "history": run.history,
            "seconds": run.seconds,
            "sums": self.sums,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "generators": generators,
            "generators_cuda": on_cuda,
        }
        checkpoint.save_state(run.folder, run.iteration, weights, state)

    def _restore(self, state: dict[str, Any], trained: checkpoint.Trained) -> None:
        """The inverse of `_save`. Raises CheckpointError."""
        path = self.run_.folder / state["weights"]
        if trained.classes != self.classes:
            raise checkpoint.CheckpointError(
                f"{path} is of {len(trained.classes)} classes, the data has {len(self.classes)}, or others"
            )
        if state["epoch_length"] != self.epoch_length:
            raise checkpoint.CheckpointError(
                f"{path} is of {state['epoch_length']} iterations an epoch, the data makes {self.epoch_length}"
            )
        checkpoint.restore(self.model, trained, path)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.scaler.load_state_dict(state["scaler"])
            if self.processes.rank < len(state["generators"]):
                torch.set_rng_state(state["generators"][self.processes.rank])
            if self.device.type == "cuda" and self.processes.rank < len(state["generators_cuda"]):
                torch.cuda.set_rng_state(state["generators_cuda"][self.processes.rank], self.device)
            self.sums = state["sums"]
            self.run_.history, self.run_.seconds = state["history"], state["seconds"]
            self.run_.iteration = state["iteration"]
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise checkpoint.CheckpointError(f"{path.with_name(checkpoint.STATE)} does not fit: {error}") from error
