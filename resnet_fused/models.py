"""ResNets built from the fused blocks; constructor, module names and state_dict are torchvision's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import reference
from .blocks import BasicBlock, Bottleneck, ConvBNAct, FusedStem

Block = type[reference.BasicBlock] | type[reference.Bottleneck]  # the fused blocks inherit from these


class ResNet(FusedStem):
    """ResNet for images x: [N, 3, H, W], returning logits [N, num_classes] of x's dtype, which is the parameters'.

    Arguments as `torchvision.models.ResNet`; `block` is a class with torchvision's block signature
    and an `expansion`. With batch norm (the default) `bn1`, `relu` and `maxpool` run in one pass.

    Raises ValueError if `replace_stride_with_dilation` has not three entries, RuntimeError for x of other channels or
    dtype than conv1's.
    """

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
    ) -> None:
        super().__init__()
        dilate = replace_stride_with_dilation
        if dilate is None:
            dilate = (False, False, False)
        if len(dilate) != 3:
            raise ValueError(f"replace_stride_with_dilation is {dilate!r}, expected 3 entries (stages 2 to 4)")
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes = 64
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group

        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], 2, dilate[0])
        self.layer3 = self._make_layer(block, 256, layers[2], 2, dilate[1])
        self.layer4 = self._make_layer(block, 512, layers[3], 2, dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        _init_he(self)
        if zero_init_residual:
            _zero_last_norms(self)

    def _make_layer(
        self, block: Block, planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        """One stage: only its first block strides (or, with `dilate`, dilates) and projects."""
        first_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        outplanes = planes * block.expansion
        downsample = None
        if stride != 1 or self.inplanes != outplanes:
            conv = nn.Conv2d(self.inplanes, outplanes, kernel_size=1, stride=stride, bias=False)
            downsample = nn.Sequential(conv, self._norm_layer(outplanes))

        shared = (self.groups, self.base_width)
        first = block(self.inplanes, planes, stride, downsample, *shared, first_dilation, self._norm_layer)
        self.inplanes = outplanes
        rest = (block(outplanes, planes, 1, None, *shared, self.dilation, self._norm_layer) for _ in range(1, blocks))
        return nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _init_he(model: nn.Module) -> None:
    """He et al. 2015, fan-out mode: the draws come in torchvision's order, so a seed gives its weights."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm) and module.weight is not None:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def _zero_last_norms(model: nn.Module) -> None:
    """Each block starts as an identity (Goyal et al. 2017)."""
    for module in model.modules():
        if isinstance(module, reference.BasicBlock | reference.Bottleneck):
            last = module.bn2 if isinstance(module, reference.BasicBlock) else module.bn3
            if last.weight is not None:
                nn.init.zeros_(last.weight)


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


class MNISTBlock(BasicBlock):
    """relu(x + conv5x5(relu(conv3x3(x)))), both convs biased, no norms.

    x: [N, channels, H, W] -> the same shape. Dtypes and errors are those of `resnet_fused.functional.residual_block`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, norm_layer=nn.Identity)
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=5, padding=2)


class MNISTResNet(nn.Module):
    """A small ResNet without norms for digits x: [N, 1, 28, 28] of the parameters' dtype, returning logits [N, 10].

    Sizes: 28 -conv5-> 24 -pool-> 12 -block, conv3-> 10 -pool-> 5 -block-> 32 x 5 x 5 = 800 features.
    Raises ValueError for an input of another shape.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = ConvBNAct(1, 16, kernel_size=5, norm=False)
        self.block1 = MNISTBlock(16)
        self.conv2 = ConvBNAct(16, 32, kernel_size=3, norm=False)
        self.block2 = MNISTBlock(32)
        self.fc1 = nn.Linear(32 * 5 * 5, 200)
        self.fc2 = nn.Linear(200, 10)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1:] != (1, 28, 28):
            raise ValueError(f"MNISTResNet: x has shape {list(x.shape)}, expected [N, 1, 28, 28]")
        x = self.block1(F.max_pool2d(self.conv1(x), 2))  # [N, 16, 12, 12]
        x = self.block2(F.max_pool2d(self.conv2(x), 2))  # [N, 32, 5, 5]
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


def mnist_resnet() -> MNISTResNet:
    """`MNISTResNet` (210,882 parameters), [N, 1, 28, 28] -> [N, 10]."""
    return MNISTResNet()


MODELS: dict[str, Callable[..., nn.Module]] = {
    factory.__name__: factory
    for factory in (
        resnet18,
        resnet34,
        resnet50,
        resnet101,
        resnet152,
        resnext50_32x4d,
        wide_resnet50_2,
        mnist_resnet,
    )
}


def create(name: str, **kwargs) -> nn.Module:
    """The network called `name`, one of `MODELS`, with its constructor's keywords. Raises ValueError for any other."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; one of {', '.join(MODELS)}")
    return MODELS[name](**kwargs)
