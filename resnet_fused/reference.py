"""The plain PyTorch of every fused op and block: what "Equivalent to" means, what the tests compare with, and
what runs where no kernel serves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from .functional import ConvBN


def average_factor(num_batches_tracked: Tensor | None, momentum: float | None) -> float | Tensor:
    """Counts a training batch, as nn.BatchNorm2d does, and gives the factor of its running average.

    momentum=None is the cumulative mean: its factor stays on the device, so that no host waits for it.
    """
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if momentum is not None:
        return momentum
    return 0.0 if num_batches_tracked is None else num_batches_tracked.to(torch.float32).reciprocal()


def conv_bn(x: Tensor, unit: ConvBN) -> Tensor:
    """bn(conv(x)): [N, C, H, W] -> [N, K, P, Q]."""
    u = F.conv2d(x, unit.weight, unit.bias, unit.stride, unit.padding, unit.dilation, unit.groups)
    if not unit.has_norm:
        return u
    moves = unit.training and unit.running_mean is not None
    factor = float(average_factor(unit.num_batches_tracked, unit.momentum)) if moves else 0.0
    return F.batch_norm(
        u, unit.running_mean, unit.running_var, unit.gamma, unit.beta, unit.batch_stats, factor, unit.eps
    )


def residual_block(x: Tensor, units: Sequence[ConvBN], shortcut: Any = "identity", relu: bool = True) -> Tensor:
    """The plain form of `functional.residual_block`."""
    y = x
    for unit in units[:-1]:
        y = F.relu(conv_bn(y, unit))
    y = conv_bn(y, units[-1])
    if isinstance(shortcut, Tensor):
        y = y + shortcut
    elif isinstance(shortcut, str):  # "identity"
        y = y + x
    elif shortcut is not None:
        y = y + conv_bn(x, shortcut)
    return F.relu(y) if relu else y


def bn_act_pool(x: Tensor, bn: nn.BatchNorm2d, kernel: int, stride: int, padding: int) -> Tensor:
    """maxpool(relu(bn(x))), the stem's tail."""
    return F.max_pool2d(F.relu(nn.BatchNorm2d.forward(bn, x)), kernel, stride, padding)


def conv3x3(in_planes: int, planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """3x3 convolution that keeps the size at stride 1."""
    return nn.Conv2d(in_planes, planes, 3, stride, dilation, dilation, groups, bias=False)


def conv1x1(in_planes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution."""
    return nn.Conv2d(in_planes, planes, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """relu(bn2(conv3x3(relu(bn1(conv3x3(x))))) + shortcut): names, defaults and state_dict of torchvision's."""

    expansion: int = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Any = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        if groups != 1 or base_width != 64:
            raise ValueError("BasicBlock only supports groups=1 and base_width=64")
        if dilation > 1:
            raise NotImplementedError("Dilation > 1 not supported in BasicBlock")
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 (x4): names, defaults and state_dict of torchvision's."""

    expansion: int = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Any = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


__all__ = ["BasicBlock", "Bottleneck", "bn_act_pool", "conv1x1", "conv3x3", "conv_bn", "residual_block"]
