"""`bn_act`: relu(scale*x + shift) of every batch norm's input, and with the shortcut and the mask at a block's end."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.ops import activation, affine, forward_cases, norm
from benchmarks.shapes import JOINS, NORMS, NormShape
from benchmarks.suite import suite

ops = torch.ops.resnet_fused


def inner(shape: NormShape, dtype: str):
    return activation(*shape, dtype), affine(shape.channels), None


def join(shape: NormShape, dtype: str):
    return activation(*shape, dtype), affine(shape.channels), activation(*shape, dtype)


def eager(x, vectors, residual):
    z = norm(x, *vectors)
    return F.relu(z if residual is None else z + residual, inplace=True)


def ours(x, vectors, residual):
    return ops.bn_act(x, *vectors[:2], residual, None, None, True, residual is not None)[0]


VARIANTS = {"eager": eager, "ours": ours}
CASES = [
    *forward_cases("bn_act", NORMS[1:] + NORMS[:1], inner, VARIANTS),
    *forward_cases("bn_act-join", JOINS, join, VARIANTS),
]


@suite(CASES)
def test_bn_act(timed):
    timed()
