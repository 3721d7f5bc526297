"""Training steps of a whole small ResNet on the matrix kernels, through `fuse_`, autocast, autograd and an optimizer.

On the emulator, and on a GPU where there is one, next to the CPU path: each by the rule, against float64.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import Observed, assert_agrees, randomise
from device import Device
from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet

import resnet_fused as rf
from resnet_fused.blocks import FusedBlock


class Small(torchvision_resnet.ResNet):
    """Torchvision's ResNet with few channels and two stages."""

    def __init__(self, block: type[nn.Module]) -> None:
        nn.Module.__init__(self)
        self._norm_layer = nn.BatchNorm2d
        self.inplanes, self.dilation, self.groups, self.base_width = 16, 1, 1, 64
        self.conv1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self._make_layer(block, 16, 2)
        self.layer2 = self._make_layer(block, 32, 1, stride=2)
        self.layer3 = self.layer4 = nn.Identity()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(self.inplanes, 5)


def train(model: nn.Module, x: Tensor, classes: Tensor, dtype: torch.dtype, steps: int) -> Observed:
    """What SGD makes of the parameters and buffers, and the losses."""
    model.train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        with torch.autocast(x.device.type, dtype, enabled=x.dtype != torch.float64):
            loss = F.cross_entropy(model(x).to(x.dtype), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    moved = {name: t - before[name] for name, t in model.state_dict().items() if t.is_floating_point()}
    return {"losses": torch.stack(losses), **moved}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
def test_training_steps(block: str, dtype: torch.dtype, device: Device) -> None:
    draws = []
    for seed in range(8):  # a ReLU's sign that flips by rounding is chance
        torch.manual_seed(seed)
        eager = randomise(Small(getattr(torchvision_resnet, block)))
        fused = copy.deepcopy(eager)
        report = rf.fuse_(fused)
        assert not [row for row in report.rows if not row.fused]
        assert sum(isinstance(m, FusedBlock) for m in fused.modules()) == 3
        x, classes = torch.randn(8, 3, 16, 16), torch.randint(5, (8,))
        exact = copy.deepcopy(eager).double()
        got = device.run(train, fused, x, classes, dtype, 1, seed=seed)
        draws.append((got, train(eager, x, classes, dtype, 1), train(exact, x.double(), classes, dtype, 1)))
    if device.name == "emulated":
        families = {symbol.split("_bf16")[0].split("_f16")[0] for symbol in device.symbols}
        wanted = {"conv2d_few_fprop_4x2", "conv2d_fprop", "conv2d_fprop_strided", "conv2d_wgrad_backward_affine"}
        assert families >= wanted | {"conv2d_dgrad_gate", "bn_act_pool"}, families
    assert_agrees(draws, dtype)


@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
def test_the_loss_goes_down(block: str, device: Device) -> None:
    torch.manual_seed(0)
    model = Small(getattr(torchvision_resnet, block))
    rf.fuse_(model)
    x, classes = torch.randn(8, 3, 16, 16), torch.randint(5, (8,))
    losses = device.run(train, model, x, classes, torch.bfloat16, 4)["losses"]
    assert losses.isfinite().all()
    assert losses[-1] < losses[0]
