"""`conv1x1`, `conv1x1_dgrad` and `conv1x1_wgrad`: every 1x1 convolution of ResNet-18/50 with its batch norms."""

from __future__ import annotations

from benchmarks.products import unit_cases
from benchmarks.shapes import CONVS
from benchmarks.suite import suite

CASES = unit_cases("conv1x1", [conv for conv in CONVS if conv.kernel == 1])


@suite(CASES)
def test_conv1x1(timed):
    timed()
