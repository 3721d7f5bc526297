"""Scores: counted against plain loops; crops, scales, checkpoints and the eval command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import TinyNet, tiny_recipe, write_images, write_mnist
from torch import Tensor, nn

from resnet_fused import evaluate, models, plots
from resnet_fused.__main__ import main
from resnet_fused.data import Images, Pixels, load
from resnet_fused.data.views import HeldOutView
from resnet_fused.train import train

for package in ("matplotlib", "rich", "safetensors"):
    pytest.importorskip(package)

PLAIN = Pixels.given([0.0], [1 / 255])


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "tiny", TinyNet)


class Scores(nn.Module):
    """The first pixel is the class that it finds likeliest, the next ones the classes that follow."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        distance = (torch.arange(10) - x[:, 0, 0, :1]) % 10
        return -distance


def guesses(n: int) -> Images:
    """Images whose first pixel is a guess of their class."""
    predicted, true = torch.randint(0, 10, (2, n))
    pixels = torch.zeros(n, 1, 2, 2, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = predicted
    return Images(pixels, true, tuple("0123456789"))


def test_scores_count_what_is_predicted() -> None:
    images = guesses(700)
    model = Scores().train()
    score = evaluate.score(model, HeldOutView(images, PLAIN, 2))
    assert score is not None
    expected = torch.zeros(10, 10, dtype=torch.int64)
    five, loss = 0, 0.0
    for true, pixels in zip(images.labels.tolist(), images.pixels, strict=True):
        logits = model(pixels[None].float())[0]
        expected[true, int(pixels[0, 0, 0])] += 1
        five += true in logits.topk(5).indices.tolist()
        loss += nn.functional.cross_entropy(logits, torch.tensor(true)).item()
    assert torch.equal(score.confusion, expected)
    assert score.top1 == pytest.approx(expected.diagonal().sum().item() / 700)
    assert score.top5 == pytest.approx(five / 700)
    assert score.loss == pytest.approx(loss / 700, rel=1e-6)
    assert (score.images, score.hits) == (700, expected.diagonal().sum())
    assert model.training


def test_views_are_averaged_as_probabilities() -> None:
    """Of any number and size."""
    torch.manual_seed(1)
    model = TinyNet().eval()
    views = [[torch.randn(1, 28, 28), torch.randn(1, 40, 36)], [torch.randn(1, 40, 36)], [torch.randn(1, 28, 28)] * 3]
    with torch.no_grad():
        expected = torch.stack([torch.stack([model(v[None])[0].softmax(0) for v in own]).mean(0) for own in views])
    torch.testing.assert_close(evaluate.log_probabilities(model, views).exp(), expected)


def test_a_test_that_is_stopped_has_no_score() -> None:
    assert evaluate.score(Scores(), HeldOutView(guesses(10), PLAIN, 2), stop=lambda: True) is None


def test_the_confusion_is_a_picture(tmp_path: Path) -> None:
    for k in (2, 10, 60):
        plots.plot_confusion(torch.randint(0, 9, (k, k)), [str(i) for i in range(k)], tmp_path / "c.png", "x")
        assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def run(mnist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "tiny", TinyNet)
        train(tiny_recipe(mnist, model_args={"dropout": 0.0}), folder)
    return folder


def results(folder: Path, crops: str) -> dict[str, Any]:
    assert (folder / f"confusion-{crops}.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / f"eval-{crops}.json").read_text())


def test_eval_writes_its_results(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), "--out", str(tmp_path)]) == 0
    found = results(tmp_path, "centre")
    out = capsys.readouterr().out
    assert f"{sum(row[i] for i, row in enumerate(found['confusion']))} of 20 right, {found['top1']:.2%}" in out
    assert f"among five {found['top5']:.2%}" in out
    best = main(["eval", str(run / "best.safetensors"), "--out", str(tmp_path / "file")])
    assert best == 0
    assert results(tmp_path / "file", "centre")["confusion"] == found["confusion"]
    assert found["top1"] == max(row["test_accuracy"] for row in torch.load(run / "last.pt")["history"])


@pytest.mark.parametrize("crops", ["ten", "multi"])
def test_eval_of_several_views(crops: str, run: Path, mnist: Path, tmp_path: Path) -> None:
    """Against a loop over the images, one forward a view."""
    assert main(["eval", str(run), "--crops", crops, "--views", "23", "--out", str(tmp_path)]) == 0
    found = results(tmp_path, crops)
    from resnet_fused import checkpoint

    trained = checkpoint.read(run / "best.safetensors")
    model = checkpoint.network(trained, run)
    images: Any = load("mnist", mnist)[1]
    scales = (28, 32, 48, 60, 80)  # 224, 256, 384, 480, 640 for an input of 224
    assert found["scales"] == (list(scales) if crops == "multi" else [])
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    for image, label in zip(images.pixels, images.labels, strict=True):
        if crops == "multi":
            sizes = [(s, s) for s in scales]
            views = [nn.functional.interpolate(image[None].float(), s, mode="bilinear", antialias=True) for s in sizes]
        else:
            big = nn.functional.interpolate(image[None].float(), (32, 32), mode="bilinear", antialias=True)
            views = [big[..., y : y + 28, x : x + 28] for y, x in ((2, 2), (0, 0), (0, 4), (4, 0), (4, 4))]
            views += [view.flip(3) for view in views]
        with torch.no_grad():
            scores = sum(model((view / 255 - 0.1307) / 0.3081).softmax(1) for view in views)
        assert isinstance(scores, Tensor)
        confusion[label, scores.argmax()] += 1
    assert found["confusion"] == confusion.tolist()


def test_eval_says_what_is_wrong(run: Path, mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*argv: str) -> str:
        assert main(["eval", *argv]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "no checkpoint at" in fails(str(tmp_path))
    folder = write_images(tmp_path / "images")
    assert "was trained on 10 classes, the data has 2: " in fails(
        str(run), "--data", "images", "--data-dir", str(folder), "--size", "24"
    )
    other = write_mnist(tmp_path / "other")
    (other / "t10k-labels-idx1-ubyte").unlink()
    assert "no t10k-labels" in fails(str(run), "--data-dir", str(other))
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((run / "best.safetensors").read_bytes()[:-9])
    assert "is not a safetensors file" in fails(str(damaged))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "tiny", lambda num_classes, dropout: TinyNet(7))
        assert "does not hold the weights of tiny" in fails(str(run))


def test_a_network_for_one_size_says_so(mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = dataclasses.replace(tiny_recipe(mnist, iterations=1), model="mnist_resnet")
    train(own, tmp_path)
    capsys.readouterr()
    assert main(["eval", str(tmp_path), "--crops", "multi"]) == 1
    assert "expected [N, 1, 28, 28]" in capsys.readouterr().err
