"""What a recipe says, made ready: its images, how they are normalised and varied, and whether the network fits them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from .data import Images, Pixels, load
from .data.loading import measure_pixels
from .data.views import Augment, HeldOutView, Split
from .recipe import RESUMABLE, Recipe


def check_same(recipe: Recipe, before: Recipe) -> None:
    """Whether a run may go on by `recipe`. Raises ValueError for a value that its checkpoint was made with."""
    for name, value in before.as_dict().items():
        now = recipe.as_dict()[name]
        if now != value and name not in RESUMABLE:
            raise ValueError(
                f"{name} is {now!r}, but the run to go on with has {value!r}; {', '.join(RESUMABLE)} may change"
            )


def splits(recipe: Recipe) -> tuple[Split, Split]:
    """(training, test) images as the network takes them."""
    splits = load(recipe.data, Path(recipe.data_dir) if recipe.data_dir else None)
    first, second = (s.fitted(recipe.channels, recipe.size) if isinstance(s, Images) else s for s in splits)
    return first, second


def augment_of(recipe: Recipe) -> Augment:
    low, high = recipe.scale
    return Augment(recipe.pad, recipe.flip, recipe.size, (low, high), recipe.colour)


def pixels_of(recipe: Recipe, images: Split) -> Pixels:
    channels = images.shape[0] if isinstance(images, Images) else 3
    if recipe.normalise == "given" and len(recipe.mean) not in (1, channels):
        raise ValueError(f"mean has {len(recipe.mean)} values, but the images have {channels} channels")
    if recipe.normalise == "given" and not recipe.colour:
        return Pixels.given(recipe.mean, recipe.std)
    measured = measure_pixels(images, recipe.size, recipe.normalise == "pixel", recipe.workers)
    if recipe.normalise != "given":
        return measured
    given = Pixels.given(recipe.mean, recipe.std)
    return Pixels(given.mean, given.std, measured.colours)


def check_fit(model: nn.Module, recipe: Recipe, view: HeldOutView, classes: int) -> None:
    """Whether the network takes an image of the data and gives a score for each class. Raises ValueError."""
    found = view.__getitems__([0])
    if isinstance(found, Exception):
        raise found
    (x,), shape = found[0][0], list(found[0][0][0].shape)
    first = next(model.parameters())
    model.eval()
    try:
        with torch.no_grad():
            logits = model(x[None].to(first.device, first.dtype))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{recipe.model} does not take the images, {shape} each: {reason}") from error
    if list(logits.shape) != [1, classes]:
        raise ValueError(f"{recipe.model} gives {list(logits.shape)[1:]} scores, but the data has {classes} classes")
