"""Every block of ResNet-18/50: forward, backward and both, and inference; eager, torch.compile, lean and fast."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.shapes import BLOCKS, QUICK, BlockShape
from benchmarks.suite import BATCH, DEVICE, TYPES, Build, Case, suite
from benchmarks.variants import DTYPES, VARIANTS, build_inference, build_step


def _built(shape: BlockShape) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(BATCH, shape.inplanes, shape.size, shape.size, device=DEVICE)
    return shape.build(), x.contiguous(memory_format=torch.channels_last)


def _training(shape: BlockShape, dtype: str) -> Build:
    block, x = _built(shape)
    return lambda variant: build_step(block, variant, DTYPES[dtype], x.to(DTYPES[dtype]).requires_grad_()).parts


def _inference(shape: BlockShape, dtype: str) -> Build:
    block, x = _built(shape)
    return lambda variant: [build_inference(block, variant, DTYPES[dtype], x)]


def _cases():
    for shape in BLOCKS:
        for dtype in TYPES:
            common = {"batch": BATCH, "size": shape.inplanes * shape.size**2, "rounds": 20, "seconds": 4.0}
            about = {"op": "block", "kind": shape.kind, "stage": shape.stage}
            quick = shape.name in QUICK[:2] and dtype == TYPES[0]
            yield Case(
                shape.name, dtype, ("forward", "backward"), VARIANTS,
                lambda shape=shape, dtype=dtype: _training(shape, dtype), quick=quick, about=about, **common,
            )  # fmt: skip
            yield Case(
                shape.name, dtype, ("inference",), ("eager", "compile", "lean"),
                lambda shape=shape, dtype=dtype: _inference(shape, dtype), counts=False, about=about, **common,
            )  # fmt: skip


CASES = list(_cases())


@suite(CASES)
def test_block(timed):
    timed()
