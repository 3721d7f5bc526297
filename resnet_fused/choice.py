"""Who runs an op in "auto": the quickest that `tune` has measured, else the one that a model of costs expects.

The model sets what our CUDA kernel must move and multiply (`costs.py`) beside what ATen's convolution and the tails
around it move (counted op by op on the meta device), on the published peaks of a GPU. Of a GPU's peak a convolution of
ATen's reaches about three quarters on large products; kernels of mma.sync, as ours are, reach as much on compute
capability 8, and half where wgmma or tcgen05 have twice their rate. These shares are expected, not measured. ATen is
preferred unless the kernel is expected to be clearly ahead: `tune` knows better than either.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from . import plans, tuned
from .backend import Choice
from .costs import MACHINES, Machine, costs_of, flops_of
from .counting import Counter
from .ops import dispatch
from .ops.routes import arch_of
from .problems import Problem
from .signature import Signature

_ATEN_SHARE = 0.75  # of the tensor cores' peak
_OUR_SHARE = {80: 0.75, 90: 0.5}  # by the machine of MACHINES
_AHEAD = 0.95  # the share of ATen's time from which on a kernel is clearly ahead


class Decision(NamedTuple):
    """A choice and where it comes from. Seconds are None where nothing is known."""

    choice: Choice
    source: str  # "tuned", "modelled" or "only"
    seconds: float | None = None
    runner_up: str | None = None
    runner_up_seconds: float | None = None

    def __str__(self) -> str:
        if self.seconds is None:
            return f"{self.choice} ({self.source})"
        own = f"{self.choice} {1e3 * self.seconds:.3f} ms"
        if self.runner_up is None or self.runner_up_seconds is None:
            return f"{own} ({self.source})"
        return f"{own}, {self.runner_up} {1e3 * self.runner_up_seconds:.3f} ms ({self.source})"


def choose(name: str, args: tuple[Any, ...]) -> Choice:
    """Who runs op `name` on these arguments, which are on a GPU."""
    return _choose(Signature.of(name, args), args[0].device)


@functools.lru_cache(maxsize=65536)
def _choose(signature: Signature, device: torch.device) -> Choice:
    return decide(signature, device, arch_of(torch.empty(0, device=device))).choice


def decide(signature: Signature, device: torch.device | None, arch: int) -> Decision:
    """For a compute capability, times ten; device: whose measurements are asked, if any's."""
    entry = None if device is None else tuned.table(device).entries.get(str(signature))
    if entry is not None:
        seconds = entry.seconds
        runner_up = entry.runner_up
        return Decision(
            Choice.parse(entry.winner), "tuned", seconds[entry.winner], runner_up,
            None if runner_up is None else seconds[runner_up],
        )  # fmt: skip
    if signature.op not in dispatch.COMPOSED:
        return Decision(Choice("cuda" if plans.has_cuda() else "triton"), "only")
    return _modelled(signature, arch)


@functools.lru_cache(maxsize=4096)
def _modelled(signature: Signature, arch: int) -> Decision:
    machine = MACHINES[90 if arch >= 90 else 80]
    problem = problem_of(signature)
    aten = aten_seconds(signature, problem, machine)
    cuda = cuda_seconds(problem, machine, arch)
    if cuda is None or not plans.has_cuda():
        return Decision(Choice("aten"), "modelled", aten)
    if cuda <= _AHEAD * aten:
        return Decision(Choice("cuda"), "modelled", cuda, "aten", aten)
    return Decision(Choice("aten"), "modelled", aten, "cuda", cuda)


def problem_of(signature: Signature) -> Problem:
    """That of an op, on the meta device."""
    op = getattr(torch.ops.resnet_fused, signature.op).default
    args = signature.arguments(torch.device("meta"))
    results = op(*args)
    return Problem.of_call(op._schema, args, [results] if isinstance(results, torch.Tensor) else results)


def cuda_seconds(problem: Problem, machine: Machine, arch: int) -> float | None:
    """Of our kernel; None where it takes no such problem."""
    somewhere = dict.fromkeys(problem.tensors, 4096)
    plan = plans.plan(problem.op, problem.fields, arch, somewhere)
    if plan.reason:
        return None
    share = _OUR_SHARE[90 if arch >= 90 else 80]
    costs = costs_of(problem.op, problem.fields, problem.tensors, plan)
    return sum(machine.floor(cost.moved, cost.executed / share, 1)[0] for cost in costs)


def aten_seconds(signature: Signature, problem: Problem, machine: Machine) -> float:
    """Of ATen's convolution and what else the op is composed of."""
    args = signature.arguments(torch.device("meta"))
    with Counter() as counter:
        dispatch.COMPOSED[signature.op](*args)
    convolution = machine.floor(counter.convolutions, flops_of(problem.op, problem.fields) / _ATEN_SHARE, 1)[0]
    return convolution + (counter.moved.unique - counter.convolutions) / machine.bandwidth


def forget() -> None:
    """Decisions, which new measurements may change."""
    _choose.cache_clear()


dispatch.choose_by(choose)
