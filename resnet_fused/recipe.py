"""Recipes: what is trained, on what and how, as readable TOML files whose every value the command line may change."""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import nn

from . import models
from .data import FORMATS, require

SEEDS = range(-(2**63), 2**64)  # what torch takes
FOLDER = Path(__file__).parent / "recipes"

Schedule = Literal["constant", "step", "plateau"]
Precision = Literal["fp32", "fp64", "bf16", "fp16"]
Fuse = Literal["lean", "fast", "off"]
Normalise = Literal["given", "channel", "pixel"]


class RecipeError(ValueError):
    """A recipe's file or one of its values is wrong; the message names it."""


def _value(default: Any, help: str, **limits: Any) -> Any:
    """A field with its help and the limits that `_check` knows: at_least, above, below, choices."""
    metadata = {"help": help, **limits}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Recipe:
    """The values of a recipe; the defaults are the MNIST recipe on the packaged digits.

    Raises RecipeError, naming the value, for one out of its limits.
    """

    model: str = _value("mnist_resnet", "the network, one of resnet_fused.models.MODELS")
    model_args: dict[str, Any] = _value({}, "further arguments of the network")
    # data
    data: str = _value("digits", "format of the images", choices=tuple(FORMATS))
    data_dir: str = _value("", "folder of the images")
    channels: int = _value(0, "grey images repeated to so many channels; 0: as they are", at_least=0)
    size: int = _value(0, "side of the network's input: black around images in memory, a crop of others", at_least=0)
    normalise: Normalise = _value(
        "given", "by mean and std as given, measured for each channel, or minus a mean image measured for each pixel"
    )
    mean: tuple[float, ...] = _value((0.1307,), "of each channel, of pixels from 0 to 1")
    std: tuple[float, ...] = _value((0.3081,), "of each channel, of pixels from 0 to 1", above=0)
    pad: int = _value(0, "zeros around images in memory, of which a random crop is taken", at_least=0)
    flip: bool = _value(False, "mirror half of the images")
    scale: tuple[int, ...] = _value((256, 480), "least and greatest shorter side of a folder's images", at_least=1)
    colour: float = _value(0.0, "standard deviation of the shift along the principal colours", at_least=0)
    workers: int = _value(0, "processes that load images", at_least=0)
    # optimization
    epochs: int = _value(20, "passes over the training images", at_least=1)
    iterations: int = _value(0, "optimizer steps, in place of epochs", at_least=0)
    batch_size: int = _value(30, "images of an optimizer step, of all processes together", at_least=1)
    accumulate: int = _value(1, "parts of a step's batch whose gradients are added up", at_least=1)
    lr: float = _value(0.005, "learning rate", above=0)
    momentum: float = _value(0.5, "of SGD", at_least=0, below=1)
    weight_decay: float = _value(0.0, "of SGD, on every parameter", at_least=0)
    schedule: Schedule = _value("constant", "of the learning rate")
    milestones: tuple[int, ...] = _value((), "iterations at which a step schedule multiplies it by gamma", at_least=1)
    gamma: float = _value(0.1, "factor of a step or on a plateau", above=0, below=1)
    patience: int = _value(5, "tests without a better accuracy that make a plateau", at_least=0)
    warmup: int = _value(0, "first iterations, at warmup_lr", at_least=0)
    warmup_lr: float = _value(0.01, "learning rate of the warm-up", above=0)
    seed: int = _value(0, "of the weights, the order and the variation of the images")
    # the machine
    fuse: Fuse = _value("lean", "fused blocks that keep least for backward, keep more, or plain PyTorch")
    precision: Precision = _value("fp32", "bf16 and fp16 by autocast (fp16 with a scaled loss), fp64 throughout")
    channels_last: bool = _value(False, "memory format of weights and images")
    compile: bool = _value(False, "by torch.compile")
    sync_bn: bool = _value(True, "batch statistics over all processes")
    # output
    checkpoint_every: int = _value(0, "iterations between checkpoints; 0: after each epoch alone", at_least=0)
    tensorboard: bool = _value(False, "write events for TensorBoard")

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            for one in value if isinstance(value, tuple) else (value,):
                _check(f, one)
        if len(self.scale) != 2 or self.scale[0] > self.scale[1]:
            raise RecipeError(f"scale is {list(self.scale)}, expected a least and a greatest shorter side")
        if self.data == "images" and self.scale[0] < self.size:
            raise RecipeError(f"scale begins at {self.scale[0]}, less than size, {self.size}")
        if self.data == "images" and not self.size:
            raise RecipeError("size is 0, but images from a folder are cropped to one")
        if self.data == "digits" and self.data_dir:
            raise RecipeError(f"data_dir is {self.data_dir!r}, but data is 'digits', which need none")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise RecipeError(f"milestones is {list(self.milestones)}, expected ascending iterations")
        if self.normalise == "given" and (not self.mean or len(self.mean) != len(self.std)):
            raise RecipeError(
                f"mean has {len(self.mean)} values and std {len(self.std)}, expected one for each channel"
            )
        if self.batch_size % self.accumulate:
            raise RecipeError(f"batch_size is {self.batch_size}, which accumulate, {self.accumulate}, does not divide")

    def as_dict(self) -> dict[str, Any]:
        """Of what JSON and torch's safe loader know; `from_values` is the inverse."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


TYPES: dict[str, Any] = get_type_hints(Recipe)


def choices(f: dataclasses.Field) -> tuple[str, ...]:
    """The words that a field takes; none if any."""
    return get_args(TYPES[f.name]) if get_origin(TYPES[f.name]) is Literal else f.metadata.get("choices", ())


def _check(f: dataclasses.Field, value: Any) -> None:
    limits, words = f.metadata, choices(f)
    if words and value not in words:
        raise RecipeError(f"{f.name} is {value!r}, expected one of {', '.join(words)}")
    if f.name == "seed" and value not in SEEDS:
        raise RecipeError(f"seed is {value}, expected -2**63 to 2**64 - 1")
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{f.name} is {value}, expected a finite number")
    for limit, fails, relation in (
        ("at_least", lambda x, y: x < y, "at least"),
        ("above", lambda x, y: x <= y, "more than"),
        ("below", lambda x, y: x >= y, "less than"),
    ):
        if limit in limits and fails(value, limits[limit]):
            raise RecipeError(f"{f.name} is {value}, expected {relation} {limits[limit]}")


def from_values(values: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """The recipe of a file's values. Raises RecipeError, naming `where`, for unknown names and wrong types."""
    known = {}
    for name, value in values.items():
        if name not in TYPES:
            raise RecipeError(f"{where}: unknown value {name!r}")
        known[name] = _typed(name, value, where)
    try:
        return Recipe(**known)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def _typed(name: str, value: Any, where: str) -> Any:
    """`value` as the field's type: an int serves as a float, a list as a tuple; nothing else is turned."""
    kind = TYPES[name]
    outer = get_origin(kind) or kind
    if outer is tuple:
        one = get_args(kind)[0]
        if isinstance(value, list | tuple) and all(_is_a(item, one) for item in value):
            return tuple(one(item) for item in value)
    elif outer is Literal:
        if isinstance(value, str):
            return value  # which one, `_check` looks at
    elif _is_a(value, outer):
        return outer(value)
    expected = {float: "a number", int: "a whole number", bool: "true or false", dict: "a table"}
    words = expected.get(outer, "a list of numbers" if outer is tuple else "a string")
    raise RecipeError(f"{where}: {name} is {value!r}, expected {words}")


def _is_a(value: Any, kind: type) -> bool:
    if kind is not bool and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else kind)


# What a run may change when it goes on; the rest is a part of what its checkpoint continues.
RESUMABLE = (
    *("epochs", "iterations", "data_dir", "workers", "accumulate", "fuse", "channels_last", "compile", "sync_bn"),
    *("checkpoint_every", "tensorboard"),
)


def from_text(name: str, text: str) -> Any:
    """One value of a field (of a tuple's, one item) as the command line has it. Raises RecipeError."""
    kind = TYPES[name]
    one = get_args(kind)[0] if get_origin(kind) is tuple else kind
    if one in (int, float):
        try:
            value = one(text)
        except ValueError:
            raise RecipeError(f"{text!r} is not a {'whole ' if one is int else ''}number") from None
    else:
        value = text
    _check(next(f for f in fields(Recipe) if f.name == name), value)
    return value


def names() -> list[str]:
    """Of the recipes in the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read(name_or_path: str) -> Recipe:
    """One of the package's recipes by name, or a TOML file by path. Raises RecipeError."""
    path = FOLDER / f"{name_or_path}.toml" if name_or_path in names() else Path(name_or_path)
    if not path.is_file():
        raise RecipeError(f"no recipe {name_or_path}: one of {', '.join(names())}, or the path of a TOML file")
    return from_values(parse(path.read_bytes(), str(path)), str(path))


def parse(text: bytes, where: str) -> dict[str, Any]:
    """TOML. Raises RecipeError, naming `where` and the line."""
    old = sys.version_info < (3, 11)
    toml = require("tomli", "a recipe") if old else importlib.import_module("tomllib")
    try:
        return toml.loads(text.decode())
    except (toml.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{where} is no TOML file: {error}") from None


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """With other values; epochs alone also take the place of iterations. Raises RecipeError."""
    if "epochs" in changes and "iterations" not in changes:
        changes = {**changes, "iterations": 0}
    return from_values({**recipe.as_dict(), **changes}, "arguments")


def build(recipe: Recipe, classes: int) -> nn.Module:
    """The network, with an output for each class where its constructor leaves that open.

    Raises RecipeError for arguments that it does not take.
    """
    if recipe.model not in models.MODELS:
        return models.create(recipe.model)  # which says what there is
    try:
        model = _create(recipe, classes)
    except TypeError as error:
        raise RecipeError(f"model_args of {recipe.model}: {error}") from error
    if recipe.fuse != "off":
        for module in model.modules():
            if hasattr(module, "memory"):
                module.memory = recipe.fuse  # type: ignore[assignment]
    return model.double() if recipe.precision == "fp64" else model


def _create(recipe: Recipe, classes: int) -> nn.Module:
    try:
        return models.create(recipe.model, **{"num_classes": classes, **recipe.model_args})
    except TypeError as error:
        if "num_classes" not in str(error) or "num_classes" in recipe.model_args:
            raise
        return models.create(recipe.model, **recipe.model_args)
