"""Parameters and multiply-adds of the networks, beside VGG-19's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from . import models
from .backend import unfused
from .data import require

COLUMNS = ("network", "input", "parameters, M", "multiply-adds, M", "of VGG-19's")
REFERENCE = "vgg19"


class Complexity(NamedTuple):
    """Of a network on one image [C, H, W]. The papers' "FLOPs" are multiply-adds of convolutions and linear layers."""

    name: str
    shape: tuple[int, int, int]
    parameters: int
    multiply_adds: int


def complexity(name: str, create: Callable[[], nn.Module], shape: tuple[int, int, int] | None = None) -> Complexity:
    """Counted on the meta device, where nothing is computed or stored, from the plain form of the fused ops."""
    with torch.device("meta"), unfused(), torch.no_grad():
        model = create().eval()
        shape = shape or models.image_shape(model)
        counter = FlopCounterMode(display=False)
        with counter:
            model(torch.empty(1, *shape))
    parameters = sum(p.numel() for p in model.parameters())
    return Complexity(name, shape, parameters, counter.get_total_flops() // 2)


def table(names: Iterable[str] = ()) -> list[Complexity]:
    """VGG-19, then the networks called so, or all of them. Raises ValueError for an unknown name."""
    vgg = require("torchvision.models", "VGG-19").vgg19
    rows = [complexity(REFERENCE, vgg, (3, 224, 224))]
    return rows + [complexity(name, partial(models.create, name)) for name in names or models.MODELS]


def cells(rows: list[Complexity]) -> list[tuple[str, ...]]:
    """Of `COLUMNS`, as text."""
    reference = next(row.multiply_adds for row in rows if row.name == REFERENCE)
    return [
        (
            row.name,
            "x".join(map(str, row.shape)),
            f"{row.parameters / 1e6:.2f}",
            f"{row.multiply_adds / 1e6:,.1f}",
            f"{row.multiply_adds / reference:.1%}",
        )
        for row in rows
    ]
