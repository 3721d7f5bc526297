"""Every block of the catalogue in plain PyTorch, from its definition: what the tests compare the fused ones with."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from conftest import Observed, observe_module
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused import blocks


def forward(module: Any, x: Tensor) -> Tensor:
    """What `module` is defined to compute, by modules of PyTorch's alone."""
    if isinstance(module, blocks.PreActBlock):
        return preact(module, x)
    if isinstance(module, rf.ConcatBasicBlock | rf.ConcatBottleneck):
        return torch.cat([x, F.relu(branch(module, x))], 1)
    if isinstance(module, blocks.FusedBlock):
        return residual(module, x)
    if isinstance(module, blocks.GatedBlock):
        gate = torch.sigmoid(module.gate.conv(x))
        f = module.conv2.conv(F.relu(module.conv1.conv(x)))
        return F.relu((1 - gate) * x + gate * f)
    if isinstance(module, blocks.Connect):
        return connected(module, x)
    if isinstance(module, rf.ConvBNAct):
        y = module.bn(module.conv(x))
        return F.relu(y) if module.relu else y
    if isinstance(module, blocks.BNReLU):
        return F.relu(module.bn(x))
    if isinstance(module, nn.Sequential):
        for inner in module:
            x = forward(inner, x)
        return x
    raise TypeError(f"no definition of {type(module).__name__}")


def branch(block: Any, x: Tensor, last_norm: bool = True) -> Tensor:
    """conv, norm, ReLU, conv, norm (, ReLU, conv, norm)."""
    count = 3 if hasattr(block, "conv3") else 2
    for i in range(1, count + 1):
        x = getattr(block, f"conv{i}")(x)
        if i < count:
            x = F.relu(getattr(block, f"bn{i}")(x))
        elif last_norm:
            x = getattr(block, f"bn{i}")(x)
    return x


def padded(x: Tensor, channels: int, stride: int) -> Tensor:
    n, c, h, w = x.shape
    y = x.new_zeros(n, channels, (h + stride - 1) // stride, (w + stride - 1) // stride)
    y[:, :c] = x[:, :, ::stride, ::stride]
    return y


def shortcut(block: Any, x: Tensor, activated: Tensor) -> Tensor:
    down = block.downsample
    if down is None:
        return x
    if isinstance(down, rf.PaddedShortcut):
        return padded(x, down.out_channels, down.padded.stride)
    if isinstance(down, nn.Conv2d):
        return down(activated)
    y = down[0](activated)
    return down[1](y) if len(down) == 2 else y


def residual(block: Any, x: Tensor) -> Tensor:
    """He et al. 2016, figure 4 (a) to (d), and the plain and the scaled block."""
    a, b = block.branch_scale, block.shortcut_scale
    if not block.has_shortcut:
        return F.relu(branch(block, x))
    if block.placement == "original":
        return F.relu(b * shortcut(block, x, x) + a * branch(block, x))
    if block.placement == "bn_after_add":
        last = block.bn3 if hasattr(block, "bn3") else block.bn2
        return F.relu(last(shortcut(block, x, x) + branch(block, x, last_norm=False)))
    if block.placement == "relu_before_add":
        return shortcut(block, x, x) + F.relu(branch(block, x))
    assert block.placement == "relu_preact"
    return shortcut(block, x, F.relu(x)) + branch(block, F.relu(x))


def preact(block: Any, x: Tensor) -> Tensor:
    """Figure 4 (e)."""
    activated = x if block.bn1 is None else F.relu(block.bn1(x))
    y = block.conv2(F.relu(block.bn2(block.conv1(activated))))
    if hasattr(block, "conv3"):
        y = block.conv3(F.relu(block.bn3(y)))
    return y + shortcut(block, x, activated)


def connected(module: blocks.Connect, x: Tensor) -> Tensor:
    a, b = forward(module.block1, x), forward(module.block2, x)
    if not module.join.concat:
        return a + b
    y = torch.cat([a, b], 1)
    return y if isinstance(module.squeeze, nn.Identity) else forward(module.squeeze, y)


def network(model: Any, x: Tensor) -> Tensor:
    """A network's stem, stages and head."""
    if isinstance(model, rf.models.MNISTResNet):
        x = forward(model.block1, F.max_pool2d(F.relu(model.conv1.conv(x)), 2))
        x = forward(model.block2, F.max_pool2d(F.relu(model.conv2.conv(x)), 2))
        return model.fc2(F.relu(model.fc1(x.flatten(1))))
    x = F.relu(model.bn1(model.conv1(x)))
    if hasattr(model, "maxpool"):
        x = F.max_pool2d(x, 3, 2, 1)
    for i in range(1, 5):
        if hasattr(model, f"layer{i}"):
            x = forward(getattr(model, f"layer{i}"), x)
    if hasattr(model, "norm"):
        x = forward(model.norm, x)
    return model.fc(x.mean((2, 3)))


class Plain(nn.Module):
    """`inner` run by its definition."""

    def __init__(self, inner: nn.Module, definition: Any) -> None:
        super().__init__()
        self.inner, self.definition = inner, definition

    def forward(self, x: Tensor) -> Tensor:
        return self.definition(self.inner, x)


def observe_both(module: nn.Module, x: Tensor, definition: Any = forward) -> tuple[Observed, Observed]:
    """(fused, plain): output, all gradients and buffers of a step from the same state."""
    plain = Plain(copy.deepcopy(module), definition)
    with torch.no_grad():
        dy = torch.randn_like(copy.deepcopy(plain)(x))
    want = {name.replace("inner.", "", 1): t for name, t in observe_module(plain, x, dy).items()}
    return observe_module(module, x, dy), want


def assert_equal(module: nn.Module, x: Tensor, definition: Any = forward, within: float = 1e-9) -> None:
    """In float64, where no ReLU flips by rounding: every tensor of a step."""
    got, want = observe_both(module, x, definition)
    assert got.keys() == want.keys()
    # A gradient that a norm behind it makes zero is noise in both.
    errors = {name: float((t - want[name]).double().norm() / max(want[name].double().norm(), 1e-3)) for name, t in
              got.items()}  # fmt: skip
    wrong = {name: error for name, error in errors.items() if not error < within}
    assert not wrong
