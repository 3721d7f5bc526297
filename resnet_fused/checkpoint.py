"""Checkpoints: weights as safetensors, the rest of a run's state as torch.load(weights_only=True) takes it.

A file appears under its name only when all of it is on the disk. A run's state is two, last-<iteration>.safetensors and
last.pt, which names the former: writing it is what makes both the last checkpoint. So whatever is cut short, the folder
holds a complete one, and the weights before are removed only afterwards.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .data import Pixels, require
from .recipe import Recipe, RecipeError, build, from_values

BEST, STATE = "best.safetensors", "last.pt"
_PIXELS = "pixels."  # how a file calls the tensors of Pixels


class CheckpointError(ValueError):
    """A file is not a checkpoint of this package's training, or damaged."""


class SaveError(OSError):
    """A file could not be written; what was there before still is."""


@dataclass(frozen=True)
class Trained:
    """What a file of weights holds."""

    weights: dict[str, Tensor]
    metadata: dict[str, str]
    pixels: Pixels | None

    @property
    def recipe(self) -> Recipe:
        """That of the training, or one with the network alone. Raises RecipeError."""
        if "recipe" not in self.metadata:
            return Recipe(model=self.metadata["model"])
        return from_values(json.loads(self.metadata["recipe"]), "the checkpoint's recipe")

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(json.loads(self.metadata.get("classes", "[]"))) or tuple(str(i) for i in range(10))


# ---------------------------------------------------------------- files


def write(path: Path, content: bytes) -> None:
    """All of it or nothing: a reader of `path`, or a kill at any moment, sees the old file or the new.

    Raises SaveError.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise SaveError(f"cannot save {path}: {error.strerror or error}; what was saved before is as it was") from error


def _sync_folder(folder: Path) -> None:
    """A name is on the disk once its folder is."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---------------------------------------------------------------- weights


def pack(model: nn.Module, metadata: Mapping[str, object], pixels: Pixels | None = None) -> bytes:
    """A safetensors file of the weights, and of `pixels` beside them."""
    safetensors = require("safetensors.torch", "saving a checkpoint")
    tensors = dict(model.state_dict())
    if pixels is not None:
        tensors |= {_PIXELS + name: tensor for name, tensor in pixels.tensors().items()}
    # Fused models may keep conv weights channels_last; the file holds them in their logical order.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.save(tensors, {name: str(value) for name, value in metadata.items()})


def save(model: nn.Module, path: Path, metadata: Mapping[str, object], pixels: Pixels | None = None) -> None:
    """Writes the weights; `metadata` has at least "model". Raises SaveError."""
    write(path, pack(model, metadata, pixels))


def read(path: Path) -> Trained:
    """Raises FileNotFoundError, or CheckpointError where the file is something else."""
    require("safetensors.torch", "reading a checkpoint")
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names: list[str] = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    if "model" not in metadata:
        raise CheckpointError(f"{path} does not say which model it holds")
    own = {name.removeprefix(_PIXELS): tensors.pop(name) for name in names if name.startswith(_PIXELS)}
    try:
        pixels = Pixels(**own) if own else None
    except TypeError as error:
        raise CheckpointError(f"{path} lacks a part of how its pixels are normalised") from error
    return Trained(tensors, metadata, pixels)


def network(trained: Trained, path: Path) -> nn.Module:
    """The trained network, in eval mode. Raises CheckpointError, naming `path`."""
    try:
        model = build(trained.recipe, len(trained.classes))
    except (RecipeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    restore(model, trained, path)
    return model.eval()


def restore(model: nn.Module, trained: Trained, path: Path) -> None:
    """Puts the weights into `model`. Raises CheckpointError, naming `path`, unless they are exactly its own."""
    try:
        model.load_state_dict(trained.weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not hold the weights of {trained.metadata['model']}") from error


def load(path: Path) -> tuple[nn.Module, dict[str, str]]:
    """(network in eval mode, metadata) of a file that `save` wrote.

    Raises FileNotFoundError, or CheckpointError where the file is something else.
    """
    trained = read(path)
    return network(trained, path), trained.metadata


# ---------------------------------------------------------------- a run's state


def save_state(folder: Path, iteration: int, weights: bytes, state: Mapping[str, Any]) -> None:
    """Makes these the last checkpoint of the run in `folder`. Raises SaveError."""
    name = f"last-{iteration}.safetensors"
    content = io.BytesIO()
    digest = hashlib.sha256(weights).hexdigest()
    torch.save({**state, "iteration": iteration, "weights": name, "sha256": digest}, content)
    write(folder / name, weights)
    write(folder / STATE, content.getvalue())
    for old in folder.glob("last-*.safetensors"):
        if old.name != name:
            old.unlink(missing_ok=True)
    for cut_short in folder.glob(".*.partial"):
        cut_short.unlink(missing_ok=True)


def read_state(folder: Path) -> tuple[dict[str, Any], Trained]:
    """The last checkpoint. Raises FileNotFoundError, or CheckpointError for a damaged one."""
    path = folder / STATE
    if not path.is_file():
        raise FileNotFoundError(f"no run to go on with in {folder}: there is no {STATE}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch checks no sums
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        weights, digest = folder / state["weights"], state["sha256"]
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # whatever damage leads to
        raise CheckpointError(f"{path} is no checkpoint of a run: {error}") from error
    if weights.is_file() and hashlib.sha256(weights.read_bytes()).hexdigest() != digest:
        raise CheckpointError(f"{weights} is damaged: its contents are not those that {path} was saved with")
    return state, read(weights)
