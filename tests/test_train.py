"""Training: what a recipe's values do, what a run leaves behind, and what is refused before it begins."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import TinyNet, tiny_recipe, write_images
from torch import Tensor, nn

from resnet_fused import checkpoint, evaluate, models, recipe
from resnet_fused import train as training
from resnet_fused.checks import fallback_reason
from resnet_fused.data import DataError, MissingPackageError, mnist_5k
from resnet_fused.data.views import HeldOutView
from resnet_fused.plots import plot_history
from resnet_fused.recipe import Recipe
from resnet_fused.train import DivergenceError, Run, train

for package in ("mlxtend", "rich", "safetensors", "matplotlib", "sklearn"):
    pytest.importorskip(package)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Steps of a millisecond wait for each other's threads on a machine that runs other tests as well."""
    monkeypatch.setitem(models.MODELS, "tiny", TinyNet)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def losses(folder: Path) -> list[float]:
    with open(folder / "iterations.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def weights(folder: Path) -> dict[str, Tensor]:
    return checkpoint.read_state(folder)[1].weights


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference, relative to the tensor's largest value."""
    return max(((a[n] - b[n]).abs().max() / a[n].abs().max().clamp_min(1e-3)).item() for n in a)


def test_the_recipe_beats_the_nearest_neighbours(tmp_path: Path) -> None:
    run = train(dataclasses.replace(recipe.read("mnist"), epochs=10), tmp_path)  # half of it is enough
    digits, held_out = mnist_5k()
    baseline = evaluate.neighbour_accuracy(digits, held_out)
    assert baseline == pytest.approx(0.934)
    assert run.best > baseline
    trained = checkpoint.read(run.checkpoint)
    assert trained.pixels is not None
    model = checkpoint.network(trained, run.checkpoint)
    score = evaluate.score(model, HeldOutView(held_out, trained.pixels, 28))
    assert score is not None
    assert score.top1 == run.best
    assert trained.metadata["model"] == "mnist_resnet"
    assert trained.metadata["epoch"] == str(run.best_epoch)


@pytest.mark.usefixtures("no_pictures")
def test_a_seed_gives_the_same_run(mnist: Path, tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tiny_recipe(mnist, epochs=1, seed=seed), tmp_path / folder)
    a, b, c = (weights(tmp_path / folder) for folder in "abc")
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not torch.equal(a["fc.weight"], c["fc.weight"])


def test_what_a_run_leaves(mnist: Path, tmp_path: Path) -> None:
    run = train(tiny_recipe(mnist), tmp_path)
    names = ["accuracy.png", "best.safetensors", "iterations.csv", "last-14.safetensors", "last.pt", "loss.png"]
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != ".lock") == names
    assert [row["epoch"] for row in run.history] == [1, 2]
    assert len(losses(tmp_path)) == 14
    first = run.history[0]
    assert first["train_loss"] == pytest.approx(sum(losses(tmp_path)[:7]) / 7)
    for picture in ("accuracy.png", "loss.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("no_pictures")
def test_the_best_epoch_is_kept(mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.3, 0.8, 0.5, 0.8])
    monkeypatch.setattr(
        evaluate, "score", lambda *_, **__: evaluate.Score(1.0, next(scores), 1.0, torch.eye(10, dtype=torch.int64))
    )
    run = train(tiny_recipe(mnist, epochs=4), tmp_path)
    assert (run.best, run.best_epoch) == (0.8, 2)
    assert checkpoint.read(tmp_path / "best.safetensors").metadata["epoch"] == "2"
    assert "best accuracy 80.00% after epoch 2 of 4" in str(run)


def test_divergence_names_the_iteration(mnist: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match=r"the loss is (nan|inf) at iteration \d+"):
        train(tiny_recipe(mnist, model="mnist_resnet", lr=1e9), tmp_path)
    assert not (tmp_path / "best.safetensors").exists()
    assert str(Run(Recipe(), tmp_path)) == "no epoch was finished, so there is no best checkpoint"


def test_the_curves_are_pictures(tmp_path: Path) -> None:
    row = {"train_accuracy": 0.5, "test_accuracy": 0.9, "train_loss": 1.0, "test_loss": 1.0}
    rows = [{"epoch": i, **row} for i in (1, 2)]
    plot_history(rows, tmp_path, "x")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "resnet5"}, "unknown model 'resnet5'"),
        ({"model": "resnet18"}, r"resnet18 does not take the images, \[1, 28, 28\] each: "),
        ({"model_args": {"num_classes": 12}}, r"tiny gives \[12\] scores, but the data has 10 classes"),
        ({"batch_size": 60}, "batch_size is 60, but there are 56 training images"),
        ({"size": 20}, "the images are 28x28, larger than the size asked for, 20"),
        ({"mean": (0.1, 0.1), "std": (0.3, 0.3)}, "mean has 2 values, but the images have 1 channels"),
        ({"data_dir": "/nowhere"}, "no folder /nowhere"),
        ({"data_dir": ""}, "mnist needs its folder"),
    ],
)
def test_a_bad_recipe_leaves_no_folder(values: dict, message: str, mnist: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train(tiny_recipe(mnist, **values), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tensorboard_is_missed_only_when_asked_for(
    mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [n for n in sys.modules if n.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingPackageError, match="writing events for TensorBoard needs tensorboard, which is not"):
        train(tiny_recipe(mnist, tensorboard=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_pictures")
def test_events_for_tensorboard(mnist: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(tiny_recipe(mnist, tensorboard=True), tmp_path)
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    found = events.Scalars("train/loss")
    assert [event.step for event in found] == list(range(1, 15))
    assert [event.value for event in found] == pytest.approx(losses(tmp_path), rel=1e-6)
    tests = events.Scalars("test/accuracy")
    assert [event.value for event in tests] == pytest.approx(run.accuracies)
    assert {"train/lr", "train/accuracy", "test/loss", "test/images_per_second"} <= {*events.Tags()["scalars"]}


# ------------------------------------------------------------------------------------------ the values of a recipe


@pytest.mark.usefixtures("no_pictures")
def test_accumulated_gradients_are_the_whole_batchs(mnist: Path, tmp_path: Path) -> None:
    """Without batch norms, in float64, up to the order of sums."""
    base = tiny_recipe(mnist, model="mnist_resnet", lr=0.01, precision="fp64", iterations=5)
    train(base, tmp_path / "whole")
    train(dataclasses.replace(base, accumulate=4), tmp_path / "parts")
    assert apart(weights(tmp_path / "whole"), weights(tmp_path / "parts")) < 1e-10
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-12)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("memory", ["lean", "fast"])
def test_fused_and_eager_training_coincide(memory: str, mnist: Path, tmp_path: Path) -> None:
    """In float64, over whole epochs; and one is fused, the other is not."""
    base = tiny_recipe(mnist, precision="fp64", lr=0.02, pad=2)
    seen = []

    class Watched(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((fallback_reason(x), self.block.memory))
            return super().forward(x)

    models.MODELS["tiny"] = Watched
    train(dataclasses.replace(base, fuse="off"), tmp_path / "eager")
    assert {reason for reason, _ in seen[1:]} == {"fusion is switched off"}  # the first call only tries the shape
    seen.clear()
    train(dataclasses.replace(base, fuse=memory), tmp_path / "fused")
    assert {*seen} == {(None, memory)}
    assert losses(tmp_path / "fused") == pytest.approx(losses(tmp_path / "eager"), rel=1e-9)
    assert losses(tmp_path / "fused") != losses(tmp_path / "eager")
    assert apart(weights(tmp_path / "eager"), weights(tmp_path / "fused")) < 1e-7


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(precision: str, mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs under autocast, near float32; the weights stay float32."""
    dtypes = set()

    class Watched(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            dtypes.add(y.dtype)
            return y

    monkeypatch.setitem(models.MODELS, "tiny", Watched)
    base = tiny_recipe(mnist, epochs=1, lr=0.02)
    train(base, tmp_path / "fp32")
    dtypes.clear()
    train(dataclasses.replace(base, precision=precision), tmp_path / precision)
    assert evaluate.AUTOCAST[precision] in dtypes
    assert losses(tmp_path / precision) == pytest.approx(losses(tmp_path / "fp32"), rel=0.05)
    assert weights(tmp_path / precision)["fc.weight"].dtype == torch.float32
    state, _ = checkpoint.read_state(tmp_path / precision)
    assert bool(state["scaler"]) == (precision == "fp16")


@pytest.mark.usefixtures("no_pictures")
def test_channels_last(mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = set()

    class Watched(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                layouts.add(x.is_contiguous(memory_format=torch.channels_last) and x.shape[1] > 1)
                layouts.add(self.block.conv1.weight.is_contiguous(memory_format=torch.channels_last))
            return super().forward(x)

    monkeypatch.setitem(models.MODELS, "tiny", Watched)
    train(tiny_recipe(mnist, iterations=2, channels=3, model_args={"channels": 3}, channels_last=True), tmp_path)
    assert layouts == {True}


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.slow
def test_compiled(mnist: Path, tmp_path: Path) -> None:
    base = tiny_recipe(mnist, iterations=5, lr=0.02, model_args={"dropout": 0.0})
    train(base, tmp_path / "plain")
    train(dataclasses.replace(base, compile=True), tmp_path / "compiled")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


@pytest.mark.usefixtures("no_pictures")
def test_a_folder_of_images(tmp_path: Path) -> None:
    """Scaled, cropped, mirrored, recoloured, minus a mean image: two colours are soon told apart."""
    folder = write_images(tmp_path / "images", each=8)
    values: dict[str, Any] = {"size": 24, "scale": (28, 36), "flip": True, "colour": 0.1, "normalise": "pixel"}
    own = tiny_recipe(folder, data="images", model_args={"channels": 3, "dropout": 0.0}, epochs=6, **values)
    run = train(own, tmp_path / "run")
    assert run.best == 1
    trained = checkpoint.read(run.checkpoint)
    assert trained.pixels is not None
    assert trained.pixels.mean.shape == (3, 24, 24)
    assert trained.classes == ("c0", "c1")


@pytest.mark.usefixtures("no_pictures")
def test_a_damaged_image_stops_the_run_with_its_name(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", each=8)
    path = folder / "train" / "c1" / "3.png"
    path.write_bytes(path.read_bytes()[:500])
    own = tiny_recipe(folder, data="images", model_args={"channels": 3}, size=24, scale=(28, 36), workers=1)
    with pytest.raises(DataError, match=r"c1/3\.png is damaged"):
        train(own, tmp_path / "run")


# ------------------------------------------------------------------------------------------ several processes


def torchrun(processes: int, *argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parent.parent
    return subprocess.run(
        [*command, "-m", "resnet_fused", "train", *argv], cwd=root, env=environment, capture_output=True, text=True
    )


@pytest.mark.usefixtures("no_pictures")
def test_two_processes_train_as_one(mnist: Path, tmp_path: Path) -> None:
    """Each on half of every batch, in float64: the same losses, weights and scores; one of them writes."""
    values = f"--data mnist --data-dir {mnist} --precision fp64 --iterations 9 --batch-size 8".split()
    done = torchrun(2, "mnist", *values, "--accumulate", "2", "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("best accuracy") == 1
    own = Recipe(data="mnist", data_dir=str(mnist), precision="fp64", iterations=9, batch_size=8)
    run = train(own, tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-12)
    assert apart(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-10
    state, _ = checkpoint.read_state(tmp_path / "two")
    assert [row["test_loss"] for row in state["history"]] == pytest.approx([row["test_loss"] for row in run.history])
    assert [row["test_accuracy"] for row in state["history"]] == run.accuracies
    assert len(state["generators"]) == 2


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.slow
def test_two_processes_share_their_batch_statistics(mnist: Path, tmp_path: Path) -> None:
    """A network with batch norms trains in two processes as in one, too."""
    argv = f"--data mnist --data-dir {mnist} --model resnet18 --channels 3 --precision fp64 --iterations 3".split()
    done = torchrun(2, "mnist", *argv, "--batch-size", "8", "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    own = Recipe(data="mnist", data_dir=str(mnist), model="resnet18", channels=3, precision="fp64")
    train(dataclasses.replace(own, iterations=3, batch_size=8), tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-9)
    assert apart(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-6


def test_a_batch_is_shared_evenly(mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "joined", lambda device: _three(device))
    with pytest.raises(ValueError, match=r"batch_size is 8, expected a multiple of 3 \(accumulate, processes\)"):
        train(tiny_recipe(mnist), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def _three(device: str) -> Any:
    from contextlib import nullcontext

    from resnet_fused.processes import Processes

    return nullcontext(Processes(torch.device(device), 0, 3))


# ------------------------------------------------------------------------------------------ small things


def test_losses_are_those_of_the_network(mnist: Path, tmp_path: Path) -> None:
    """A first iteration by hand: order, normalisation, weights and loss."""
    from resnet_fused.data import load
    from resnet_fused.data.loading import order

    own = tiny_recipe(mnist, iterations=1, model_args={"dropout": 0.0})
    train(own, tmp_path)
    torch.manual_seed(own.seed)
    model = TinyNet(dropout=0.0).train()
    images: Any = load("mnist", mnist)[0]
    rows = order(images.count, own.seed, 0, 1, 0)[:8]
    x = (images.pixels[rows].float() / 255 - 0.1307) / 0.3081
    loss = nn.functional.cross_entropy(model(x), images.labels[rows])
    assert losses(tmp_path) == [pytest.approx(loss.item(), rel=1e-6)]
    assert math.isfinite(loss.item())
