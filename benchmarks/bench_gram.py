"""`gram`: mean and covariance of a bottleneck's last operand, from which its output's statistics follow.

Eager PyTorch has no such step; beside it stands the same product of the activated operand, with its mean taken first.
Means are of the operand without its center.
"""

from __future__ import annotations

from benchmarks.ops import activation, affine, forward_cases, shift
from benchmarks.products import PRODUCT_TYPES, activated
from benchmarks.shapes import ENDS, ConvShape
from benchmarks.suite import ON_GPU, suite
from resnet_fused.ops.dispatch import ops


def arguments(conv: ConvShape, dtype: str):
    return activation(conv.channels, conv.size, dtype), affine(conv.channels), shift(conv.channels)


def eager(x, vectors, center):
    rows = activated(x, vectors).movedim(1, -1).flatten(0, -2)  # [M, C]
    mean = rows.mean(0)
    centred = rows - mean
    return mean - center, centred.mT @ centred / len(rows)


def ours(x, vectors, center):
    return ops.gram(x, *vectors[:2], center, 1)


VARIANTS = {"eager": eager, "ours": ours}
CASES = forward_cases("gram", ENDS, arguments, VARIANTS, types=PRODUCT_TYPES, slow=not ON_GPU)


@suite(CASES)
def test_gram(timed):
    timed()
