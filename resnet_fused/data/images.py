"""Labelled images in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import DataError


@dataclass(frozen=True)
class Images:
    """Pixels, uint8 [N, C, H, W]; labels, int64 [N], each an index into `classes`."""

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    @classmethod
    def checked(cls, pixels: Tensor, labels: Tensor, classes: tuple[str, ...], where: str) -> Images:
        """Raises DataError, naming `where`, unless every image has a label of one of the classes."""
        if len(pixels) != len(labels):
            raise DataError(f"{where}: {len(pixels)} images, but {len(labels)} labels")
        if not len(pixels):
            raise DataError(f"{where}: no images")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(classes):
            raise DataError(f"{where}: labels from {low} to {high}, expected 0 to {len(classes) - 1}")
        return cls(pixels, labels.long(), classes)

    @property
    def count(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C, H, W] of one image."""
        c, h, w = self.pixels.shape[1:]
        return c, h, w

    def select(self, rows: Tensor | Sequence[int]) -> Images:
        """Those at `rows`, indices or a boolean mask."""
        rows = torch.as_tensor(rows)
        return replace(self, pixels=self.pixels[rows], labels=self.labels[rows])

    def fitted(self, channels: int = 0, size: int = 0) -> Images:
        """Grey repeated to `channels`, and black around the image up to `size` pixels a side; 0: as it is.

        Raises DataError where that cannot be.
        """
        c, h, w = self.shape
        pixels = self.pixels
        if channels not in (0, c):
            if c != 1:
                raise DataError(f"the images have {c} channels, which do not turn into {channels}")
            pixels = pixels.expand(-1, channels, -1, -1)
        if size:
            down, right = size - h, size - w
            if min(down, right) < 0:
                raise DataError(f"the images are {h}x{w}, larger than the size asked for, {size}")
            pixels = F.pad(pixels, (right // 2, right - right // 2, down // 2, down - down // 2))
        return replace(self, pixels=pixels)
