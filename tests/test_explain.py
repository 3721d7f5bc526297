"""`explain` tells what ran, by which plan, and counts bytes as the published tables do."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision import models

import resnet_fused as rf
from resnet_fused.measure import saved_bytes
from resnet_fused.recorder import recording
from resnet_fused.traffic import block_bytes

IMAGE = torch.zeros(2, 3, 64, 64)


def rows_of(model: nn.Module, x: torch.Tensor = IMAGE):
    return {row.name: row for row in rf.explain(model, x).rows}


def test_a_fused_resnet():
    model = models.resnet50()
    rf.fuse_(model)
    rows = rows_of(model)
    assert rows["conv1"].plan == "eager"
    assert rows["bn1"].plan == "fused"
    assert rows["fc"].plan == "eager"
    blocks = [row for name, row in rows.items() if name.startswith("layer")]
    assert len(blocks) == 16
    assert all(row.plan.startswith("aten: ") and row.reason for row in blocks)
    assert all(row.saved < row.saved_eager for row in blocks)


def test_modes_and_reasons():
    x = torch.randn(2, 256, 56, 56)
    block = rf.Bottleneck(256, 64)
    assert rows_of(block, x)["model"].plan == "aten: gram"
    block.memory = "fast"
    assert rows_of(block, x)["model"].plan == "aten: keep"
    assert "fast" in rows_of(block, x)["model"].reason
    block.bn3.eval()
    block.memory = "lean"
    assert rows_of(block, x)["model"].plan == "aten: recompute"
    block.conv2.register_forward_hook(lambda *args: None)
    assert rows_of(block, x)["model"].plan == "eager"
    assert "hook" in rows_of(block, x)["model"].reason


def test_nothing_is_changed():
    model = models.resnet18()
    rf.fuse_(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    rf.explain(model, torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.training


def test_eager_counts_of_the_identity_bottleneck():
    """By passes over A = bytes of the narrow activation: 54A forward, 84A backward, 16A kept."""
    block = rf.Bottleneck(256, 64)
    with recording() as calls:
        block(torch.randn(2, 256, 56, 56))
    narrow = 2 * 64 * 56 * 56 * 4
    eager, ours = block_bytes(calls[0])
    assert (eager.forward, eager.backward, eager.saved) == (54 * narrow, 84 * narrow, 16 * narrow)
    assert ours.saved == pytest.approx(6.125 * narrow)
    assert ours.moved < 0.6 * eager.moved


def test_eager_counts_of_the_basic_block():
    """17A forward, 27A backward."""
    block = rf.BasicBlock(64, 64)
    with recording() as calls:
        block(torch.randn(2, 64, 56, 56))
    size = 2 * 64 * 56 * 56 * 4
    eager, ours = block_bytes(calls[0])
    assert (eager.forward, eager.backward, eager.saved) == (17 * size, 27 * size, 5 * size)
    assert ours.saved == pytest.approx((3 + 1 / 32) * size)


@pytest.mark.parametrize("memory", ["lean", "fast"])
@pytest.mark.parametrize("stride", [1, 2])
def test_kept_bytes_are_what_autograd_keeps(memory, stride):
    """The counted bytes against the storages that autograd really holds (small Gram matrices and vectors apart)."""
    down = nn.Sequential(nn.Conv2d(64, 128, 1, stride, bias=False), nn.BatchNorm2d(128))
    block = rf.Bottleneck(64, 32, stride, down)
    block.memory = memory
    x = torch.randn(4, 64, 56, 56).to(memory_format=torch.channels_last)
    with recording() as calls:
        large = saved_bytes(lambda: block(x), block.parameters(), least=64 * 64 * 4 + 1)
    assert large == block_bytes(calls[0])[1].saved


def test_printed_table():
    model = models.resnet18()
    rf.fuse_(model)
    text = str(rf.explain(model, IMAGE))
    assert text.splitlines()[0].startswith("unit")
    assert text.splitlines()[-1].startswith("total")
    assert "layer4.1" in text


def test_bad_argument():
    with pytest.raises(TypeError, match="model is a str"):
        rf.explain("resnet50", IMAGE)


def test_a_hook_on_the_stem_is_told():
    model = models.resnet18()
    rf.fuse_(model)
    model.relu.register_forward_hook(lambda *args: None)
    row = rows_of(model)["bn1"]
    assert (row.plan, row.reason) == ("eager", "relu has a forward hook")
    assert "stem" not in vars(model)
