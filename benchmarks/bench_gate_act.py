"""`gate_act` and its backward: the gated shortcut relu((1 - sigmoid(v)) x + sigmoid(v) f)."""

from __future__ import annotations

import torch

from benchmarks.ops import activation, graph_cases
from benchmarks.shapes import JOINS, NormShape
from benchmarks.suite import suite
from resnet_fused import reference


def arguments(shape: NormShape, dtype: str):
    v, x, f, dy = (activation(*shape, dtype) for _ in range(4))
    return (v, x, f), (), dy


def ours(v, x, f):
    return torch.ops.resnet_fused.gate_act(v, x, f, True, True)[0]


CASES = graph_cases("gate_act", JOINS, arguments, reference.gate_act, ours)


@suite(CASES)
def test_gate_act(timed):
    timed()
