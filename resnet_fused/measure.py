"""Measurements that compare implementations: interleaved times, saved activations, peak memory.

`python -m resnet_fused.measure eager|lean|fast BATCH SIZE` runs one training step of ResNet-50 in this
process and prints its peak memory as JSON: `peak_memory` starts it.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import require
from .timing import Budget, HostTimer, rounds_of


def interleave(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each of `rounds`, after one warm-up.

    The calls take turns within a round, and every other round runs backwards, so that a machine that
    slows down or speeds up meanwhile favours none.
    """
    parts = {name: [call] for name, call in calls.items()}
    found = rounds_of(parts, HostTimer(), rounds, Budget(math.inf), warmups=1)
    return {name: [times.milliseconds[0] / 1e3 for times in own] for name, own in found.items()}


class Ratio(NamedTuple):
    """How many times faster than a baseline: the median over the rounds, and their extremes."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, baseline: list[float], times: list[float]) -> Ratio:
        ratios = [b / t for b, t in zip(baseline, times, strict=True)]
        return cls(median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f}-{self.high:.2f})"


def saved_bytes(forward: Callable[[], Tensor], exclude: Iterable[Tensor] = (), least: int = 0) -> int:
    """Bytes that `forward()` keeps for its backward pass, each storage counted once.

    The storages of `exclude` (parameters and buffers, which are there anyway) do not count, nor do those of fewer
    than `least` bytes.
    """
    kept: dict[int, int] = {}
    with keeping(kept, exclude, least):
        output = forward()  # alive until the count is taken, so no storage comes twice
    del output
    return sum(kept.values())


@contextmanager
def keeping(kept: dict[int, int], exclude: Iterable[Tensor] = (), least: int = 0) -> Iterator[None]:
    """Within it, the storages that are saved for backward go into `kept` with their bytes, but for those that
    `saved_bytes` leaves out. They may be on the meta device."""

    def identity(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    known = set(map(identity, exclude))

    def pack(tensor: Tensor) -> Tensor:
        size = tensor.untyped_storage().nbytes()
        if identity(tensor) not in known and size >= least:
            kept[identity(tensor)] = size
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def training_step(model: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], None]:
    """Forward, cross entropy, backward and an SGD step: ([N, 3, H, W], [N]) -> a call without arguments."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step


class PeakMemory(NamedTuple):
    """Resident bytes of a process: at its highest, and just before the step that was measured."""

    peak: int
    before: int

    @property
    def step(self) -> int:
        """What the step needed on top of what was there."""
        return self.peak - self.before


Variant = Literal["eager", "lean", "fast"]  # plain PyTorch, or the `memory` of `fuse_`


def peak_memory(variant: Variant, batch: int, size: int) -> PeakMemory:
    """Peak memory of one ResNet-50 training step, in a process of its own.

    Raises RuntimeError with the last line of a failed process.
    """
    command = [sys.executable, "-m", f"{__package__}.measure", variant, str(batch), str(size)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"measuring the memory of {variant} failed: {reason}")
    return PeakMemory(**json.loads(done.stdout.splitlines()[-1]))


def _resident(field: str) -> int:
    """Bytes of a field of /proc/self/status; elsewhere, the peak so far.

    VmHWM rather than getrusage: on Linux the latter starts at what the *parent* process had reached.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _measure_step(variant: Variant, batch: int, size: int) -> PeakMemory:
    from .convert import fuse_

    torch.manual_seed(0)
    model = require("torchvision.models", "the memory measurement").resnet50()
    model = model.to(memory_format=torch.channels_last)
    if variant != "eager":
        fuse_(model, memory=variant)
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    step = training_step(model, x, torch.arange(batch))
    before = _resident("VmRSS")
    step()
    return PeakMemory(_resident("VmHWM"), before)


if __name__ == "__main__":
    arguments = cast(Variant, sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    print(json.dumps(_measure_step(*arguments)._asdict()))
