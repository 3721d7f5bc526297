"""`concat_act` and its backward: [x | relu(scale*u + shift)], of as many channels each."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.ops import activation, affine, graph_cases, norm
from benchmarks.shapes import JOINS, NormShape
from benchmarks.suite import suite


def arguments(shape: NormShape, dtype: str):
    scale, shift, *identity = affine(shape.channels)
    x, u = activation(*shape, dtype), activation(*shape, dtype)
    return (x, u, scale, shift), identity, activation(2 * shape.channels, shape.size, dtype)


def eager(x, u, scale, shift, mean, var):
    return torch.cat([x, F.relu(norm(u, scale, shift, mean, var))], 1)


def ours(x, u, scale, shift, mean, var):
    return torch.ops.resnet_fused.concat_act(x, u, scale, shift, True, True)[0]


CASES = graph_cases("concat_act", JOINS, arguments, eager, ours)


@suite(CASES)
def test_concat_act(timed):
    timed()
