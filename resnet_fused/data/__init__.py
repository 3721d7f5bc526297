"""Images to train and test on: those that Python packages bring, MNIST's and CIFAR-10's files, folders of images."""

from __future__ import annotations

from .errors import DataError
from .files import FORMATS, load
from .folder import ImageFolder
from .images import Images
from .optional import MissingPackageError, require
from .packaged import IMAGENET_MEAN, IMAGENET_STD, mnist_5k, photos
from .pixels import Pixels

__all__ = [
    "FORMATS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "DataError",
    "ImageFolder",
    "Images",
    "MissingPackageError",
    "Pixels",
    "load",
    "mnist_5k",
    "photos",
    "require",
]
