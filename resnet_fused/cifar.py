"""ResNets for small images: He et al.'s 6n + 2 networks, their plain twins, and ResNet-18/34/50 behind a 3x3 stem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import BasicBlock, BlockOptions, Bottleneck, UnpooledStem
from .stages import blocks_of, init_he, stage, zero_last_norms

NARROW = (16, 32, 64)  # He et al. 2015, section 4.2
WIDE = (64, 128, 256, 512)


class CifarResNet(UnpooledStem):
    """ResNet for small images x: [N, 3, H, W] (H, W = 32), returning logits [N, num_classes] of x's dtype.

    That is the parameters' dtype. A 3x3 stem of `widths[0]` channels at stride 1 and no max pool; then stages layer1,
    layer2, ... of `layers` blocks of these widths, each but the first halving the image; average pool and fc.
    Other arguments and module names are those of `resnet_fused.models.ResNet`, and further keywords those of
    `BlockOptions`.

    Loads state dicts that call the projection `shortcut` and the classifier `linear`, as well as its own names.
    Raises ValueError if `layers` and `widths` differ in length or are empty, if `zero_init_residual` would make the
    blocks zero, and for a placement "full_preact"; for x of other channels or dtype than conv1's ValueError, or where
    the stem runs module by module PyTorch's RuntimeError.
    """

    def __init__(
        self,
        block: Any,
        layers: Sequence[int],
        widths: Sequence[int] = NARROW,
        num_classes: int = 10,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        norm_layer: Callable[..., nn.Module] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if len(layers) != len(widths) or not layers:
            raise ValueError(f"layers is {layers!r}, widths {widths!r}: expected one entry each a stage")
        norm = norm_layer or nn.BatchNorm2d
        self.options = BlockOptions(block, norm=norm, groups=groups, base_width=width_per_group, **options)
        if self.options.placement == "full_preact":
            raise ValueError("placement is 'full_preact', whose networks are PreActResNet and CifarPreActResNet")
        self.conv1 = nn.Conv2d(3, widths[0], kernel_size=3, padding=1, bias=False)
        self.bn1 = norm(widths[0])
        self.relu = nn.ReLU(inplace=True)
        inplanes = widths[0]
        self.stages = tuple(f"layer{i + 1}" for i in range(len(layers)))
        for name, planes, blocks in zip(self.stages, widths, layers, strict=True):
            made, inplanes = stage(self.options, inplanes, planes, blocks, 1 if name == "layer1" else 2)
            setattr(self, name, made)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inplanes, num_classes)
        init_he(self)
        if zero_init_residual:
            zero_last_norms(self, self.options)
        self.register_load_state_dict_pre_hook(_own_names)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _own_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Renames, in place, what others call differently: `shortcut` in a block, and `linear`."""
    for key in [key for key in state_dict if key.startswith(prefix)]:
        own = key.removeprefix(prefix).replace(".shortcut.", ".downsample.")
        if own.startswith("linear."):
            own = own.replace("linear.", "fc.", 1)
        if prefix + own not in state_dict:
            state_dict[prefix + own] = state_dict.pop(key)


def cifar_resnet(depth: int, **kwargs) -> CifarResNet:
    """The ResNet of 6n + 2 layers, widths 16, 32, 64, shortcuts without parameters ("A"); keywords as `CifarResNet`."""
    return CifarResNet(BasicBlock, blocks_of("cifar_resnet", depth, 2), **{"shortcut": "A", **kwargs})


def cifar_resnet20(**kwargs) -> CifarResNet:
    """`cifar_resnet(20)` (0.27 M parameters)."""
    return cifar_resnet(20, **kwargs)


def cifar_resnet32(**kwargs) -> CifarResNet:
    """`cifar_resnet(32)` (0.46 M parameters)."""
    return cifar_resnet(32, **kwargs)


def cifar_resnet44(**kwargs) -> CifarResNet:
    """`cifar_resnet(44)` (0.66 M parameters)."""
    return cifar_resnet(44, **kwargs)


def cifar_resnet56(**kwargs) -> CifarResNet:
    """`cifar_resnet(56)` (0.85 M parameters)."""
    return cifar_resnet(56, **kwargs)


def cifar_resnet110(**kwargs) -> CifarResNet:
    """`cifar_resnet(110)` (1.7 M parameters)."""
    return cifar_resnet(110, **kwargs)


def cifar_resnet1202(**kwargs) -> CifarResNet:
    """`cifar_resnet(1202)` (19.4 M parameters)."""
    return cifar_resnet(1202, **kwargs)


def cifar_plain20(**kwargs) -> CifarResNet:
    """`cifar_resnet(20)` without shortcuts (0.27 M parameters)."""
    return cifar_resnet(20, shortcut="none", **kwargs)


def cifar_plain32(**kwargs) -> CifarResNet:
    """`cifar_resnet(32)` without shortcuts (0.46 M parameters)."""
    return cifar_resnet(32, shortcut="none", **kwargs)


def cifar_plain44(**kwargs) -> CifarResNet:
    """`cifar_resnet(44)` without shortcuts (0.66 M parameters)."""
    return cifar_resnet(44, shortcut="none", **kwargs)


def cifar_plain56(**kwargs) -> CifarResNet:
    """`cifar_resnet(56)` without shortcuts (0.85 M parameters)."""
    return cifar_resnet(56, shortcut="none", **kwargs)


def cifar_plain110(**kwargs) -> CifarResNet:
    """`cifar_resnet(110)` without shortcuts (1.7 M parameters)."""
    return cifar_resnet(110, shortcut="none", **kwargs)


def cifar_stem_resnet18(**kwargs) -> CifarResNet:
    """ResNet-18 behind a 3x3 stem (11.2 M parameters); keywords as `CifarResNet`."""
    return CifarResNet(BasicBlock, (2, 2, 2, 2), WIDE, **kwargs)


def cifar_stem_resnet34(**kwargs) -> CifarResNet:
    """ResNet-34 behind a 3x3 stem (21.3 M parameters); keywords as `CifarResNet`."""
    return CifarResNet(BasicBlock, (3, 4, 6, 3), WIDE, **kwargs)


def cifar_stem_resnet50(**kwargs) -> CifarResNet:
    """ResNet-50 behind a 3x3 stem (23.5 M parameters); keywords as `CifarResNet`."""
    return CifarResNet(Bottleneck, (3, 4, 6, 3), WIDE, **kwargs)
