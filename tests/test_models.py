"""The networks: torchvision's constructor, parameters and state_dict, and eager PyTorch's numbers."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import check_modules, randomise
from torch import nn

import resnet_fused as rf
from resnet_fused import models, reference
from resnet_fused.models import MNISTBlock, MNISTResNet, ResNet

torchvision_models = pytest.importorskip("torchvision.models")

IMAGENET_NAMES = list(models.TORCHVISION)
SMALL: dict[str, Any] = {"layers": (1, 1, 1, 1), "num_classes": 7}
PAIRS = {
    "basic": (rf.BasicBlock, torchvision_models.resnet.BasicBlock, {}),
    "bottleneck": (rf.Bottleneck, torchvision_models.resnet.Bottleneck, {}),
    "grouped": (rf.Bottleneck, torchvision_models.resnet.Bottleneck, {"groups": 32, "width_per_group": 4}),
    "dilated": (
        rf.Bottleneck,
        torchvision_models.resnet.Bottleneck,
        {"replace_stride_with_dilation": (False, True, True)},
    ),
    "group_norm": (
        rf.BasicBlock,
        torchvision_models.resnet.BasicBlock,
        {"norm_layer": partial(nn.GroupNorm, 4)},
    ),
    "eps": (
        rf.BasicBlock,
        torchvision_models.resnet.BasicBlock,
        {"norm_layer": partial(nn.BatchNorm2d, eps=0.1)},
    ),
}


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """(ours, torchvision's) of one small network."""
    ours, theirs, arguments = PAIRS[name]
    return ResNet(ours, **SMALL, **arguments), torchvision_models.ResNet(theirs, **SMALL, **arguments)


@pytest.mark.parametrize("name", IMAGENET_NAMES)
def test_names_and_parameters_are_torchvisions(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = models.create(name), getattr(torchvision_models, name)()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_children()] == [n for n, _ in theirs.named_children()]
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]


def test_a_seed_draws_torchvisions_weights() -> None:
    torch.manual_seed(3)
    ours = models.resnet18()
    torch.manual_seed(3)
    theirs = torchvision_models.resnet18()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", PAIRS)
def test_agrees_with_torchvision(name: str, training: bool) -> None:
    """In float64, where no ReLU of a whole network flips by rounding."""
    ours, theirs = (model.double().train(training) for model in pair(name))
    check_modules(ours, randomise(theirs), torch.randn(4, 3, 33, 33, dtype=torch.float64))


@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_the_hot_path_is_fused(name: str) -> None:
    rows = rf.explain(pair(name)[0], torch.randn(2, 3, 64, 64)).rows
    assert [row.name for row in rows if row.plan == "eager"] == ["conv1", "fc"]
    assert "bn1" in [row.name for row in rows]


def test_zero_init_residual() -> None:
    for block, last in ((rf.BasicBlock, "bn2"), (rf.Bottleneck, "bn3"), (reference.Bottleneck, "bn3")):
        model = ResNet(block, **SMALL, zero_init_residual=True)
        for name, parameter in model.named_parameters():
            if "layer" in name and "bn" in name and name.endswith("weight"):
                assert bool((parameter == 0).all()) == (last in name), name


def test_a_foreign_norm_keeps_the_stem_apart() -> None:
    model = pair("group_norm")[0]
    assert [type(m) for m in (model.bn1, model.relu, model.maxpool)] == [nn.GroupNorm, nn.ReLU, nn.MaxPool2d]


@pytest.mark.parametrize("entries", [[], [True], [False] * 4])
def test_dilation_needs_three_entries(entries: list[bool]) -> None:
    with pytest.raises(ValueError, match=r"replace_stride_with_dilation .* expected 3 entries"):
        ResNet(rf.Bottleneck, **SMALL, replace_stride_with_dilation=entries)


def test_unknown_model() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'resnet5'; one of resnet18, "):
        models.create("resnet5")


# ---------------------------------------------------------------------------------------- the MNIST network


class PlainMNISTBlock(MNISTBlock):
    """Its definition in plain PyTorch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


class PlainMNISTResNet(MNISTResNet):
    """Its definition in plain PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.block1, self.block2 = PlainMNISTBlock(16), PlainMNISTBlock(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block1(F.max_pool2d(F.relu(self.conv1.conv(x)), 2))
        x = self.block2(F.max_pool2d(F.relu(self.conv2.conv(x)), 2))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


@pytest.mark.parametrize("channels", [1, 3, 16])
def test_mnist_block_agrees_with_its_definition(channels: int) -> None:
    block = MNISTBlock(channels)
    x = torch.randn(2, channels, 9, 7, dtype=torch.float64, requires_grad=True)
    check_modules(block.double(), PlainMNISTBlock(channels).double(), x)


def test_mnist_resnet_agrees_with_its_definition() -> None:
    x = torch.randn(5, 1, 28, 28, dtype=torch.float64)
    check_modules(MNISTResNet().double(), PlainMNISTResNet().double(), x)


def test_mnist_resnet_is_fused_and_has_its_size() -> None:
    model = models.mnist_resnet()
    assert model.fc1.in_features == 800
    assert sum(p.numel() for p in model.parameters()) == 210_882
    rows = rf.explain(model, torch.randn(2, 1, 28, 28)).rows
    assert {row.name: row.plan != "eager" for row in rows} == {
        "conv1": True,
        "block1": True,
        "conv2": True,
        "block2": True,
        "fc1": False,
        "fc2": False,
    }


@pytest.mark.parametrize("shape", [(2, 3, 28, 28), (2, 1, 32, 32), (28, 28)])
def test_mnist_resnet_names_the_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x has shape .*, expected \[N, 1, 28, 28\]"):
        models.mnist_resnet()(torch.zeros(shape))


def test_deepcopy_and_state_dict_round_trip() -> None:
    model = models.mnist_resnet()
    twin = models.mnist_resnet()
    twin.load_state_dict(copy.deepcopy(model).state_dict())
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(model(x), twin(x))
