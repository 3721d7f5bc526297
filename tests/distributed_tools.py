"""What the checks of norms that two processes share have in common: their list, and shares of a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from conftest import (
    Observed,
    randomise,
    relative_error,
)
from torch import Tensor, nn
from torchvision.models import resnet

import resnet_fused as rf

WORLD = 2
HALVES, UNEQUAL = (8, 8), (5, 11)
LOCAL = ("x", "shortcut")  # of what each process has a part
Sizes = Sequence[int]
CHECKS: dict[str, Callable[[], None]] = {}


def check(*args: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: one check, or one a value of `args`."""

    def register(f: Callable[..., None]) -> Callable[..., None]:
        if not args:
            CHECKS[f.__name__] = f
        for arg in args:
            CHECKS[f"{f.__name__}[{arg}]"] = partial(f, arg)
        return f

    return register


# ------------------------------------------------------------------------------------------------------- tools


def part(t: Tensor, sizes: Sizes) -> Tensor:
    """This process's share of a batch."""
    return t.split(list(sizes))[dist.get_rank()]


def summed(t: Tensor) -> Tensor:
    dist.all_reduce(t)
    return t


def assert_close(got: Observed, want: Observed, bound: float = 1e-10) -> None:
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    errors = {name: relative_error(t, want[name]) for name, t in got.items()}
    assert max(errors.values()) <= bound, {name: e for name, e in errors.items() if e > bound}


def is_local(name: str) -> bool:
    return name == "y" or name.removeprefix("gradient of ") in LOCAL


def whole(seen: Observed) -> Observed:
    """Gradients of parameters added up over the processes."""
    names = [name for name in seen if name.startswith("gradient of") and not is_local(name)]
    return seen | {name: summed(seen[name].clone()) for name in names}


def share_of(seen: Observed, sizes: Sizes) -> Observed:
    """What a process sees of a run on the whole batch."""
    return {name: part(t, sizes) if is_local(name) else t for name, t in seen.items()}


def shared(module: nn.Module, group: Any = None) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module), group)


def sent() -> int:
    """How many collectives this process has called."""
    return dist.group.WORLD._get_sequence_number_for_group()


def image(n: int, c: int, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(n, c, size, size, dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def network() -> nn.Module:
    """A ResNet-18 of two blocks: stem, identity, projection."""
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 10)
    return randomise(model)


def fused(model: nn.Module) -> nn.Module:
    own = copy.deepcopy(model)
    assert not rf.fuse_(own).composed
    return own


def photos(n: int, dtype: torch.dtype = torch.float64, size: int = 32) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, size, size, dtype=torch.float64).to(dtype), torch.randint(10, (n,))
