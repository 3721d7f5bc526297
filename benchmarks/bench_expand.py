"""`expand`: a bottleneck's last unit, its statistics known: relu(scale (relu(norm(x)) W') + shift + shortcut)."""

from __future__ import annotations

import torch.nn.functional as F

from benchmarks.ops import activation, affine, forward_cases, norm, weight
from benchmarks.products import PRODUCT_TYPES, activated
from benchmarks.shapes import ENDS, ConvShape
from benchmarks.suite import ON_GPU, suite
from resnet_fused.ops.dispatch import ops


def arguments(conv: ConvShape, dtype: str):
    residual = activation(*conv.output, dtype)
    operand = activation(conv.channels, conv.size, dtype), affine(conv.channels)
    return *operand, weight(conv, dtype), affine(conv.filters), residual


def eager(x, vectors, w, out_vectors, residual):
    z = norm(F.conv2d(activated(x, vectors), w), *out_vectors)
    z += residual
    return F.relu(z, inplace=True)


def ours(x, vectors, w, out_vectors, residual):
    return ops.expand(x, *vectors[:2], w, *out_vectors[:2], None, None, None, 1, residual, True, True)[0]


VARIANTS = {"eager": eager, "ours": ours}
CASES = forward_cases("expand", ENDS, arguments, VARIANTS, types=PRODUCT_TYPES, slow=not ON_GPU)


@suite(CASES)
def test_expand(timed):
    timed()
