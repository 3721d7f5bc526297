"""ResNet-18 and ResNet-50 at 224: training step and inference; eager, torch.compile, ours."""

from __future__ import annotations

import pytest
import torch

from benchmarks.variants import DTYPES, INFERENCE_VARIANTS, VARIANTS, build, photos_like
from resnet_fused.data import require


def _cases():
    for name, batch, work in (
        ("resnet18", 4, "train"),
        ("resnet18", 4, "inference"),
        ("resnet50", 4, "inference"),
        ("resnet50", 4, "train"),
        ("resnet50", 16, "train"),
        ("resnet50", 16, "inference"),
        ("resnet50", 1, "inference"),
    ):
        for dtype in DTYPES:
            quick = batch == 4 and dtype == "fp32"
            marks = [] if quick else [pytest.mark.slow]
            for variant in VARIANTS if work == "train" else INFERENCE_VARIANTS:
                case = f"{name}-b{batch}-{work}-{dtype}-{variant}"
                yield pytest.param(name, batch, work, dtype, variant, id=case, marks=marks)


@pytest.mark.parametrize(("name", "batch", "work", "dtype", "variant"), _cases())
def test_network(timed, name: str, batch: int, work: str, dtype: str, variant: str):
    models = require("torchvision.models", "the benchmark")
    torch.manual_seed(0)
    model = getattr(models, name)()
    timed(
        build(model, variant, work, DTYPES[dtype], photos_like(batch, 224)),
        f"{name} b{batch} {work} {dtype}",
        3,
    )
