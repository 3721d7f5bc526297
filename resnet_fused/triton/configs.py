"""Which tiles a product of the matrix family may have, the default first; and what its kernels refuse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .launch import config_wanted

MAX_PIXELS = 2**31 - 2**10  # with room for a tile's rows beyond the last
_SHARED = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}  # KiB that a program may have; others 99
_ENOUGH = 128  # programs: about as many as a GPU has multiprocessors


class Config(NamedTuple):
    """A program's tile of the product, the depth of a step, and how Triton runs it."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    @property
    def constexprs(self) -> dict[str, int]:
        return {"BM": self.m, "BN": self.n, "BK": self.k}


@dataclass(frozen=True)
class Product:
    """[m, n], summed over k, `count` times. `left`: how many tensors its left operand is made of on load;
    `transforms`: how many tensors are not multiplied as they are; arch: compute capability, times ten."""

    m: int
    n: int
    k: int
    arch: int
    left: int = 1
    transforms: int = 0
    count: int = 1

    @property
    def fragments_from_shared(self) -> bool:
        """Whether tensor cores take both operands from shared memory, or the left one from one warp's registers."""
        return self.arch // 10 in (9, 10)

    @property
    def once(self) -> bool:
        """Whether what is transformed goes through shared memory once more, instead of being transformed by all warps
        that hold it in their fragments."""
        return self.transforms > 0 and not self.fragments_from_shared

    def programs(self, c: Config) -> int:
        return triton.cdiv(self.m, c.m) * triton.cdiv(self.n, c.n) * self.count

    def shared(self, c: Config) -> int:
        """Bytes of shared memory, about: operands in flight, transformed ones, accumulators on their way out."""
        loaded = 2 * c.k * (self.left * c.m + c.n)
        transformed = 2 * c.k * (c.m + c.n) if self.transforms else 0
        return max(loaded * c.stages + transformed, 4 * c.m * c.n)


def configs(product: Product) -> list[Config]:
    """All that fit, the default first."""
    every = list(dict.fromkeys(_fitting(product)))
    busy = [c for c in every if product.programs(c) >= _ENOUGH]
    return sorted(every, key=lambda c: (c not in busy[:1], every.index(c))) if busy else every[::-1]


def _fitting(product: Product) -> Iterator[Config]:
    """From the largest tile to the smallest."""
    steps = (64, 32) if product.transforms <= 1 else (32, 64)  # registers, of which transformations take many
    warps_of_half = 4 if product.transforms <= 1 else 8
    for m, n, warps in ((128, 128, 8), (128, 64, warps_of_half), (64, 64, 4), (64, 32, 4), (64, 16, 4)):
        for k in steps:
            config = Config(m, min(n, _padded(product.n)), min(k, _padded(product.k)), warps, 3)
            if product.shared(config) <= _SHARED.get(product.arch, 99) * 1024:
                yield config


def _padded(size: int) -> int:
    """The least side that a tile of tensor cores has for it."""
    return max(triton.next_power_of_2(size), 16)


def chosen(every: Sequence[Config]) -> Config:
    """The one that `launch.wanted_config` asks for by its number, else the first. Raises IndexError."""
    return every[max(config_wanted(), 1) - 1]


def default(product: Product) -> Config:
    return chosen(configs(product))


def check_operands(op: str, *activations: Tensor, **channels: int) -> None:
    """Refuses what the kernels do not take. channels: of every operand, or of a group of it."""
    if activations[0].dtype not in (torch.bfloat16, torch.float16):
        raise RuntimeError(f"{op}: the kernels take bfloat16 and float16")
    for count in channels.values():
        if count % 8:
            raise RuntimeError(f"{op}: {count} channels are not a multiple of 8")
    for x in activations:
        if x.shape[0] * x.shape[2] * x.shape[3] > MAX_PIXELS:
            raise RuntimeError(f"{op}: 2^31 pixels or more")


def require_pixels(op: str, pixels: int, what: str) -> None:
    if pixels == 0:
        raise RuntimeError(f"{op}: no pixels to {what}")


def options(config: Config) -> dict[str, Any]:
    return {"num_warps": config.warps, "num_stages": config.stages}
