"""`add_stats`: a shortcut's sum with the statistics of what follows it, as pre-activation blocks take them."""

from __future__ import annotations

import torch

from benchmarks.ops import activation, forward_cases, stats, stats_in_math
from benchmarks.shapes import JOINS, NormShape
from benchmarks.suite import suite


def arguments(shape: NormShape, dtype: str):
    return activation(*shape, dtype), activation(*shape, dtype)


def eager(x, u):
    y = x + u
    return y, *stats(y)


def math(x, u):
    y = x + u
    return y, *stats_in_math(y)


def ours(x, u):
    return torch.ops.resnet_fused.add_stats(x, u, None, None)


CASES = forward_cases("add_stats", JOINS, arguments, {"eager": eager, "compile": math, "ours": ours})


@suite(CASES)
def test_add_stats(timed):
    timed()
