"""What a block keeps for backward, as a share of what torchvision's keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import resnet as tv

import resnet_fused as rf
from resnet_fused.measure import saved_bytes


def kept_bytes(block: nn.Module, x: torch.Tensor) -> int:
    """Kept by one training forward; the input counts, the model's state does not."""
    return saved_bytes(lambda: block(x), (*block.parameters(), *block.buffers()))


def share(name: str, arguments: tuple[int, int], memory: str, **options) -> float:
    x = torch.randn(2, arguments[0], 56, 56).to(memory_format=torch.channels_last).requires_grad_()
    sizes = []
    for source in (rf, tv):
        block = getattr(source, name)(*arguments, **options).to(memory_format=torch.channels_last)
        block.memory = memory
        sizes.append(kept_bytes(block, x))
    return sizes[0] / sizes[1]


@pytest.mark.parametrize(
    ("name", "arguments", "memory", "most"),
    [
        ("Bottleneck", (256, 64), "lean", 0.42),
        ("Bottleneck", (256, 64), "fast", 0.70),
        ("BasicBlock", (64, 64), "lean", 0.65),
    ],
)
def test_share_of_eager(name, arguments, memory, most) -> None:
    assert share(name, arguments, memory) <= most


def test_projection_is_not_kept_either() -> None:
    """At stride 2 torchvision keeps the projection's raw output; lean keeps the Gram matrix of its operand."""
    options = {"stride": 2}
    shares = []
    for memory in ("lean", "fast"):
        downsample = nn.Sequential(nn.Conv2d(256, 512, 1, 2, bias=False), nn.BatchNorm2d(512))
        shares.append(share("Bottleneck", (256, 128), memory, downsample=downsample, **options))
    assert shares[0] < 0.55
    assert shares[0] < shares[1] < 1


@pytest.mark.parametrize("name", ["BasicBlock", "Bottleneck"])
def test_nothing_is_kept_without_gradients(name) -> None:
    kept = []
    block = getattr(rf, name)(16 * getattr(rf, name).expansion, 16)
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        block(torch.randn(2, 16 * block.expansion, 8, 8))
    assert not kept


def test_whole_resnet50() -> None:
    """Batch 8 at 224 in fp32: eager keeps 656 MiB."""
    x = torch.randn(8, 3, 224, 224).to(memory_format=torch.channels_last)
    eager = tv.resnet50().to(memory_format=torch.channels_last)
    fused = tv.resnet50().to(memory_format=torch.channels_last)
    assert not rf.fuse_(fused, memory="lean").composed
    assert kept_bytes(fused, x) <= 0.50 * kept_bytes(eager, x)
