"""`bn_act_pool` and its backward: the stem's batch norm with given statistics, ReLU and max pool."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.ops import activation, affine, graph_cases, norm
from benchmarks.shapes import STEM, NormShape
from benchmarks.suite import suite

POOL = (3, 2, 1)  # kernel, stride, padding


def arguments(shape: NormShape, dtype: str):
    scale, shift, *identity = affine(shape.channels)
    dy = activation(shape.channels, shape.size // 2, dtype)
    return (activation(*shape, dtype), scale, shift), identity, dy


def eager(x, scale, shift, mean, var):
    return F.max_pool2d(F.relu(norm(x, scale, shift, mean, var)), *POOL)


def ours(x, scale, shift, mean, var):
    return torch.ops.resnet_fused.bn_act_pool(x, scale, shift, *POOL)[0]


CASES = graph_cases("bn_act_pool", [STEM.output], arguments, eager, ours)


@suite(CASES)
def test_bn_act_pool(timed):
    timed()
