"""`gram`: mean and covariance of a 1x1 convolution's operand."""

from __future__ import annotations

from torch import Tensor

from ..ops.gram import check_gram
from .pixels import gram_of_pixels
from .window import Window


def gram(x: Tensor, scale: Tensor | None, shift: Tensor | None, center: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    check_gram(x, scale, shift, center, stride)
    return gram_of_pixels(x, scale, shift, center, Window(stride_h=stride, stride_w=stride))
