"""The command line: what it prints, its exit codes, and one-line errors."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import write_mnist

from resnet_fused import __version__, apps, checkpoint, demo, measure, models
from resnet_fused.__main__ import main
from resnet_fused.console import make_console
from resnet_fused.data import photos
from resnet_fused.recipe import Recipe
from resnet_fused.train import Run

for package in ("mlxtend", "rich", "safetensors", "skimage", "sklearn"):
    pytest.importorskip(package)
torchvision_models = pytest.importorskip("torchvision.models")


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Steps of a millisecond wait for each other's threads on a machine that runs other tests as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network's."""
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    torch.manual_seed(0)
    checkpoint.save(models.mnist_resnet(), path, {"model": "mnist_resnet", "epoch": 0})
    return path


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert lines["resnet_fused"] == __version__
    assert lines["torch"].startswith(torch.__version__)
    assert re.fullmatch(r"(CUDA and CPU|CPU-only) build", lines["extension"])
    assert f"{torch.get_num_threads()} threads" in lines["cpu"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"resnet_fused {__version__}\n"


@pytest.mark.parametrize("flags", [[], ["--training"], ["--dtype", "bfloat16"]])
def test_explain(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--model", "resnet18", "--batch", "2", "--size", "64", *flags]) == 0
    out = capsys.readouterr().out
    assert "layer4.1" in out
    assert "total" in out
    assert "2x512x2x2" in out


def test_train_then_eval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--data", "mnist", "--data-dir", str(write_mnist(tmp_path / "mnist"))]
    assert main(["train", "mnist", "--epochs", "1", "--seed", "5", *small, "--out", str(tmp_path)]) == 0
    best = re.search(r"best accuracy ([\d.]+)%", capsys.readouterr().out)
    assert main(["eval", str(tmp_path / "best.safetensors")]) == 0
    out = capsys.readouterr().out
    assert best
    assert f"of 20 right, {best[1]}%" in out
    assert "predicted (column)" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["eval", "nowhere.safetensors"], "no checkpoint at nowhere.safetensors"),
        (["eval", __file__], "is not a safetensors file"),
        (["train", "--lr", "1e9"], "the loss is nan at iteration"),
        (["train", "--device", "cuda:99"], "--device cuda:99"),
        (["train", "--device", "nonsense"], "--device nonsense"),
        (["train", "--epochs", "1", "--out", __file__], "exists"),
        (["train", "nothing.toml"], "no recipe nothing.toml: one of cifar10, "),
        (["train", "--data", "cifar10"], "cifar10 needs its folder: --data-dir"),
        (["train", "--data", "mnist", "--data-dir", "nowhere"], "no folder nowhere"),
        (["train", "--data-dir", "nowhere"], "data is 'digits'"),
        (["train", "--model", "resnet18"], "resnet18 does not take the images"),
        (["train", "--batch-size", "31", "--accumulate", "2"], "batch_size is 31, which accumulate, 2, does not"),
        (["train", "--resume", "--out", "nowhere"], "no run to go on with in nowhere"),
        (["analyse", "responses", "nowhere.safetensors"], "no checkpoint at nowhere.safetensors"),
    ],
)
def test_failures_are_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"resnet_fused {argv[0]}: error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["train", "--epochs", "0"], "argument --epochs: epochs is 0, expected at least 1"),
        (["train", "--lr", "nan"], "lr is nan, expected a finite number"),
        (["train", "--momentum", "1"], "momentum is 1.0, expected less than 1"),
        (["train", "--lr", "fast"], "argument --lr: 'fast' is not a number"),
        (["train", "--seed", str(2**64)], "seed is 18446744073709551616, expected -2**63 to 2**64 - 1"),
        (["train", "--seed", "x"], "argument --seed: 'x' is not a whole number"),
        (["train", "--schedule", "cosine"], "schedule is 'cosine', expected one of constant, step, plateau"),
        (["train", "--milestones", "5", "x"], "argument --milestones: 'x' is not a whole number"),
        (["train", "--model", "vgg"], "invalid choice: 'vgg'"),
        (["train", "--model-args", "depth"], "'depth' is not NAME=VALUE"),
        (["train", "--resume", "--restart"], "not allowed with argument --resume"),
        (["analyse"], "WHAT"),
        (["analyse", "table", "--models", "vgg"], "invalid choice: 'vgg'"),
        (["explain", "--model", "vgg"], "invalid choice: 'vgg'"),
        (["eval"], "checkpoint"),
    ],
)
def test_wrong_usage_is_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Recipe)])
def test_every_value_of_a_recipe_is_a_flag(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And what it says reaches the training, as do a file's values that it leaves alone."""
    values: dict[str, tuple[list[str], Any]] = {
        "model": (["resnet18"], "resnet18"),
        "model_args": (["num_classes=7", "name=x"], {"num_classes": 7, "name": "x"}),
        "data": (["cifar10"], "cifar10"),
        "data_dir": (["here"], "here"),
        "normalise": (["pixel"], "pixel"),
        "mean": (["0.25"], (0.25,)),
        "std": (["0.25"], (0.25,)),
        "scale": (["300", "400"], (300, 400)),
        "milestones": (["3", "4"], (3, 4)),
        "schedule": (["plateau"], "plateau"),
        "fuse": (["off"], "off"),
        "precision": (["bf16"], "bf16"),
        **{flag: ([], True) for flag in ("flip", "channels_last", "compile", "tensorboard")},
        **{number: (["0.125"], 0.125) for number in ("lr", "momentum", "gamma", "weight_decay", "warmup_lr", "colour")},
    }
    given, expected = values.get(name, (["3"], 3))
    if name == "sync_bn":
        given, expected = [], False
    flag = "--" + ("no-" if name == "sync_bn" else "") + name.replace("_", "-")
    file = tmp_path / "own.toml"
    file.write_text('data = "mnist"\nmodel_args = {}\npatience = 9\n')
    seen = []

    def remember(own: Recipe, *_: Any) -> Run:
        seen.append(own)
        return Run(own, tmp_path)

    monkeypatch.setattr(apps, "train", remember)
    assert main(["train", str(file), flag, *given]) == 0
    assert getattr(seen[0], name) == expected
    assert seen[0].patience == (3 if name == "patience" else 9)


def test_ctrl_c_exits_130_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    small = ["--data", "mnist", "--data-dir", str(write_mnist(tmp_path / "mnist")), "--batch-size", "8"]
    command = [sys.executable, "-m", "resnet_fused", "train", "--epochs", "100000", *small, "--out", str(tmp_path)]
    root = Path(__file__).parent.parent
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root, env=ONE_THREAD,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
    )  # fmt: skip
    best = tmp_path / "best.safetensors"
    deadline = time.monotonic() + 120
    while not best.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "interrupted: best accuracy" in out
    assert "Traceback" not in error
    assert checkpoint.load(best)[1]["model"] == "mnist_resnet"
    state, _ = checkpoint.read_state(tmp_path)
    assert f"--resume goes on at iteration {state['iteration'] + 1}" in out
    assert (tmp_path / "accuracy.png").exists()


def test_eval_of_an_untrained_network(untrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(untrained)]) == 0
    assert "mnist_resnet, epoch 0: " in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ the demo


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything the demo does, with a small network, few rounds and one epoch.

    In float64: over so few activations, whether a ReLU flips by rounding would be a matter of chance.
    """

    def photo_model() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        return torchvision_models.resnet18().double(), photos(4, 96).double(), torch.arange(4)

    monkeypatch.setattr(demo, "_photo_model", photo_model)
    monkeypatch.setattr(demo, "ROUNDS", 1)
    monkeypatch.setattr(measure, "peak_memory", lambda *_: measure.PeakMemory(2, 1))
    short = dataclasses.replace(demo.read_recipe("mnist"), epochs=1)
    monkeypatch.setattr(demo, "read_recipe", lambda _: short)


@pytest.mark.usefixtures("small_demo")
@pytest.mark.parametrize(("baseline", "code"), [(0.2, 0), (1.0, 1)])
def test_demo(
    baseline: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "neighbour_accuracy", lambda *_: baseline)
    if code:  # the failing part is the last one
        monkeypatch.setattr(demo, "show_agreement", lambda *_: iter(()))
        monkeypatch.setattr(demo, "show_plans_and_speed", lambda *_: iter(()))
    assert main(["demo", "--out", str(tmp_path)]) == code
    summary = capsys.readouterr().out.split("Summary")[1]
    assert summary.count("FAILED") == code
    assert "held-out accuracy" in summary
    assert (tmp_path / "best.safetensors").exists()
    if not code:
        assert "gradients, training mode" in summary
        assert "inference" in summary


def test_demo_reports_a_disagreement(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused model with another running momentum must not pass."""
    fuse = demo.fuse_

    def fuse_wrongly(model: torch.nn.Module, memory: str = "lean"):
        report = fuse(model, memory)
        model.layer1[0].bn1.momentum = 0.5
        return report

    monkeypatch.setattr(demo, "fuse_", fuse_wrongly)
    model = torchvision_models.resnet18()
    x = torch.randn(4, 3, 64, 64)
    checks = list(demo.show_agreement(model, x, torch.arange(4), make_console()))
    failed = {check.what for check in checks if not check.passed}
    # On four small images in float32 chance may add "gradients, training mode".
    assert failed >= {"running statistics, training mode", "the same in float64, 4 photographs"}
    assert failed <= {check.what for check in checks if "inference" not in check.what}
