"""Scores of a trained network on labelled images, and the checkpoints they are taken from."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from . import models
from .data import Digits, require

CLASSES = 10


class CheckpointError(ValueError):
    """A file is not a checkpoint of this package's training."""


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch_size: int = 250) -> Tensor:
    """The most likely class of each image, int64 [N] on the CPU, with `model` in eval mode."""
    was_training = model.training
    device = next(model.parameters()).device
    model.eval()
    classes = [model(batch.to(device)).argmax(1).cpu() for batch in images.split(batch_size)]
    model.train(was_training)
    return torch.cat(classes)


def accuracy(model: nn.Module, digits: Digits) -> float:
    """The fraction of `digits` that `model` classifies correctly."""
    return (predict(model, digits.images) == digits.labels).float().mean().item()


def confusion(model: nn.Module, digits: Digits) -> Tensor:
    """Counts, int64 [10, 10]: row = the true class, column = the predicted one."""
    cells = digits.labels * CLASSES + predict(model, digits.images)
    return torch.bincount(cells, minlength=CLASSES**2).view(CLASSES, CLASSES)


def neighbour_accuracy(train: Digits, test: Digits, neighbours: int = 3) -> float:
    """What a k-nearest-neighbour classifier on the pixels reaches: the bar to clear."""
    knn = require("sklearn.neighbors", "the baseline", "scikit-learn").KNeighborsClassifier(neighbours)
    knn.fit(train.images.flatten(1).numpy(), train.labels.numpy())
    return float(knn.score(test.images.flatten(1).numpy(), test.labels.numpy()))


def save_checkpoint(model: nn.Module, path: Path, metadata: dict[str, object]) -> None:
    """Writes the weights as safetensors; a reader of `path` sees the old file or the new, never a part."""
    safetensors = require("safetensors.torch", "saving a checkpoint")
    # Fused models keep conv weights channels_last; the file holds them in their logical order.
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        safetensors.save_file(weights, partial, {name: str(value) for name, value in metadata.items()})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> tuple[nn.Module, dict[str, str]]:
    """(model in eval mode, metadata) of a file that `save_checkpoint` wrote.

    Raises FileNotFoundError, or CheckpointError where the file is something else.
    """
    require("safetensors.torch", "reading a checkpoint")
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names: list[str] = file.keys()
            weights = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    if "model" not in metadata:
        raise CheckpointError(f"{path} does not say which model it holds")
    model = models.create(metadata["model"])
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not hold the weights of {metadata['model']}") from error
    return model.eval(), metadata
