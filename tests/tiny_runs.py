"""Small networks and small data for the tests of training and testing."""

from __future__ import annotations

import dataclasses
import gzip
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused import BasicBlock, models, train
from resnet_fused.blocks import ConvBNAct
from resnet_fused.recipe import Recipe


class TinyNet(nn.Module):
    """A stem, a fused block and a dropout, for [N, channels, H, W] images of few pixels."""

    def __init__(self, num_classes: int = 10, dropout: float = 0.25, channels: int = 1) -> None:
        super().__init__()
        self.stem = ConvBNAct(channels, 4, 3, stride=4, padding=1)
        self.block = BasicBlock(4, 4)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        return self.fc(self.dropout(F.adaptive_avg_pool2d(x, 1).flatten(1)))


def idx_bytes(values: Tensor) -> bytes:
    """An idx file of uint8 `values`."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes((0, 0, 8, values.dim())) + sizes + values.numpy().tobytes()


def striped(n: int, classes: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images uint8 [n, 28, 28] that show their class by where they are bright, and labels uint8 [n]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    pixels = torch.randint(0, 60, (n, 28, 28), generator=generator)
    for image, label in zip(pixels, labels.tolist(), strict=True):
        image[2 * label : 2 * label + 4] += 180
    return pixels.to(torch.uint8), labels.to(torch.uint8)


def write_mnist(folder: Path, train: int = 56, test: int = 20, packed: bool = False) -> Path:
    """A folder of the four idx files."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (stem, n) in enumerate((("train", train), ("t10k", test))):
        for kind, values in zip(("images-idx3", "labels-idx1"), striped(n, seed=seed), strict=True):
            content = idx_bytes(values)
            name = f"{stem}-{kind}-ubyte"
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)
    return folder


def write_cifar(folder: Path, each: int = 20) -> Path:
    """A folder of CIFAR-10's Python version, as Python 2 would have pickled it."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"class {i}".encode() for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, 2))
    for seed, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        generator = torch.Generator().manual_seed(seed)
        data = torch.randint(0, 256, (each, 3072), generator=generator).to(torch.uint8).numpy()
        batch = {b"data": data, b"labels": [i % 10 for i in range(each)], b"batch_label": name.encode()}
        (folder / name).write_bytes(pickle.dumps(batch, 2))
    return folder


def write_images(folder: Path, each: int = 4, size: tuple[int, int] = (40, 32), classes: int = 2) -> Path:
    """train/<class>/*.png and val/<class>/*.png, in which a class has its own colour."""
    from PIL import Image

    for seed, part in enumerate(("train", "val")):
        generator = torch.Generator().manual_seed(seed)
        for label in range(classes):
            (folder / part / f"c{label}").mkdir(parents=True, exist_ok=True)
            for i in range(each):
                pixels = torch.randint(0, 100, (size[1], size[0], 3), generator=generator)
                pixels[..., label % 3] += 150
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / part / f"c{label}" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `write_mnist`'s images."""
    return write_mnist(tmp_path_factory.mktemp("mnist"))


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a training: they take longer than it."""
    monkeypatch.setattr(train, "plot_history", lambda *_: None)


@pytest.fixture
def tiny(no_pictures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """TinyNet under the name "tiny", and no pictures."""
    monkeypatch.setitem(models.MODELS, "tiny", TinyNet)


def tiny_recipe(folder: Path, **values: Any) -> Recipe:
    """TinyNet (registered as "tiny") on `write_mnist`'s images: 7 iterations an epoch."""
    base = Recipe(model="tiny", data="mnist", data_dir=str(folder), epochs=2, batch_size=8, lr=0.1, momentum=0.9)
    return dataclasses.replace(base, **values)
