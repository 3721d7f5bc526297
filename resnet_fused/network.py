"""What a whole ResNet's training step moves through memory and keeps, stage by stage: eager, torch.compile's and ours.

The networks run on the meta device, where a tensor has a shape and no memory, so that any batch may be counted: every
op that runs is seen, forward and backward, and ours are those of a GPU. There are two counts of what they move:

    passes    reads and writes of activations. Of all that moves, the part that grows with the batch: what a step of
              twice the batch moves more. Weights, statistics and Gram matrices are not in it.
    unique    every op's inputs and outputs once, weights and small matrices included

The optimizer's step and the loss are left out. torch.compile's kernels are no ops of a run: its passes are derived
(`traffic.py`), and what it keeps is what eager keeps or less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import models
from .blocks import FusedStem
from .convert import fuse_
from .counting import Moved, counting
from .data import require
from .functional import Memory
from .measure import keeping
from .ops.pointwise import as_on_a_gpu
from .ops.spec import BlockSpec
from .recorder import Call, recording
from .traffic import Bytes, block_sizes, compile_bytes, compiled_stem

STAGES = ("stem", "stage 1", "stage 2", "stage 3", "stage 4", "head")
MEMORIES: tuple[Memory, ...] = ("lean", "fast")
MODELS = tuple(models.TORCHVISION)  # torchvision has them too


class Step(NamedTuple):
    """A training step of one stage."""

    forward: Moved
    backward: Moved
    saved: int

    @property
    def moved(self) -> Moved:
        return self.forward + self.backward


def stages_of(model: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    """Those of STAGES, of a torchvision ResNet, as it came or fused."""

    def stem(x: Tensor) -> Tensor:
        return model.maxpool(model.relu(model.bn1(model.conv1(x))))

    def head(x: Tensor) -> Tensor:
        return model.fc(torch.flatten(model.avgpool(x), 1))

    yield model.stem if isinstance(model, FusedStem) else stem
    yield from (model.layer1, model.layer2, model.layer3, model.layer4)
    yield head


def images(batch: int, size: int, dtype: torch.dtype, device: str = "meta") -> Tensor:
    x = torch.empty(batch, 3, size, size, dtype=dtype, device=device)
    return x.to(memory_format=torch.channels_last)


def run(model: nn.Module, x: Tensor) -> tuple[list[Step], list[list[Call]]]:
    """A training step of every stage, and the fused ops' calls in each. `passes` count weights too."""
    steps: list[Step] = []
    calls: list[list[Call]] = []
    parameters = list(model.parameters())
    kept: dict[int, int] = {}  # what is kept twice counts where it is kept first
    graphs = []  # alive to the end, so that no storage comes twice
    for stage in stages_of(model):
        inputs = [x] if steps else []  # images have no gradient
        before = sum(kept.values())
        with recording() as own, keeping(kept, (*parameters, *model.buffers())), counting() as forward:
            y = stage(x)
        dy = torch.empty_like(y)
        with counting() as backward:
            torch.autograd.grad(y, [*inputs, *parameters], dy, True, allow_unused=True)
        steps.append(Step(forward.moved, backward.moved, sum(kept.values()) - before))
        calls.append(list(own))
        graphs.append(y)
        x = y.detach().requires_grad_()
    return steps, calls


def create(name: str, dtype: torch.dtype, memory: Memory | None = None) -> nn.Module:
    """Torchvision's network `name` on the meta device in training mode, fused if `memory` is given."""
    with torch.device("meta"):
        model = require("torchvision.models", "the comparison with eager").get_model(name)
    model = model.to(dtype).to(memory_format=torch.channels_last)
    if memory is not None:
        fuse_(model, memory)
    return model


def steps_of(model: nn.Module, batch: int, size: int, dtype: torch.dtype) -> tuple[list[Step], list[list[Call]]]:
    """As `run`, for a batch of images, as on a GPU; `passes` are those of activations."""
    with as_on_a_gpu():
        steps, calls = run(model, images(batch, size, dtype))
        twice, _ = run(model, images(2 * batch, size, dtype))

    def grown(once: Moved, more: Moved) -> Moved:
        return Moved(more.passes - once.passes, once.unique)

    return [
        Step(grown(s.forward, t.forward), grown(s.backward, t.backward), s.saved)
        for s, t in zip(steps, twice, strict=True)
    ], calls


def compiled(calls: list[Call], x: Tensor) -> Bytes:
    """torch.compile's passes of a stage, derived. calls: of the fused ops; x: the images, which the stem reads."""
    total = Bytes(0, 0, 0)
    for call in calls:
        if isinstance(call.spec, BlockSpec):
            total = total.plus(compile_bytes(block_sizes(call), call.spec))
        else:
            total = total.plus(compiled_stem(call, x.numel() * x.element_size()))
    return total


@dataclass(frozen=True)
class Comparison:
    """A network's training step, by stage."""

    eager: list[Step]
    ours: dict[Memory, list[Step]]
    compiled: list[Bytes]

    @classmethod
    def of(cls, name: str, batch: int, size: int = 224, dtype: torch.dtype = torch.bfloat16) -> Comparison:
        """Of torchvision's ResNet `name`; nothing is computed."""
        eager, _ = steps_of(create(name, dtype), batch, size, dtype)
        ours, calls = {}, {}
        for memory in MEMORIES:
            ours[memory], calls[memory] = steps_of(create(name, dtype, memory), batch, size, dtype)
        x, head = images(batch, size, dtype), eager[-1]  # in the head nothing is fused
        behind = Bytes(head.forward.passes, head.backward.passes, head.saved)
        return cls(eager, ours, [*(compiled(own, x) for own in calls["fast"][:-1]), behind])

    def columns(
        self, of: Callable[[Step], float], compiled: Callable[[Bytes], float] | None = None
    ) -> dict[str, list[float]]:
        """A figure by stage of eager, of torch.compile where it has one, and of ours."""
        found = {"eager": list(map(of, self.eager))}
        if compiled is not None:
            found["torch.compile"] = list(map(compiled, self.compiled))
        return found | {memory: list(map(of, self.ours[memory])) for memory in MEMORIES}

    def tables(self) -> Iterator[tuple[str, list[str], list[list[str]]]]:
        """(title, columns, rows) of each count, in GiB and as a share of eager's."""

        yield "moved, by passes", *_table(self.columns(lambda step: step.moved.passes, lambda stage: stage.moved))
        yield "moved, ops' inputs and outputs once", *_table(self.columns(lambda step: step.moved.unique))
        yield "kept for backward", *_table(self.columns(lambda step: step.saved))


def _table(columns: dict[str, list[float]]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a row for each stage and the total."""
    eager, *others = (summed := {name: [*values, sum(values)] for name, values in columns.items()})
    rows = []
    for i, stage in enumerate((*STAGES, "total")):
        base = summed[eager][i]
        shares = [f"{summed[name][i] / 2**30:.2f} ({summed[name][i] / base:.2f})" for name in others]
        rows.append([stage, f"{base / 2**30:.2f}", *shares])
    return ["stage", *columns], rows
