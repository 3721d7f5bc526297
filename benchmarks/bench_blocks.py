"""Single blocks of ResNet-18/50 at batch 8: forward and training step; eager, torch.compile, ours."""

from __future__ import annotations

import pytest
import torch

from benchmarks.shapes import BLOCKS, QUICK, BlockShape
from benchmarks.variants import DTYPES, VARIANTS, build

BATCH = 8


def _cases():
    for shape in BLOCKS:
        for dtype in DTYPES:
            quick = shape.name in QUICK and dtype == "fp32"
            yield pytest.param(shape, dtype, id=f"{shape.name}-{dtype}", marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("work", ["forward", "train"])
@pytest.mark.parametrize(("shape", "dtype"), _cases())
def test_block(timed, shape: BlockShape, dtype: str, work: str, variant: str):
    torch.manual_seed(0)
    x = torch.randn(BATCH, shape.inplanes, shape.size, shape.size).contiguous(memory_format=torch.channels_last)
    timed(build(shape.build(), variant, work, DTYPES[dtype], x), f"{shape.name} {dtype} {work}", rounds=10)
