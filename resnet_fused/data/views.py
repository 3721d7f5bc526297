"""What a network sees of an image: in training a random crop of it, in a test one crop, ten, or it at several scales.

Every random number is a function of the seed, the epoch and the image, whatever the batches, the processes and the
loader's workers: a run that goes on from a checkpoint sees what it would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from .errors import DataError
from .folder import ImageFolder, Picture
from .images import Images
from .pixels import Pixels

Split = Images | ImageFolder
Batch = tuple[Tensor, Tensor]  # [n, C, H, W] float32, [n] int64
SHORTER = 8 / 7  # of a network's input: 256 pixels for 224


def stream(*key: int) -> torch.Generator:
    """A generator for these numbers: those of neighbouring keys have nothing to do with each other."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


@dataclass(frozen=True)
class Augment:
    """How training images are varied.

    pad: pixels of zeros around an image in memory, of which a crop of its own size is taken. flip: half of the images,
    left to right. scale: of an image from a folder, the range of its shorter side before the crop of `size` pixels.
    colour: the standard deviation of the shift along the colours' principal axes, in units of theirs.
    """

    pad: int = 0
    flip: bool = False
    size: int = 224
    scale: tuple[int, int] = (256, 480)
    colour: float = 0.0


class TrainingView(Dataset):
    """The images of an epoch, varied; the loader asks for whole batches by their rows."""

    def __init__(self, images: Split, pixels: Pixels, augment: Augment, seed: int, epoch: int) -> None:
        self.images, self.pixels, self.augment = images, pixels, augment
        draws = stream(seed, epoch, 1)
        self.uniform = torch.rand(images.count, 4, generator=draws)  # scale, top, left, flip
        self.normal = torch.randn(images.count, 3, generator=draws) if augment.colour else None

    def __len__(self) -> int:
        return self.images.count

    def __getitems__(self, rows: Sequence[int]) -> Batch | DataError:
        """An error is returned, not raised: from a worker it would come as a traceback."""
        at = torch.as_tensor(rows)
        labels = self.images.labels[at]
        try:
            if isinstance(self.images, Images):
                return self._shifted(self.pixels(self.images.pixels[at]), self.uniform[at]), labels
            crops = torch.stack([self._crop(self.images, row) for row in rows])
        except DataError as error:
            return error
        if self.normal is None:
            return self.pixels(crops), labels
        return self.pixels.shifted(crops, self.augment.colour * self.normal[at]), labels

    def _shifted(self, x: Tensor, uniform: Tensor) -> Tensor:
        """Crops [n, C, h, w] of x padded with zeros, which are the mean colour."""
        pad, (h, w) = self.augment.pad, x.shape[2:]
        flip = uniform[:, 3] < 0.5 if self.augment.flip else torch.zeros(len(x), dtype=torch.bool)
        if not pad and not flip.any():
            return x
        top, left = (uniform[:, 1:3] * (2 * pad + 1)).long().unbind(1)
        ys = top[:, None] + torch.arange(h)  # [n, h]
        columns = torch.arange(w).expand(len(x), w)
        xs = left[:, None] + torch.where(flip[:, None], columns.flip(1), columns)  # [n, w]
        padded = F.pad(x, (pad, pad, pad, pad))
        images = torch.arange(len(x))[:, None, None]
        return padded.movedim(1, 3)[images, ys[:, :, None], xs[:, None, :]].movedim(3, 1).contiguous()

    def _crop(self, images: ImageFolder, row: int) -> Tensor:
        """uint8 [3, size, size]."""
        scale, top, left, flip = self.uniform[row].tolist()
        low, high = self.augment.scale
        picture, size = Picture(images.paths[row]), self.augment.size
        height, width = picture.scaled(low + int(scale * (high - low + 1)))
        at = int(top * (height - size + 1)), int(left * (width - size + 1))
        crop = picture.crop(height, width, *at, (size, size))
        return crop.flip(2) if self.augment.flip and flip < 0.5 else crop


Crops = Literal["centre", "ten", "multi"]


@dataclass(frozen=True)
class HeldOutView(Dataset):
    """Each image as one or several views [C, h, w], normalised.

    "centre": an image in memory as it is, one from a folder scaled to a shorter side of 8/7 `size` and cropped to
    `size` pixels. "ten": of the image so scaled the four corners and the centre, and their mirror images (Krizhevsky
    et al. 2012). "multi": the whole image, its shorter side scaled to each of `scales`, for a network applied fully
    convolutionally (Simonyan and Zisserman 2015, section 3.2).
    """

    images: Split
    pixels: Pixels
    size: int
    crops: Crops = "centre"
    scales: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.images.count

    @property
    def views(self) -> int:
        """Of each image."""
        return {"centre": 1, "ten": 10, "multi": len(self.scales)}[self.crops]

    def __getitems__(self, rows: Sequence[int]) -> tuple[list[list[Tensor]], Tensor] | DataError:
        try:
            return [self._views(row) for row in rows], self.images.labels[torch.as_tensor(rows)]
        except DataError as error:
            return error

    def _views(self, row: int) -> list[Tensor]:
        if self.crops == "multi":
            return [self.pixels(self._scaled(row, scale)) for scale in self.scales]
        if self.crops == "centre" and isinstance(self.images, Images):
            return [self.pixels(self.images.pixels[row])]
        image = self._scaled(row, round(self.size * SHORTER))
        down, right = (side - self.size for side in image.shape[1:])
        corners = [(down // 2, right // 2), (0, 0), (0, right), (down, 0), (down, right)]
        crops = [image[:, y : y + self.size, x : x + self.size] for y, x in corners]
        if self.crops == "centre":
            return [self.pixels(crops[0])]
        return [self.pixels(view) for crop in crops for view in (crop, crop.flip(2))]

    def _scaled(self, row: int, shorter: int) -> Tensor:
        """[3, h, w], 0 to 255, the shorter side of `shorter` pixels."""
        if isinstance(self.images, ImageFolder):
            return Picture(self.images.paths[row]).resized(shorter)
        image = self.images.pixels[row]
        size = [round(side * shorter / min(image.shape[1:])) for side in image.shape[1:]]
        return F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0].clamp(0, 255)
