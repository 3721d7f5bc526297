"""The problems of the matrix kernels that a run poses, and their plans with every tile.

with capturing() as problems:
    step()
for problem in problems:
    for tile, plan in problem.plans(arch): ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import plans
from .ops.residual_block import COMPOSITIONS
from .plans import Plan

FIELDS = {op: [field[0] for field in problem._fields_] for op, problem in plans._PROBLEMS.items()}
MATRIX_OPS = tuple(op for op, fields in FIELDS.items() if "tile" in fields)
_GEOMETRY = ("stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w", "groups")


@dataclass(frozen=True)
class Problem:
    """One call of an op: what its plan is made of, and the tensors that it works on."""

    op: str
    fields: dict[str, Any]  # dtype, flags and sizes
    tensors: dict[str, Tensor]  # by the names of the problem's buffers
    outputs: tuple[str, ...]

    @classmethod
    def of_call(cls, schema: Any, arguments: Sequence[Any], results: Sequence[Tensor]) -> Problem:
        """From an op's schema, whose arguments and results have the names of the problem's fields."""
        op = schema.name.split("::")[1]
        outputs = dict(zip((r.name for r in schema.returns), results, strict=True))
        given = {a.name: value for a, value in zip(schema.arguments, arguments, strict=False)}
        every = {**_sizes(given), **outputs}
        used = {name: value for name, value in every.items() if name in FIELDS[op] and value is not None}
        fields = {name: value for name, value in used.items() if not isinstance(value, Tensor)}
        written = tuple(name for name in outputs if name in used and used[name].numel())  # else it was not wanted
        tensors = {n: t for n, t in used.items() if n not in fields and (n in written or n not in outputs)}
        return cls(op, fields, tensors, written)

    @property
    def device(self) -> int | None:
        """The GPU; None for tensors of the CPU, which the tests' emulator works on."""
        device = next(iter(self.tensors.values())).device
        return device.index if device.type == "cuda" else None

    def plan(self, arch: int, tile: int = 0, workspace: Tensor | None = None) -> Plan:
        """tile: its number, from 1; 0: the plan's own choice."""
        buffers = {name: t.data_ptr() for name, t in self.tensors.items()}
        if workspace is not None and workspace.numel():
            buffers["workspace"] = workspace.data_ptr()
        return plans.plan(self.op, {**self.fields, "tile": tile}, arch, buffers)

    def ready(self, arch: int, tile: int = 0) -> tuple[Plan, Tensor] | None:
        """A plan that can be launched, with its workspace; None where the tile does not serve."""
        plan = self.plan(arch, tile)
        if plan.reason or not plan.steps:
            return None
        like = next(iter(self.tensors.values()))
        workspace = torch.empty(plan.workspace, dtype=torch.float32, device=like.device)
        return self.plan(arch, tile, workspace), workspace

    def tiles(self, arch: int) -> Iterator[tuple[int, Plan, Tensor]]:
        """Every tile that serves: its number, a plan that can be launched, the plan's workspace."""
        tile = 1
        while "does not exist" not in self.plan(arch, tile).reason:
            if found := self.ready(arch, tile):
                yield (tile, *found)
            tile += 1

    def __str__(self) -> str:
        names = ("C", "K", "C2", "R", "stride", "stride_h")
        sizes = [f"{name}={self.fields[name]}" for name in names if self.fields.get(name, 0) > 1]
        return f"{self.op} {self.fields['N']}x{self.fields['H']}x{self.fields['W']} {' '.join(sizes)}"


def name_of_tile(plan: Plan) -> str:
    return plan.steps[0].symbol.rsplit("_", 1)[1]


def name_of_kernel(plan: Plan) -> str:
    return plan.steps[0].symbol.rsplit("_", 1)[0]


def _sizes(given: dict[str, Any]) -> dict[str, Any]:
    """An op's arguments, and the sizes that a problem has beside them."""
    x, dy, weight, x2 = (given.get(name) for name in ("x", "dy", "weight", "x2"))
    geometry = given.get("geometry")
    some: Any = dy if x is None else x
    sizes: dict[str, Any] = {"dtype": some.dtype, "N": some.shape[0]}
    sizes["H"], sizes["W"] = (given["height"], given["width"]) if x is None else x.shape[2:]
    if x is None:
        assert weight is not None
        sizes["C"] = weight.shape[1] * (geometry[6] if geometry else 1)
    else:
        sizes["C"] = x.shape[1]
    sizes["K"] = dy.shape[1] if dy is not None else weight.shape[0] if weight is not None else 0
    if geometry:
        sizes |= dict(zip(_GEOMETRY, geometry, strict=True))
        sizes["R"], sizes["S"] = given.get("kernel_size") or weight.shape[2:]  # type: ignore[union-attr]
    if x2 is not None:
        sizes["C2"], sizes["H2"], sizes["W2"] = x2.shape[1:]
    return {**given, **sizes}


class _Capture(TorchDispatchMode):
    def __init__(self, problems: list[Problem]) -> None:
        super().__init__()
        self.problems = problems

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "resnet_fused" and func._opname in COMPOSITIONS:
            with self:
                return COMPOSITIONS[func._opname](*args)
        out = func(*args, **(kwargs or {}))
        if func.namespace == "resnet_fused" and func._opname in MATRIX_OPS:
            results = [out] if isinstance(out, Tensor) else out
            self.problems.append(Problem.of_call(func._schema, args, results))
        return out


@contextmanager
def capturing() -> Iterator[list[Problem]]:
    """The problems of the matrix kernels' ops that are called within, which keep their tensors alive."""
    problems: list[Problem] = []
    with torch.autograd.set_multithreading_enabled(False), _Capture(problems):
        yield problems
