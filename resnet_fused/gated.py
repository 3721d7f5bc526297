"""The block without norms, the gate as a module, and the gated block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import functional
from .blocks.fused import BasicBlock, ConvBNAct
from .modules import NotScripted
from .ops.layout import autocast_type


class MNISTBlock(BasicBlock):
    """relu(x + conv5x5(relu(conv3x3(x)))), both convs biased, no norms.

    x: [N, channels, H, W] -> the same shape. Dtypes and errors are those of `resnet_fused.functional.residual_block`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, norm_layer=nn.Identity)
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=5, padding=2)


class GateAct(NotScripted, nn.Module):
    """act((1 - g) x + g f) with g = sigmoid(v), one pass; `relu=False` is without the act.

    v, x, f: [N, C, H, W] -> the same shape. Dtypes and errors are those of `resnet_fused.functional.gate_act`.
    """

    def __init__(self, relu: bool = True) -> None:
        super().__init__()
        self.relu = relu

    def forward(self, v: Tensor, x: Tensor, f: Tensor) -> Tensor:
        return functional.gate_act(v, x, f, self.relu)

    def extra_repr(self) -> str:
        return f"relu={self.relu}"


class GatedBlock(NotScripted, nn.Module):
    """relu((1 - g) x + g F(x)), g = sigmoid(conv1x1(x)), F = conv5x5(relu(conv3x3(x))); all with bias, no norms.

    x: [N, channels, H, W] -> the same shape. Dtypes and errors are those of `resnet_fused.functional.conv_bn_act`.
    Source: Srivastava et al., "Highway Networks" (2015), equation 3.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvBNAct(channels, channels, 3, padding=1, norm=False)
        self.conv2 = ConvBNAct(channels, channels, 5, padding=2, norm=False, relu=False)
        self.gate = ConvBNAct(channels, channels, 1, norm=False, relu=False)
        self.join = GateAct()

    def forward(self, x: Tensor) -> Tensor:
        v, f = self.gate(x), self.conv2(self.conv1(x))
        if torch.is_autocast_enabled(autocast_type(x)):
            x = x.to(f.dtype)
        return self.join(v, x, f)
