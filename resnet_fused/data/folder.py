"""A folder of images, a subfolder for each class, decoded when they are needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import DataError
from .optional import require

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class ImageFolder:
    """The paths of the images and their labels, int64 [N], each an index into `classes`."""

    paths: tuple[Path, ...]
    labels: Tensor
    classes: tuple[str, ...]

    @classmethod
    def of(cls, root: Path) -> ImageFolder:
        """<root>/<class>/**/<image>, classes and images sorted by name. Raises DataError."""
        if not root.is_dir():
            raise DataError(f"no folder {root}")
        classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not classes:
            raise DataError(f"{root} has no subfolders, expected one for each class")
        paths: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            found = sorted(p for p in (root / name).rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
            if not found:
                raise DataError(f"{root / name} has no images ({', '.join(ENDINGS)})")
            paths += found
            labels += [label] * len(found)
        return cls(tuple(paths), torch.tensor(labels), tuple(classes))

    @property
    def count(self) -> int:
        return len(self.paths)


class Picture:
    """One image file, opened; its pixels are decoded by `crop`. Raises DataError for what PIL cannot read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._image: Any = require("PIL.Image", "folders of images", "pillow").open(path)
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{path} is no image: {_first_line(error)}") from error
        self.width, self.height = self._image.size

    def scaled(self, shorter: float) -> tuple[int, int]:
        """(height, width) with the shorter side of `shorter` pixels."""
        scale = shorter / min(self.width, self.height)
        return max(1, round(self.height * scale)), max(1, round(self.width * scale))

    def resized(self, shorter: float) -> Tensor:
        """uint8 [3, h, w], the shorter side of `shorter` pixels."""
        height, width = self.scaled(shorter)
        return self.crop(height, width, 0, 0, (height, width))

    def crop(self, height: int, width: int, top: int, left: int, size: tuple[int, int]) -> Tensor:
        """uint8 [3, *size]: the part at (top, left) of the image scaled to height x width, bilinear.

        Only what the crop needs is resampled.
        """
        y, x = self.height / height, self.width / width  # source pixels in one of the scaled image
        box = (left * x, top * y, (left + size[1]) * x, (top + size[0]) * y)
        # Rounding must not push the box out of the image.
        box = (box[0], box[1], min(box[2], self.width), min(box[3], self.height))
        try:
            image = self._image.convert("RGB").resize(size[::-1], resample=2, box=box)  # 2: PIL's BILINEAR
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{self.path} is damaged: {_first_line(error)}") from error
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.view(*size, 3).permute(2, 0, 1)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
