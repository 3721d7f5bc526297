"""A run that was stopped, at whatever moment, and goes on ends bit for bit as one that was not."""

from __future__ import annotations

import csv
import dataclasses
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import TinyNet, tiny_recipe, write_mnist
from torch import Tensor

from resnet_fused import checkpoint, models
from resnet_fused import train as training
from resnet_fused.checkpoint import BEST, STATE, CheckpointError, SaveError, read_state
from resnet_fused.processes import Interrupted
from resnet_fused.recipe import Recipe
from resnet_fused.train import DivergenceError, Trainer, train

for package in ("matplotlib", "rich", "safetensors"):
    pytest.importorskip(package)

pytestmark = pytest.mark.usefixtures("tiny")

# Everything that a state has to bring back: momentum, two schedules, dropout, variation, a mean over half an epoch.
VALUES: dict[str, Any] = {
    "pad": 2,
    "flip": True,
    "normalise": "pixel",
    "schedule": "step",
    "milestones": (5, 9),
    "warmup": 2,
    "warmup_lr": 0.02,
    "weight_decay": 1e-3,
    "checkpoint_every": 3,
}


def contents(value: Any) -> Any:
    """What of a state must not depend on the clock."""
    if isinstance(value, dict):
        return {k: contents(v) for k, v in value.items() if k not in ("seconds", "sha256", "recipe")}
    if isinstance(value, list):
        return [contents(v) for v in value]
    return value.tolist() if isinstance(value, Tensor) else value


def everything(folder: Path) -> dict[str, Any]:
    """State, last weights, best weights and iterations of a run; not its recipe, of which some values may change."""
    state, trained = read_state(folder)
    with open(folder / "iterations.csv", newline="") as file:
        iterations = list(csv.reader(file))
    best = checkpoint.read(folder / BEST)
    return {
        "state": contents(state),
        "weights": contents(trained.weights),
        "best": contents(best.weights),
        "best's metadata": contents(best.metadata),
        "iterations": iterations,
    }


def before_step(monkeypatch: pytest.MonkeyPatch, iteration: int, action: Callable[[], None]) -> None:
    """Has `action` run in the middle of an iteration."""
    step = Trainer._step

    def stepping(self: Trainer, x: Tensor, labels: Tensor) -> Any:
        if self.run_.iteration + 1 == iteration:
            action()
        return step(self, x, labels)

    monkeypatch.setattr(Trainer, "_step", stepping)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def stop_at(iteration: int, recipe: Recipe, folder: Path, resume: bool = False) -> Interrupted:
    """Trains until an interrupt in that iteration; the exception."""
    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, iteration, interrupt)
        with pytest.raises(Interrupted) as caught:
            train(recipe, folder, resume=resume)
    return caught.value


@pytest.fixture(scope="module")
def whole(mnist: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the run that nothing stopped: two epochs of seven iterations."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "tiny", TinyNet)
        patch.setattr(training, "plot_history", lambda *_: None)
        train(tiny_recipe(mnist, **VALUES), folder)
    return everything(folder)


@pytest.mark.parametrize("iteration", [1, 5, 7, 8, 14])
def test_after_an_interrupt(iteration: int, mnist: Path, whole: dict, tmp_path: Path) -> None:
    recipe = tiny_recipe(mnist, **VALUES)
    assert stop_at(iteration, recipe, tmp_path).number == signal.SIGINT
    assert read_state(tmp_path)[0]["iteration"] == iteration
    train(recipe, tmp_path, resume=True)
    assert everything(tmp_path) == whole


@pytest.mark.parametrize("iteration", [5, 9])
def test_after_a_kill(
    iteration: int, mnist: Path, whole: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on the disk in the middle of an iteration is all that a kill leaves."""
    recipe, killed = tiny_recipe(mnist, **VALUES), tmp_path / "killed"
    with monkeypatch.context() as patch:
        before_step(patch, iteration, lambda: shutil.copytree(tmp_path / "run", killed))
        train(recipe, tmp_path / "run")
    assert read_state(killed)[0]["iteration"] in (3, 7)
    train(recipe, killed, resume=True)
    assert everything(killed) == whole


def test_twice_and_with_workers(mnist: Path, whole: dict, tmp_path: Path) -> None:
    """What may change when a run goes on changes nothing of what it computes."""
    recipe = tiny_recipe(mnist, **VALUES)
    for iteration, own in ((4, recipe), (11, dataclasses.replace(recipe, workers=1))):
        stop_at(iteration, own, tmp_path, resume=iteration > 4)
    train(recipe, tmp_path, resume=True)
    assert everything(tmp_path) == whole


@pytest.mark.parametrize(
    "values",
    [{"schedule": "plateau", "patience": 0}, {"precision": "fp16"}, {"precision": "fp64", "fuse": "off"}],
    ids=["plateau", "fp16", "fp64"],
)
def test_other_recipes(values: dict, mnist: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(mnist, **values)
    train(recipe, tmp_path / "whole")
    stop_at(10, recipe, tmp_path / "stopped")
    train(recipe, tmp_path / "stopped", resume=True)
    assert everything(tmp_path / "stopped") == everything(tmp_path / "whole")


def test_a_longer_run(mnist: Path, whole: dict, tmp_path: Path) -> None:
    """A finished run goes on if it is given more epochs; else there is nothing to do."""
    recipe = tiny_recipe(mnist, **VALUES)
    train(dataclasses.replace(recipe, epochs=1), tmp_path)
    train(recipe, tmp_path, resume=True)
    assert everything(tmp_path) == whole
    before = (tmp_path / STATE).read_bytes()
    train(recipe, tmp_path, resume=True)
    assert (tmp_path / STATE).read_bytes() == before


# ------------------------------------------------------------------------------------------ what is refused


def test_another_recipe_is_no_continuation(mnist: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(mnist, epochs=1)
    train(recipe, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for values, message in (
        ({"lr": 0.2}, r"lr is 0\.2, but the run to go on with has 0\.1"),
        ({"seed": 1}, "seed is 1, but"),
        ({"model": "mnist_resnet"}, "model is 'mnist_resnet', but"),
    ):
        with pytest.raises(ValueError, match=message):
            train(dataclasses.replace(recipe, **values), tmp_path, resume=True)
    other = write_mnist(tmp_path / "other", train=40)
    with pytest.raises(CheckpointError, match="7 iterations an epoch, the data makes 5"):
        train(dataclasses.replace(recipe, data_dir=str(other)), tmp_path, resume=True)
    shutil.rmtree(other)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_an_unfinished_run_is_not_overwritten(mnist: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(mnist)
    stop_at(5, recipe, tmp_path)
    with pytest.raises(
        ValueError, match="stopped at iteration 5 of 14: --resume goes on with it, --restart begins again"
    ):
        train(recipe, tmp_path)
    assert read_state(tmp_path)[0]["iteration"] == 5
    train(recipe, tmp_path, restart=True)
    assert read_state(tmp_path)[0]["iteration"] == 14
    train(dataclasses.replace(recipe, epochs=1), tmp_path)  # a finished one is
    assert read_state(tmp_path)[0]["iteration"] == 7


def test_two_processes_do_not_train_in_one_folder(mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(mnist, epochs=1)

    def second() -> None:
        with pytest.raises(ValueError, match="another process is training in"):
            train(recipe, tmp_path)

    before_step(monkeypatch, 3, second)
    train(recipe, tmp_path)


# ------------------------------------------------------------------------------------------ failures on the way


def test_divergence_keeps_the_checkpoints_before_it(
    mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(mnist, **VALUES)
    before_step(monkeypatch, 11, lambda: None)
    step = Trainer._step

    def poisoned(self: Trainer, x: Tensor, labels: Tensor) -> Any:
        return step(self, x * float("nan") if self.run_.iteration + 1 == 11 else x, labels)

    monkeypatch.setattr(Trainer, "_step", poisoned)
    with pytest.raises(DivergenceError, match=r"the loss is nan at iteration 11: try a smaller .*; the checkpoints"):
        train(recipe, tmp_path)
    state, trained = read_state(tmp_path)
    assert state["iteration"] == 9
    assert all(t.isfinite().all() for t in trained.weights.values())
    assert checkpoint.read(tmp_path / BEST).metadata["epoch"] == "1"


def test_weights_that_are_not_finite_are_not_saved(
    mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the iteration that spoils them is still finite."""
    step = Trainer._step

    def spoiling(self: Trainer, x: Tensor, labels: Tensor) -> Any:
        measured = step(self, x, labels)
        if self.run_.iteration + 1 == 6:
            self.model.fc.weight.data[0, 0] = float("inf")  # type: ignore[union-attr,index,operator]
        return measured

    monkeypatch.setattr(Trainer, "_step", spoiling)
    with pytest.raises(DivergenceError, match=r"fc\.weight is not finite after iteration 6"):
        train(tiny_recipe(mnist, **VALUES), tmp_path)
    assert read_state(tmp_path)[0]["iteration"] == 3


def test_a_disk_that_fills_up_loses_nothing(
    mnist: Path, whole: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(mnist, **VALUES)
    write = checkpoint.write

    def full(path: Path, content: bytes) -> None:
        if path.name == "last-9.safetensors":
            raise SaveError(f"cannot save {path}: No space left on device; what was saved before is as it was")
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", full)
        with pytest.raises(SaveError, match="No space left on device"):
            train(recipe, tmp_path)
    assert read_state(tmp_path)[0]["iteration"] == 7
    train(recipe, tmp_path, resume=True)
    assert everything(tmp_path) == whole


def test_a_second_interrupt_does_not_wait(mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the run at once; the last checkpoint is there."""

    def twice() -> None:
        interrupt()
        monkeypatch.setattr("resnet_fused.processes.time.monotonic", lambda: float("inf"))
        interrupt()

    before_step(monkeypatch, 5, twice)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(tiny_recipe(mnist, **VALUES), tmp_path)
    assert not isinstance(caught.value, Interrupted)
    assert read_state(tmp_path)[0]["iteration"] == 3


def test_resumed_recipes_are_checked_before_anything_is_written(mnist: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run to go on with"):
        train(Recipe(), tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


def test_the_global_random_state_is_left_alone(mnist: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    train(tiny_recipe(mnist, epochs=1), tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
