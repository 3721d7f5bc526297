"""`bn_stats`: mean and variance over pixels, of every batch norm's input of ResNet-18/50."""

from __future__ import annotations

import torch

from benchmarks.ops import activation, forward_cases, stats, stats_in_math
from benchmarks.shapes import NORMS, NormShape
from benchmarks.suite import suite


def arguments(shape: NormShape, dtype: str):
    return (activation(*shape, dtype),)


VARIANTS = {"eager": stats, "compile": stats_in_math, "ours": torch.ops.resnet_fused.bn_stats}
CASES = forward_cases("bn_stats", NORMS[1:] + NORMS[:1], arguments, VARIANTS)


@suite(CASES)
def test_bn_stats(timed):
    timed()
