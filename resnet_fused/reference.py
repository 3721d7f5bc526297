"""The plain PyTorch of every fused op and block: what "Equivalent to" means, what the tests compare with, and
what runs where no kernel serves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops.layout import Padded, acc_dtype, pixels_of
from .ops.sync import Group, SumOverGroup

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
    """bn(conv(x)), x: [N, C, H, W] -> [N, K, P, Q]; without the bn if the `unit` has none."""
    u = F.conv2d(x, unit.weight, unit.bias, unit.stride, unit.padding, unit.dilation, unit.groups)
    return norm(u, unit) if unit.has_norm else u


def norm(u: Tensor, unit: ConvBN) -> Tensor:
    """The batch norm of `unit` for u: [N, K, P, Q] -> the same; moves the running statistics of a training one."""
    moves = unit.training and unit.running_mean is not None
    factor = float(average_factor(unit.num_batches_tracked, unit.momentum)) if moves else 0.0
    if unit.shared is not None:
        running = (unit.running_mean, unit.running_var)
        return sync_batch_norm(u, unit.shared, *running, unit.gamma, unit.beta, factor, unit.eps)
    return F.batch_norm(
        u, unit.running_mean, unit.running_var, unit.gamma, unit.beta, unit.batch_stats, factor, unit.eps
    )


def sync_batch_norm(
    u: Tensor,
    group: Group,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    factor: float,
    eps: float,
) -> Tensor:
    """F.batch_norm in training, of the batches of all processes of `group` as one: [N, K, P, Q] -> [N, K, P, Q].

    u: [N, K, P, Q], whose N may differ between processes. gamma, beta: [K] or None. running_mean, running_var: [K],
    moved in place by `factor`, or None. eps: F.batch_norm's.
    """
    wide = u.to(acc_dtype(u.dtype))
    over, per_channel = (0, 2, 3), (1, -1, 1, 1)
    pixels = wide.new_full((1,), pixels_of(u))
    total, pixels = SumOverGroup.apply(torch.cat([wide.sum(over), pixels]), group).split([u.shape[1], 1])
    centred = wide - (total / pixels).view(per_channel)
    var = SumOverGroup.apply(centred.square().sum(over), group) / pixels
    with torch.no_grad():
        for running, batch in ((running_mean, total / pixels), (running_var, var * pixels / (pixels - 1))):
            if running is not None:
                running.copy_(torch.lerp(running.to(batch.dtype), batch, factor))
    y = centred * torch.rsqrt(var + eps).view(per_channel)
    y = y if gamma is None else y * gamma.view(per_channel)
    return (y if beta is None else y + beta.view(per_channel)).to(u.dtype)


def residual_block(
    x: Tensor,
    units: Sequence[ConvBN],
    shortcut: Any = "identity",
    relu: bool = True,
    branch_scale: float = 1.0,
    shortcut_scale: float = 1.0,
) -> Tensor:
    """The plain form of `resnet_fused.functional.residual_block`: x: [N, C, H, W] -> [N, K, P, Q].

    units, shortcut, relu, branch_scale, shortcut_scale: as there. Errors are eager PyTorch's.
    """
    y = x
    for unit in units[:-1]:
        y = F.relu(conv_bn(y, unit))
    y = scaled(conv_bn(y, units[-1]), branch_scale)
    if isinstance(shortcut, str) and shortcut == "concat":
        return torch.cat([scaled(x, shortcut_scale), F.relu(y) if relu else y], 1)
    if isinstance(shortcut, Tensor):
        y = y + scaled(shortcut, shortcut_scale)
    elif isinstance(shortcut, str):  # "identity"
        y = y + scaled(x, shortcut_scale)
    elif isinstance(shortcut, Padded):
        y = y + scaled(shortcut(x, y.shape[1]), shortcut_scale)
    elif shortcut is not None:
        y = y + scaled(conv_bn(x, shortcut), shortcut_scale)
    return F.relu(y) if relu else y


def preact_block(x: Tensor, units: Sequence[ConvBN], projection: ConvBN | Padded | None = None) -> Tensor:
    """The plain form of `resnet_fused.functional.preact_block`: x: [N, C, H, W] -> [N, K, P, Q].

    units, projection: as there. Errors are eager PyTorch's.
    """
    y, shortcut = x, x
    if isinstance(projection, Padded):
        shortcut, projection = projection(x, units[-1].weight.shape[0]), None
    for i, unit in enumerate(units):
        y = F.relu(norm(y, unit))
        if i == 0 and projection is not None:
            shortcut = conv_bn(y, projection)
        y = F.conv2d(y, unit.weight, unit.bias, unit.stride, unit.padding, unit.dilation, unit.groups)
    return y + shortcut


def gate_act(v: Tensor, x: Tensor, f: Tensor, relu: bool = True) -> Tensor:
    """act((1 - g) x + g f) with g = sigmoid(v), relu or nothing as act; v, x, f: [N, C, H, W] -> the same shape."""
    g = torch.sigmoid(v)
    y = (1 - g) * x + g * f
    return F.relu(y) if relu else y


def scaled(x: Tensor, by: float) -> Tensor:
    """x * by; x itself where that is 1."""
    return x if by == 1 else x * by


def bn_act_pool(x: Tensor, bn: nn.BatchNorm2d, kernel: int, stride: int, padding: int) -> Tensor:
    """maxpool(relu(bn(x))), the stem's tail, with a square pool of `kernel`, `stride` and `padding`.

    x: [N, C, H, W] -> [N, C, P, Q], the pooled size.
    """
    return F.max_pool2d(F.relu(nn.BatchNorm2d.forward(bn, x)), kernel, stride, padding)


def conv3x3(in_planes: int, planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """3x3 convolution, no bias: [N, in_planes, H, W] -> [N, planes, ceil(H/stride), ceil(W/stride)].

    groups, dilation: as nn.Conv2d's; the padding is the dilation.
    """
    return nn.Conv2d(in_planes, planes, 3, stride, dilation, dilation, groups, bias=False)


def conv1x1(in_planes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution, no bias: [N, in_planes, H, W] -> [N, planes, ceil(H/stride), ceil(W/stride)]."""
    return nn.Conv2d(in_planes, planes, 1, stride, bias=False)


class PaddedShortcut(nn.Module):
    """The shortcut without parameters ("option A"): every stride-th pixel, channels of zeros around x's.

    `before` of the zero channels come in front, by default none. x: [N, in_channels, H, W] of any dtype; returns
    [N, out_channels, ceil(H/stride), ceil(W/stride)]. Raises ValueError for a `stride` or `before` that does not fit.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, before: int = 0) -> None:
        super().__init__()
        if stride < 1:
            raise ValueError(f"stride is {stride}, expected at least 1")
        if not 0 <= before <= out_channels - in_channels:
            raise ValueError(
                f"before is {before}, expected 0 to {out_channels - in_channels} (out_channels - in_channels)"
            )
        self.padded = Padded(stride, before)
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> Tensor:
        return self.padded(x, self.out_channels)

    def extra_repr(self) -> str:
        return f"out_channels={self.out_channels}, stride={self.padded.stride}, before={self.padded.before}"


PLACEMENTS = ("original", "bn_after_add", "relu_before_add", "relu_preact", "full_preact")


class ResidualBlock(nn.Module):
    """What BasicBlock and Bottleneck have in common: the forward, and where it may be told to differ.

    `placement` is of He et al. 2016, figure 4; full pre-activation has classes of its own. With F the chain of
    convolutions, each with its norm behind it and a ReLU between two:

        original          relu(F(x) + shortcut)
        bn_after_add      relu(bn(F(x) + shortcut)), F without its last norm
        relu_before_add   relu(F(x)) + shortcut
        relu_preact       F(relu(x)) + shortcut; a projection takes relu(x), any other shortcut x

    x: [N, C, H, W] -> [N, K, P, Q].
    """

    expansion: int
    branch_scale: float = 1.0  # of the two terms of the sum
    shortcut_scale: float = 1.0
    placement: str = "original"
    has_shortcut: bool = True  # without one the block is plain: relu(F(x))
    relu: nn.Module
    downsample: nn.Module | None

    def forward(self, x: Tensor) -> Tensor:
        own = [getattr(self, f"{kind}{i}") for i in (1, 2, 3) if hasattr(self, f"conv{i}") for kind in ("conv", "bn")]
        *inner, conv, bn = own
        start = torch.relu(x) if self.placement == "relu_preact" else x
        out = start
        for inner_conv, inner_bn in zip(inner[::2], inner[1::2], strict=True):
            out = self.relu(inner_bn(inner_conv(out)))
        out = conv(out)
        if self.placement != "bn_after_add":
            out = bn(out)
        if self.placement == "relu_before_add":
            out = self.relu(out)
        out = scaled(out, self.branch_scale)
        if self.has_shortcut:
            shortcut = scaled(self._shortcut(x, start), self.shortcut_scale)
            kept = self.placement == "relu_before_add"  # backward of that ReLU needs its result
            out = out + shortcut.to(out.dtype) if kept else out.add_(shortcut)
        if self.placement == "bn_after_add":
            out = bn(out)
        return out if self.placement in ("relu_before_add", "relu_preact") else self.relu(out)

    def _shortcut(self, x: Tensor, start: Tensor) -> Tensor:
        if self.downsample is None:
            return x
        return self.downsample(x if isinstance(self.downsample, PaddedShortcut) else start)

    def extra_repr(self) -> str:
        names = ("branch_scale", "shortcut_scale", "placement", "has_shortcut")
        return ", ".join(f"{n}={getattr(self, n)!r}" for n in names if getattr(self, n) != getattr(ResidualBlock, n))


class BasicBlock(ResidualBlock):
    """relu(bn2(conv3x3(relu(bn1(conv3x3(x))))) + shortcut): names, defaults and state_dict of torchvision's.

    Arguments as `torchvision.models.resnet.BasicBlock`. x: [N, inplanes, H, W] -> [N, planes, P, Q]. Raises ValueError
    for groups or another base_width, NotImplementedError for a dilation.
    """

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


class Bottleneck(ResidualBlock):
    """1x1, 3x3 (with the stride), 1x1 (x4): names, defaults and state_dict of torchvision's.

    Arguments as `torchvision.models.resnet.Bottleneck`. x: [N, inplanes, H, W] -> [N, 4*planes, P, Q].
    """

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


class ConcatBasicBlock(BasicBlock):
    """[x | relu(bn2(conv3x3(relu(bn1(conv3x3(x))))))] along the channels: the concatenation connection.

    x: [N, inplanes, H, W] -> [N, inplanes + planes, H, W]. norm_layer: as `BasicBlock`'s.
    """

    def __init__(self, inplanes: int, planes: int, norm_layer: Any = None) -> None:
        super().__init__(inplanes, planes, norm_layer=norm_layer)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return torch.cat([x, self.relu(self.bn2(self.conv2(out)))], 1)


class ConcatBottleneck(Bottleneck):
    """[x | relu(bn3(conv1x1(relu(bn2(conv3x3(relu(bn1(conv1x1(x)))))))))] along the channels.

    x: [N, inplanes, H, W] -> [N, inplanes + 4*planes, H, W]. groups, base_width, norm_layer: as `Bottleneck`'s.
    """

    def __init__(
        self, inplanes: int, planes: int, groups: int = 1, base_width: int = 64, norm_layer: Any = None
    ) -> None:
        super().__init__(inplanes, planes, groups=groups, base_width=base_width, norm_layer=norm_layer)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return torch.cat([x, self.relu(self.bn3(self.conv3(out)))], 1)


__all__ = [
    "PLACEMENTS",
    "BasicBlock",
    "Bottleneck",
    "ConcatBasicBlock",
    "ConcatBottleneck",
    "PaddedShortcut",
    "ResidualBlock",
    "bn_act_pool",
    "conv1x1",
    "conv3x3",
    "conv_bn",
    "gate_act",
    "norm",
    "preact_block",
    "residual_block",
    "sync_batch_norm",
]
