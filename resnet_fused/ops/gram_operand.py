"""`gram_operand`: the centred activation whose Gram matrix gives a 1x1 unit's statistics (see `gram_form.py`)."""

from __future__ import annotations

from torch import Tensor

from .autograd import fake, forbid_gradients
from .layout import acc_dtype, empty_nhwc


@fake("gram_operand")
def _(x: Tensor, scale, shift, relu, center, stride):
    n, c, h, w = x.shape
    a = empty_nhwc(x, (n, c, (h + stride - 1) // stride, (w + stride - 1) // stride))
    return a, x.new_empty((c,), dtype=acc_dtype(x.dtype))


forbid_gradients("gram_operand")
