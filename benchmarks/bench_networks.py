"""ResNet-18 and ResNet-50 at 224: training step and inference; eager, torch.compile, ours, and inference engines."""

from __future__ import annotations

import torch

from benchmarks.suite import DEVICE, ON_GPU, TYPES, Build, Case, suite
from benchmarks.variants import DTYPES, INFERENCE_VARIANTS, VARIANTS, build_inference, build_step, photos_like
from resnet_fused.data import require

SIZE = 224
RUNS = (  # the first two are in the short set
    ("resnet18", 4, "train"), ("resnet18", 4, "inference"),
    ("resnet50", 4, "train"), ("resnet50", 4, "inference"), ("resnet50", 1, "inference"),
    ("resnet50", 16, "train"), ("resnet50", 16, "inference"),
)  # fmt: skip
if ON_GPU:
    RUNS = (
        ("resnet50", 128, "train"), ("resnet50", 128, "inference"), ("resnet50", 256, "train"),
        ("resnet50", 1, "inference"), ("resnet18", 256, "train"), ("resnet18", 256, "inference"),
    )  # fmt: skip


def _make(name: str, batch: int, work: str, dtype: str) -> Build:
    torch.manual_seed(0)
    model = getattr(require("torchvision.models", "the benchmark"), name)()
    x = photos_like(batch, SIZE, DEVICE)
    if work == "train":
        return lambda variant: build_step(model, variant, DTYPES[dtype], x).parts
    return lambda variant: [build_inference(model, variant, DTYPES[dtype], x)]


def _cases():
    for i, (name, batch, work) in enumerate(RUNS):
        train = work == "train"
        for dtype in TYPES:
            yield Case(
                f"{name}-b{batch}", dtype, ("forward", "backward") if train else ("inference",),
                VARIANTS if train else INFERENCE_VARIANTS,
                lambda name=name, batch=batch, work=work, dtype=dtype: _make(name, batch, work, dtype),
                quick=i < 2 and dtype == TYPES[0], batch=batch, size=batch * 3 * SIZE**2, counts=train,
                about={"op": "network", "model": name}, rounds=7, seconds=10.0, warmups=2,
            )  # fmt: skip


CASES = list(_cases())


@suite(CASES)
def test_network(timed):
    timed()
