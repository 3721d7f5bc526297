"""Responses, degradation, coincidence and complexity, against plain PyTorch and published figures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tiny_runs import TinyNet, tiny_recipe
from torch import Tensor, nn

from resnet_fused import complexity, models
from resnet_fused.__main__ import main
from resnet_fused.analysis import Curve, coincidence, responses
from resnet_fused.train import train

for package in ("matplotlib", "rich", "safetensors"):
    pytest.importorskip(package)

pytestmark = pytest.mark.usefixtures("tiny")


class PlainNet(TinyNet):
    """TinyNet without its shortcut."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes, dropout=0.0)
        self.block.shortcut = lambda x: None  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "plain", PlainNet)


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------ responses


def test_responses_are_the_norms_outputs() -> None:
    """Of the convolutions' outputs normalised by hand, over all batches, whatever runs fused."""
    model = models.resnet18(num_classes=10).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    x = torch.randn(6, 3, 48, 48)
    found = responses(model, [*x.split(4)])
    names = ["bn1", *(f"layer{s}.{b}.bn{i}" for s in range(1, 5) for b in range(2) for i in (1, 2))]
    assert list(found) == names

    def response(bn: nn.BatchNorm2d, u: Tensor) -> Tensor:
        assert bn.running_mean is not None
        assert bn.running_var is not None
        scale = bn.weight / (bn.running_var + bn.eps).sqrt()
        return (u - bn.running_mean[:, None, None]) * scale[:, None, None] + bn.bias[:, None, None]

    with torch.no_grad():
        stem = response(model.bn1, model.conv1(x))
        assert found["bn1"] == pytest.approx(stem.std(correction=0).item(), rel=1e-4)
        y = model.maxpool(stem.relu())
        block = model.layer1[0]
        first = response(block.bn1, block.conv1(y))
        assert found["layer1.0.bn1"] == pytest.approx(first.std(correction=0).item(), rel=1e-4)
        second = response(block.bn2, block.conv2(first.relu()))
        assert found["layer1.0.bn2"] == pytest.approx(second.std(correction=0).item(), rel=1e-4)
    assert not any(module._forward_hooks for module in model.modules())
    assert not model.training


def test_a_network_without_norms_has_no_responses() -> None:
    with pytest.raises(ValueError, match="MNISTResNet has no batch norms"):
        responses(models.mnist_resnet(), [])


def test_the_responses_command(mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("tiny", "plain"):
        train(tiny_recipe(mnist, model=name, epochs=1), tmp_path / name)
    folders = [str(tmp_path / name) for name in ("tiny", "plain", "plain")]
    assert main(["analyse", "responses", *folders, "--out", str(tmp_path)]) == 0
    assert is_png(tmp_path / "responses.png")
    found = json.loads((tmp_path / "responses.json").read_text())
    assert list(found) == ["tiny", "plain", "plain (2)"]
    assert list(found["tiny"]) == ["stem.bn", "block.bn1", "block.bn2"]
    assert found["plain"] == found["plain (2)"]
    assert "responses.png" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ degradation


def test_the_degradation_command(mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trains each once; asked again, it draws what is there."""
    argv = ["analyse", "degradation", "--models", "plain", "tiny", "--out", str(tmp_path), "--data", "mnist"]
    argv += ["--data-dir", str(mnist), "--channels", "1", "--iterations", "9", "--batch-size", "8"]
    assert main(argv) == 0
    assert is_png(tmp_path / "degradation.png")
    assert len(Curve.of("plain", tmp_path / "plain").iterations) == 9
    states = [(tmp_path / name / "last.pt").read_bytes() for name in ("plain", "tiny")]
    assert "held-out error" in capsys.readouterr().out
    assert main(argv) == 0
    assert [(tmp_path / name / "last.pt").read_bytes() for name in ("plain", "tiny")] == states
    assert main([*argv, "--lr", "0.01"]) == 1
    assert "lr is 0.01, but the run to go on with has 0.1" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ coincidence


def curve(losses: list[float], accuracies: list[float]) -> Curve:
    rows = [{"iteration": i, "loss": loss} for i, loss in enumerate(losses, 1)]
    history = [{"iteration": 2.0 * i, "test_accuracy": a} for i, a in enumerate(accuracies, 1)]
    return Curve("x", rows, history, 1.0)


def test_how_far_curves_lie_apart() -> None:
    first, second = curve([4, 2, 2, 2], [0.5, 0.7]), curve([4, 2, 4, 4, 9], [0.4, 0.7, 0.9])
    assert first.smoothed("loss", 2) == ([2, 3, 4], [3, 2, 2])
    assert first.smoothed("loss", 50) == ([4], [2.5])
    found = coincidence(first, second, 2)
    assert (found.loss, found.accuracy, found.iterations) == (2, pytest.approx(0.1), 4)
    with pytest.raises(ValueError, match="have no iterations in common"):
        coincidence(first, curve([1], []), 2)


def test_the_coincide_command(mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_recipe(mnist, epochs=1, precision="fp64")
    for name, values in (("eager", {"fuse": "off"}), ("fused", {}), ("other", {"lr": 0.001, "seed": 1})):
        train(dataclasses.replace(base, **values), tmp_path / name)
    folders = {name: str(tmp_path / name) for name in ("eager", "fused", "other")}
    argv = ["analyse", "coincide", "--out", str(tmp_path), "--window", "3", "--tolerance", "1e-6", folders["eager"]]
    assert main([*argv, folders["fused"]]) == 0
    assert is_png(tmp_path / "coincide.png")
    capsys.readouterr()
    assert main([*argv, folders["fused"], folders["other"]]) == 1
    assert "apart, more than 1e-06" in capsys.readouterr().err
    assert main(argv) == 1
    assert "one run, expected at least two" in capsys.readouterr().err
    assert main([*argv, str(tmp_path / "nowhere")]) == 1
    assert "no run to go on with in" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ complexity


def test_figures_that_were_published() -> None:
    """Multiply-adds: He et al. 2015, table 1 (their bottlenecks stride elsewhere) and section 3.3 for VGG-19;
    parameters: torchvision's documentation."""
    rows = {row.name: row for row in complexity.table(["resnet18", "resnet34", "resnet50", "mnist_resnet"])}
    expected = {"vgg19": (143_667_240, 19.6), "resnet18": (11_689_512, 1.8), "resnet34": (21_797_672, 3.6)}
    for name, (parameters, giga) in expected.items():
        assert rows[name].parameters == parameters
        assert rows[name].multiply_adds / 1e9 == pytest.approx(giga, abs=0.07)
    assert rows["resnet50"].parameters == 25_557_032
    assert rows["mnist_resnet"].parameters == 210_882


def test_multiply_adds_by_hand() -> None:
    """A bias costs none; the block's two convolutions, the stem's and the linear layer's do."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = TinyNet()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    row = complexity.complexity("tiny", Net)
    assert row.shape == (1, 28, 28)
    assert row.multiply_adds == 7 * 7 * (9 * 4 + 2 * 9 * 4 * 4) + 4 * 10
    assert row.parameters == sum(p.numel() for p in Net().parameters())


@pytest.mark.parametrize(
    ("conv", "shape"),
    [((1, 8, 3), (1, 28, 28)), ((3, 8, 3), (3, 32, 32)), ((3, 64, 7), (3, 224, 224))],
)
def test_the_images_that_a_network_is_for(conv: tuple[int, int, int], shape: tuple[int, int, int]) -> None:
    assert models.image_shape(nn.Sequential(nn.Conv2d(*conv))) == shape


def test_the_table_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyse", "table", "--models", "resnet18", "tiny"]) == 0
    out = capsys.readouterr().out
    assert "1,814.1" in out
    assert "19,632.1" in out
