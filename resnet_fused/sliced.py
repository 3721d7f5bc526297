"""What `optimize_for_inference` returns, and how its known networks run a large batch on a CPU: by slices of images.

At batch 16 an activation of the stem and the first two stages of a ResNet-50 has up to 51 MB in float32: a convolution
reads its input from memory and writes its output there, by glibc's default into pages just got from the system and
given back afterwards. A slice of few images stays in the caches, in memory that the slice before has left. So `conv1`
to `layer2` run slice by slice; behind them activations are small and weights large, which each slice would read again.

The same was tried for training, a unit's passes and convolutions slice by slice, and lost: its activations must be kept
whole, its weights' gradients added up, and its narrow tensors are in the caches anyway.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .convert import Behind, Converted, ConvertedNetwork, TimmNetwork, TorchvisionNetwork, converted_class
from .folded import EvalOnly, FoldedBlock, FoldedConv, NeverTrains
from .models import ResNet
from .modules import global_hook_reason, hook_reason
from .reference import PaddedShortcut

# Bytes of a slice's widest activation, for each thread. On two threads it allows 2 images of a ResNet-50 in float32 and
# 5 in bfloat16 (of 16 in even parts: 4). A half to twice of it is as quick, a quarter or four times a tenth slower.
SLICE_BYTES = 4 << 20
# What treats each image on its own.
_SEPARATE = (FoldedConv, FoldedBlock, PaddedShortcut, nn.Sequential, nn.ModuleList, nn.Identity, nn.ReLU, nn.MaxPool2d,
             nn.AvgPool2d)  # fmt: skip
_STEPS = ("forward", "stem", "stem_by_modules")  # of `ResNet`, all of which a sliced one passes by


class OptimizedModel(NeverTrains, Converted):
    """What `optimize_for_inference` returns."""

    prefix = "Optimized"


class SlicedNetwork(OptimizedModel):
    """A ResNet of conv1, bn1, the activation `act_name`, maxpool, layer1 to layer4 and a head."""

    act_name = "relu"
    conv1: nn.Module
    bn1: nn.Module
    maxpool: nn.Module
    layer1: nn.Module
    layer2: nn.Module

    def sliced(self, step: str, x: Tensor) -> Tensor:
        """The original's method `step`, which begins with conv1, on images x [N, 3, H, W]."""
        original = getattr(self.original, step)
        count = self._slice_count(x)
        if count == 1:
            return original(self, x)
        names = self._sliced_names()
        x = torch.cat([self._stages(part, names) for part in x.tensor_split(count)])
        return original(Behind(self, (*names, "stem")), x)

    def _sliced_names(self) -> tuple[str, ...]:
        """The modules that run slice by slice, in order."""
        return ("conv1", "bn1", self.act_name, "maxpool", "layer1", "layer2")

    def _stages(self, x: Tensor, names: tuple[str, ...]) -> Tensor:
        for name in names:
            x = getattr(self, name)(x)
        return x

    def _slice_count(self, x: Any) -> int:
        if isinstance(x, Proxy) or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return 1
        if x.device.type != "cpu" or x.dim() != 4:
            return 1
        widest = 16 * x.shape[2] * x.shape[3] * x.element_size()  # 64 channels at a half of the side, 256 at a quarter
        images = max(1, SLICE_BYTES * torch.get_num_threads() // max(1, widest))
        slices = x.shape[0] > images and self._fits_conv1(x) and self._images_are_independent()
        return ceil(x.shape[0] / images) if slices else 1

    def _fits_conv1(self, x: Tensor) -> bool:
        """Whether x fits conv1: its error is to name the whole x."""
        first = next((m for m in self.conv1.modules() if isinstance(m, FoldedConv)), None)
        return first is not None and x.shape[1] == first.channels

    def _images_are_independent(self) -> bool:
        """Whether slices give what the whole does, and nobody watches the difference."""
        modules = [m for name in self._sliced_names() for m in getattr(self, name).modules()]
        return not global_hook_reason() and all(type(m) in _SEPARATE and not hook_reason("", m) for m in modules)


class SlicedTorchvision(SlicedNetwork):
    def _forward_impl(self, x: Tensor) -> Tensor:
        return self.sliced("_forward_impl", x)


class SlicedTimm(SlicedNetwork):
    act_name = "act1"

    def forward_features(self, x: Tensor) -> Tensor:
        return self.sliced("forward_features", x)


class SlicedResNet(SlicedNetwork):
    def forward(self, x: Tensor) -> Tensor:
        return self.sliced("forward", x)


def eval_only(model: nn.Module) -> nn.Module:
    """`model`, whose blocks and stems are folded, as an OptimizedModel, and its known networks as sliced ones."""
    for module in list(model.modules()):
        if isinstance(module, OptimizedModel):  # optimised before
            continue
        mixin: Any = _sliced_class(module)
        if mixin is None and module is model and not isinstance(module, EvalOnly):
            mixin = OptimizedModel
        if isinstance(module, ConvertedNetwork) or (module is model and isinstance(module, Converted)):
            module.__class__ = module.original  # type: ignore[assignment]
        if mixin is not None:
            original: Any = type(module)
            module.__class__ = converted_class(mixin, original)
    return model.eval()


def _sliced_class(network: nn.Module) -> type[OptimizedModel] | None:
    if isinstance(network, ResNet):
        own = type(network)
        return SlicedResNet if all(getattr(own, name) is getattr(ResNet, name) for name in _STEPS) else None
    known = ((TorchvisionNetwork, SlicedTorchvision), (TimmNetwork, SlicedTimm))
    return next((sliced for converted, sliced in known if isinstance(network, converted)), None)
