"""What the networks are made of beside their stems: stages of blocks, and the initial weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from . import reference
from .blocks.options import BlockOptions
from .preact import PreActSequential


def stage(
    options: BlockOptions,
    inplanes: int,
    planes: int,
    blocks: int,
    stride: int = 1,
    dilations: tuple[int, int] = (1, 1),
    first: bool = False,
) -> tuple[nn.Sequential, int]:
    """(`blocks` blocks of which only the first strides, the channels of their output).

    dilations: of the first block's 3x3 convolution, and of the others'. first: whether a stem, and no stage, is in
    front. Raises ValueError for fewer than one block.
    """
    if blocks < 1:
        raise ValueError(f"layers has a stage of {blocks} blocks, expected at least 1")
    modules = []
    for i in range(blocks):
        own = (stride, dilations[0], first) if i == 0 else (1, dilations[1], False)
        modules.append(options.build(inplanes, planes, *own))
        inplanes = options.out_channels(inplanes, planes)
    return (PreActSequential if options.placement == "full_preact" else nn.Sequential)(*modules), inplanes


def init_he(model: nn.Module) -> None:
    """He et al. 2015, fan-out mode: the draws come in torchvision's order, so a seed gives its weights."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm) and module.weight is not None:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def zero_last_norms(model: nn.Module, options: BlockOptions) -> None:
    """Each block starts as an identity (Goyal et al. 2017); raises ValueError where that would be zero."""
    if options.shortcut == "none" or options.placement == "bn_after_add":
        raise ValueError(
            f"zero_init_residual is True with shortcut={options.shortcut!r}, placement={options.placement!r}: the "
            "blocks would give zeros"
        )
    for module in model.modules():
        if isinstance(module, reference.BasicBlock | reference.Bottleneck):
            last = module.bn2 if isinstance(module, reference.BasicBlock) else module.bn3
            if last.weight is not None:
                nn.init.zeros_(last.weight)


def blocks_of(name: str, depth: int, layers_a_block: int) -> Sequence[int]:
    """Blocks of each of three stages for a depth 6n + 2 (of two layers a block), or 9n + 2 (of three)."""
    unit = 3 * layers_a_block
    n, left = divmod(depth - 2, unit)
    if left or n < 1:
        raise ValueError(f"{name}: depth is {depth}, expected {unit}n + 2, as {unit + 2}, {2 * unit + 2}, ...")
    return (n, n, n)
