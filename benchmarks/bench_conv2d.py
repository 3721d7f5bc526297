"""`conv2d`, `conv2d_dgrad`, `conv2d_wgrad`: every 3x3 convolution of ResNet-18/50 and the stem's, with batch norms."""

from __future__ import annotations

from benchmarks.products import unit_cases
from benchmarks.shapes import CONVS, STEM
from benchmarks.suite import suite

CASES = unit_cases("conv2d", [*(conv for conv in CONVS if conv.kernel == 3), STEM])


@suite(CASES)
def test_conv2d(timed):
    timed()
