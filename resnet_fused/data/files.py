"""Readers of MNIST's idx files, CIFAR-10's Python batches and folders of images."""

from __future__ import annotations

import gzip
import io
import math
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import DataError
from .folder import ImageFolder
from .images import Images
from .optional import require
from .packaged import mnist_5k

Split = Images | ImageFolder


def load(name: str, folder: Path | None) -> tuple[Split, Split]:
    """(training, test) images of a format, one of `FORMATS`, from `folder`; "digits" needs none.

    Raises DataError, naming the file, for what is missing, truncated, corrupt or contradictory.
    """
    if name not in FORMATS:
        raise ValueError(f"data is {name!r}, expected one of {', '.join(FORMATS)}")
    if name == "digits":
        return mnist_5k()
    if folder is None:
        raise DataError(f"{name} needs its folder: --data-dir FOLDER")
    if not folder.is_dir():
        raise DataError(f"no folder {folder}")
    train, test = FORMATS[name](folder)
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(f"{folder}: training and test images differ in classes: {', '.join(odd[:5])}")
    return train, test


# ---------------------------------------------------------------- MNIST

_IDX_BYTES = 8  # the element type "unsigned byte" of an idx header


def mnist(folder: Path) -> tuple[Images, Images]:
    """The four idx files, packed (.gz) or not, of MNIST and of what shares its form."""

    def read(stem: str, dimensions: int) -> Tensor:
        path = _find(folder, stem, dimensions)
        values = read_idx(path)
        if values.dim() != dimensions:
            raise DataError(f"{path} has {values.dim()} dimensions, expected {dimensions}")
        return values

    def split(stem: str) -> Images:
        pixels, labels = read(f"{stem}-images", 3), read(f"{stem}-labels", 1)
        classes = tuple(str(i) for i in range(10))
        return Images.checked(pixels.unsqueeze(1), labels, classes, str(folder / stem))

    return split("train"), split("t10k")


def _find(folder: Path, stem: str, dimensions: int) -> Path:
    names = [f"{stem}{dot}idx{dimensions}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"no {names[0]}[.gz] in {folder}")


def read_idx(path: Path) -> Tensor:
    """An idx file of bytes as uint8, in the dimensions that its header gives.

    The format: two zero bytes, the element type, the number of dimensions, each as a big-endian uint32, the elements.
    Raises DataError.
    """
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:3] != bytes((0, 0, _IDX_BYTES)) or not 1 <= head[3] <= 4:
                raise DataError(f"{path} is no idx file of bytes: it begins with {head.hex(' ') or 'nothing'}")
            sizes = file.read(4 * head[3])
            shape = [int.from_bytes(sizes[i : i + 4], "big") for i in range(0, len(sizes), 4)]
            if len(sizes) < 4 * head[3]:
                raise DataError(f"{path} is truncated in its header")
            expected = math.prod(shape)
            content = file.read(expected + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if len(content) != expected:
        found = f"{len(content)}" if len(content) < expected else "more"
        raise DataError(f"{path} is damaged: its header {shape} announces {expected} bytes, there are {found}")
    if not expected:
        raise DataError(f"{path} holds nothing: its header is {shape}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(shape)


# ---------------------------------------------------------------- CIFAR-10


def cifar10(folder: Path) -> tuple[Images, Images]:
    """data_batch_1 to 5, test_batch and batches.meta of CIFAR-10's Python version, in `folder` or below it."""
    below = folder / "cifar-10-batches-py"
    folder = below if below.is_dir() else folder
    names = _unpickle(folder / "batches.meta").get(b"label_names")
    if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
        raise DataError(f"{folder / 'batches.meta'} has no label_names")
    classes = tuple(name.decode(errors="replace") for name in names)
    batches = [_batch(folder / f"data_batch_{i}", classes) for i in range(1, 6)]
    pixels, labels = (torch.cat(parts) for parts in zip(*((b.pixels, b.labels) for b in batches), strict=True))
    return Images(pixels, labels, classes), _batch(folder / "test_batch", classes)


def _batch(path: Path, classes: tuple[str, ...]) -> Images:
    content = _unpickle(path)
    data, labels = content.get(b"data"), content.get(b"labels")
    shape = list(getattr(data, "shape", ()))
    if str(getattr(data, "dtype", "")) != "uint8" or shape[1:] != [3 * 32 * 32]:
        raise DataError(f"{path} has no data of uint8 [N, 3072]")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataError(f"{path} has no list of labels")
    assert data is not None
    pixels = torch.from_numpy(data.copy()).view(-1, 3, 32, 32)
    return Images.checked(pixels, torch.tensor(labels), classes, str(path))


class _Unpickler(pickle.Unpickler):
    """Of what the batches consist of and nothing else: a pickle may name any function, and unpickling calls it."""

    # numpy moved its module; _codecs.encode is how Python 3 writes bytes into the protocol of Python 2.
    ALLOWED = (
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of images needs")
        return super().find_class("numpy._core.multiarray" if name == "_reconstruct" else module, name)


def _unpickle(path: Path) -> dict[bytes, Any]:
    require("numpy", "CIFAR-10")
    if not path.is_file():
        raise DataError(f"no {path.name} in {path.parent}")
    try:
        content = _Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except Exception as error:  # whatever a damaged pickle leads to
        if isinstance(error, OSError | MemoryError | ImportError) and not isinstance(error, EOFError):
            raise
        raise DataError(f"{path} is no batch of CIFAR-10: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is no batch of CIFAR-10: it holds a {type(content).__name__}")
    return content


# ---------------------------------------------------------------- folders


def folders(folder: Path) -> tuple[ImageFolder, ImageFolder]:
    """train/<class>/<image> and val/<class>/<image> (or test/...)."""
    test = next((folder / name for name in ("val", "test") if (folder / name).is_dir()), folder / "val")
    return ImageFolder.of(folder / "train"), ImageFolder.of(test)


FORMATS: dict[str, Callable[[Path], tuple[Split, Split]]] = {
    "digits": lambda _: mnist_5k(),
    "mnist": mnist,
    "cifar10": cifar10,
    "images": folders,
}
