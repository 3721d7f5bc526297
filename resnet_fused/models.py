"""The networks: ResNets of torchvision's constructor, module names and state_dict, and the registry of all networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import reference
from .blocks import BasicBlock, BlockOptions, Bottleneck, ConvBNAct, FusedStem, GatedBlock, MNISTBlock
from .cifar import (
    CifarResNet,
    cifar_plain20,
    cifar_plain32,
    cifar_plain44,
    cifar_plain56,
    cifar_plain110,
    cifar_resnet20,
    cifar_resnet32,
    cifar_resnet44,
    cifar_resnet56,
    cifar_resnet110,
    cifar_resnet1202,
    cifar_stem_resnet18,
    cifar_stem_resnet34,
    cifar_stem_resnet50,
)
from .preact_resnet import (
    CifarPreActResNet,
    PreActResNet,
    preact_resnet18,
    preact_resnet50,
    preact_resnet110,
    preact_resnet164,
)
from .stages import init_he, stage, zero_last_norms

Block = type[reference.BasicBlock] | type[reference.Bottleneck]  # the fused blocks inherit from these


class ResNet(FusedStem):
    """ResNet for images x: [N, 3, H, W], returning logits [N, num_classes] of x's dtype, which is the parameters'.

    Arguments as `torchvision.models.ResNet`; `block` is a class with torchvision's block signature
    and an `expansion`. With batch norm (the default) `bn1`, `relu` and `maxpool` run in one pass. Further
    keywords are those of `BlockOptions`, e.g. shortcut="A", stride_on="conv1", placement="relu_preact".

    Raises ValueError if `layers` has not four entries or `replace_stride_with_dilation` three, if `zero_init_residual`
    would make the blocks zero, and for a placement "full_preact", whose networks end in a norm: `PreActResNet`;
    RuntimeError for x of other channels or dtype than conv1's.
    """

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(
        self,
        block: Block,
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        dilate = replace_stride_with_dilation
        if dilate is None:
            dilate = (False, False, False)
        if len(dilate) != 3:
            raise ValueError(f"replace_stride_with_dilation is {dilate!r}, expected 3 entries (stages 2 to 4)")
        if len(layers) != 4:
            raise ValueError(f"layers is {layers!r}, expected 4 entries, one a stage")
        norm = norm_layer or nn.BatchNorm2d
        self.options = BlockOptions(block, norm=norm, groups=groups, base_width=width_per_group, **options)
        if self.options.placement == "full_preact":
            raise ValueError("placement is 'full_preact', whose networks are PreActResNet and CifarPreActResNet")

        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        inplanes, dilation = 64, 1
        for i, (blocks, dilated) in enumerate(zip(layers, (False, *dilate), strict=True)):
            stride, before = 1 if i == 0 else 2, dilation
            if dilated:
                stride, dilation = 1, dilation * stride
            made, inplanes = stage(self.options, inplanes, 64 * 2**i, blocks, stride, (before, dilation))
            setattr(self, f"layer{i + 1}", made)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inplanes, num_classes)
        init_he(self)
        if zero_init_residual:
            zero_last_norms(self, self.options)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18(**kwargs) -> ResNet:
    """ResNet-18 (11.7 M parameters); keywords as `ResNet`."""
    return ResNet(BasicBlock, (2, 2, 2, 2), **kwargs)


def resnet34(**kwargs) -> ResNet:
    """ResNet-34 (21.8 M parameters); keywords as `ResNet`."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **kwargs)


def resnet50(**kwargs) -> ResNet:
    """ResNet-50 v1.5 (25.6 M parameters); keywords as `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **kwargs)


def resnet101(**kwargs) -> ResNet:
    """ResNet-101 v1.5 (44.5 M parameters); keywords as `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **kwargs)


def resnet152(**kwargs) -> ResNet:
    """ResNet-152 v1.5 (60.2 M parameters); keywords as `ResNet`."""
    return ResNet(Bottleneck, (3, 8, 36, 3), **kwargs)


def resnext50_32x4d(**kwargs) -> ResNet:
    """ResNeXt-50, 32 groups of 4 channels (25.0 M parameters); keywords as `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **{"groups": 32, "width_per_group": 4, **kwargs})


def wide_resnet50_2(**kwargs) -> ResNet:
    """Wide ResNet-50-2, 3x3 convs twice as wide (68.9 M parameters); keywords as `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **{"width_per_group": 128, **kwargs})


def plain18(**kwargs) -> ResNet:
    """The plain network of 18 layers, ResNet-18 without shortcuts (11.5 M parameters); keywords as `ResNet`."""
    return ResNet(BasicBlock, (2, 2, 2, 2), shortcut="none", **kwargs)


def plain34(**kwargs) -> ResNet:
    """The plain network of 34 layers, ResNet-34 without shortcuts (21.6 M parameters); keywords as `ResNet`."""
    return ResNet(BasicBlock, (3, 4, 6, 3), shortcut="none", **kwargs)


class MNISTResNet(nn.Module):
    """A small ResNet without norms for digits x: [N, 1, 28, 28] of the parameters' dtype, returning logits [N, 10].

    Sizes: 28 -conv5-> 24 -pool-> 12 -block, conv3-> 10 -pool-> 5 -block-> 32 x 5 x 5 = 800 features. Its
    keywords are those of `BlockOptions` for its two blocks, e.g. gate=True.
    Raises ValueError for an input of another shape.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = BlockOptions("mnist", **options)
        self.conv1 = ConvBNAct(1, 16, kernel_size=5, norm=False)
        self.block1 = self.options.build(16, 16)
        self.conv2 = ConvBNAct(16, 32, kernel_size=3, norm=False)
        self.block2 = self.options.build(32, 32)
        self.fc1 = nn.Linear(32 * 5 * 5, 200)
        self.fc2 = nn.Linear(200, 10)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1:] != (1, 28, 28):
            raise ValueError(f"MNISTResNet: x has shape {list(x.shape)}, expected [N, 1, 28, 28]")
        x = self.block1(F.max_pool2d(self.conv1(x), 2))  # [N, 16, 12, 12]
        x = self.block2(F.max_pool2d(self.conv2(x), 2))  # [N, 32, 5, 5]
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


def mnist_resnet(**kwargs) -> MNISTResNet:
    """`MNISTResNet` (210,882 parameters), [N, 1, 28, 28] -> [N, 10]; keywords as `MNISTResNet`."""
    return MNISTResNet(**kwargs)


def mnist_gated_resnet(**kwargs) -> MNISTResNet:
    """`MNISTResNet` of gated blocks (212,210 parameters)."""
    return MNISTResNet(gate=True, **kwargs)


def _named(*factories: Callable[..., nn.Module]) -> dict[str, Callable[..., nn.Module]]:
    return {factory.__name__: factory for factory in factories}


TORCHVISION = _named(resnet18, resnet34, resnet50, resnet101, resnet152, resnext50_32x4d, wide_resnet50_2)
MODELS: dict[str, Callable[..., nn.Module]] = TORCHVISION | _named(
    plain18, plain34, preact_resnet18, preact_resnet50,
    cifar_resnet20, cifar_resnet32, cifar_resnet44, cifar_resnet56, cifar_resnet110, cifar_resnet1202,
    cifar_plain20, cifar_plain32, cifar_plain44, cifar_plain56, cifar_plain110,
    cifar_stem_resnet18, cifar_stem_resnet34, cifar_stem_resnet50, preact_resnet110, preact_resnet164,
    mnist_resnet, mnist_gated_resnet,
)  # fmt: skip


def create(name: str, **kwargs) -> nn.Module:
    """The network called `name`, one of `MODELS`, with its constructor's keywords. Raises ValueError for any other."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; one of {', '.join(MODELS)}")
    return MODELS[name](**kwargs)


def image_shape(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) of the images [N, C, H, W] that a network is for.

    model: one of `MODELS`, or any whose first convolution is theirs: 7x7 for ImageNet, of one channel for MNIST.
    """
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    if first.in_channels == 1:
        return 1, 28, 28  # MNIST
    return (3, 224, 224) if first.kernel_size == (7, 7) else (3, 32, 32)  # ImageNet, CIFAR


__all__ = [
    "MODELS",
    "TORCHVISION",
    "CifarPreActResNet",
    "CifarResNet",
    "GatedBlock",
    "MNISTBlock",
    "MNISTResNet",
    "PreActResNet",
    "ResNet",
    "create",
    "image_shape",
    *MODELS,
]
