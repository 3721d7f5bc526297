"""`gram`: mean and covariance of a 1x1 convolution's operand, read once (see `gram_form.py` for what they are for)."""

from __future__ import annotations

from torch import Tensor

from .autograd import fake, forbid_gradients
from .dispatch import ops as _ops
from .gram_form import gram_of
from .layout import acc_dtype
from .pointwise import Checks, activated, on_cpu


def check_gram(x: Tensor, scale, shift, center: Tensor, stride) -> None:
    check = Checks("gram", "x", x)
    check.together(scale=scale, shift=shift)
    check.vectors(x.shape[1], scale=scale, shift=shift, center=center)
    check.stride(stride)


@on_cpu("gram")
def _gram(x: Tensor, scale, shift, center: Tensor, stride):
    check_gram(x, scale, shift, center, stride)
    # Rounded before it is centred and after, so that this is what a later product multiplies, minus a constant.
    operand, mean = _ops.gram_operand(activated(x, scale, shift), None, None, False, center, stride)
    return mean, gram_of(operand, mean, center).cov


@fake("gram")
def _(x, scale, shift, center, stride):
    c, dtype = x.shape[1], acc_dtype(x.dtype)
    return x.new_empty((c,), dtype=dtype), x.new_empty((c, c), dtype=dtype)


forbid_gradients("gram")
