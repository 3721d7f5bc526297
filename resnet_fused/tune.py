"""`tune`: measures who runs each op of a model quickest on this machine, and remembers the winners (`tuned.py`).

A step of the model runs once, to see what is asked for. Of every op that the matrix kernels run, on a GPU, the
candidates are our kernel with each tile, the Triton kernel with each config, and ATen's convolution with the fused
tails; of every 1x1 unit at a block's end that keeps no raw output ("lean"), the Gram form and running the convolution
again. Candidates take turns; a time is the median of its rounds, on a GPU with a cold L2.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import choice, functional, planner, tuned
from .backend import LEAN_PLANS, Choice
from .data import MissingPackageError, require
from .explain import unchanged
from .functional import ConvBN
from .ops import dispatch
from .planner import EndUnit
from .recorder import Call, recording
from .signature import Signature
from .timing import Budget, CudaTimer, HostTimer, Part, Times, interleaved
from .tuned import Entry, Table

Timer = Callable[[Sequence[Part]], Times]
ROUNDS = 7
BACKENDS = ("cuda", "triton", "aten")
_MOST = 100  # numbers of a backend's plans, far more than there are


@dataclass
class Report:
    """What `tune` has found: entries by problem, of which `measured` are new; why a problem was left out."""

    path: str
    entries: dict[str, Entry] = field(default_factory=dict)
    measured: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def cells(self) -> list[tuple[str, ...]]:
        """(problem, winner, ms, runner-up, ms, "new" or "known") by problem."""
        rows: list[tuple[str, ...]] = []
        for problem, entry in self.entries.items():
            other = entry.runner_up
            shown = ("", "") if other is None else (other, f"{1e3 * entry.seconds[other]:.3f}")
            state = "new" if problem in self.measured else "known"
            rows.append((problem, entry.winner, f"{1e3 * entry.seconds[entry.winner]:.3f}", *shown, state))
        return rows


def tune(
    model: nn.Module,
    example_input: Tensor,
    *,
    rounds: int = ROUNDS,
    again: bool = False,
    seconds: float = math.inf,
    backends: Sequence[str] = BACKENDS,
    timer: Timer | None = None,
    progress: bool = False,
) -> Report:
    """Measures the plans of each distinct problem that `model` poses on `example_input` [N, C, H, W].

    example_input: of the dtype and on the device to tune for. In training mode forward and backward, else forward
    alone; the model is left as it was. rounds: of which a time is the median. What is in the cache is not measured
    again unless `again`; each result is written at once, so that a run that was broken off goes on where it was. After
    `seconds` no other problem is begun. backends: of ops; "triton" costs a compilation for each config. timer: of
    milliseconds, in place of this machine's. progress: a bar on the terminal. Raises TypeError for what is no module
    or no Tensor, ValueError for fewer than one round, a backend that there is not, or a device without kernels.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected an nn.Module")
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, expected at least 1")
    if unknown := set(backends) - set(BACKENDS):
        raise ValueError(f"backends has {', '.join(sorted(unknown))}, expected some of {', '.join(BACKENDS)}")
    if not isinstance(example_input, Tensor):
        raise TypeError(f"example_input is a {type(example_input).__name__}, expected a Tensor")
    device, budget = example_input.device, Budget(seconds)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"example_input is on {device}, expected a CPU or a GPU")
    timer = timer or (CudaTimer() if device.type == "cuda" else HostTimer())
    table = tuned.table(device)
    table.prepare()
    report = Report(str(table.path or "not kept: no folder is known"))
    devices = [device] if device.type == "cuda" else []
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices):
        x = example_input.clone() if example_input.is_inference() else example_input
        tasks = dict(_tasks(model, x, backends))
        for problem, candidates in _with_progress(tasks.items(), len(tasks), progress):
            if (again or problem not in table.entries) and budget.left > 0:
                _measure(problem, candidates, timer, rounds, table, report)
            if problem in table.entries:
                report.entries[problem] = table.entries[problem]
    choice.forget()
    return report


def _with_progress(tasks, count: int, wanted: bool):
    if not wanted:
        return tasks
    try:
        return require("tqdm", "the progress bar").tqdm(tasks, total=count, unit="problem")
    except MissingPackageError:
        return tasks


def _measure(
    problem: str, make: Callable[[], dict[str, Part]], timer: Timer, rounds: int, table: Table, report: Report
) -> None:
    try:
        candidates = make()
    except torch.OutOfMemoryError as error:
        report.left_out[problem] = str(error).splitlines()[0]
        return
    refusals = {name: _refusal(part) for name, part in candidates.items()}
    usable = {name: (candidates[name],) for name, refusal in refusals.items() if refusal is None}
    if not usable:
        reasons = [f"{name}: {str(error).splitlines()[0]}" for name, error in refusals.items()]
        report.left_out[problem] = "; ".join(reasons) or "no candidates"
        return
    found = interleaved(usable, timer, rounds, Budget(float("inf")))
    table.add(problem, Entry.of({name: times[0] / 1e3 for name, (times, _, _) in found.items()}))
    report.measured.append(problem)


def _refusal(part: Part) -> Exception | None:
    """Why a candidate does not take its problem."""
    try:
        part()
    except Exception as error:  # a compiler's, too, and memory that is not there
        return error
    return None


def _tasks(model: nn.Module, x: Tensor, backends: Sequence[str]) -> Iterator[tuple[str, Callable[[], dict[str, Part]]]]:
    """Each distinct problem, and what makes its candidates."""
    signatures: dict[Signature, None] = {}

    def listener(name: str, args: tuple) -> None:
        if name in dispatch.COMPOSED and dispatch.on_kernels(args):
            signatures.setdefault(Signature.of(name, args))

    with dispatch.listening(listener), recording() as calls, unchanged(model):
        _step(model, x)
    for unit, conv in _end_units(calls):
        yield str(unit), functools.partial(_plans_of, unit, conv, x.device)
    for signature in signatures:
        yield str(signature), functools.partial(_backends_of, signature, x.device, backends)


def _step(model: nn.Module, x: Tensor) -> None:
    with torch.set_grad_enabled(model.training):
        y = model(x)
    leaves = [p for p in model.parameters() if p.requires_grad]
    outputs = [t for t in tree_leaves(y) if isinstance(t, Tensor) and t.requires_grad]
    if model.training and leaves and outputs:
        torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs], allow_unused=True)


# ---------------------------------------------------------------------------------------------- ops on a GPU


def _backends_of(signature: Signature, device: torch.device, backends: Sequence[str]) -> dict[str, Part]:
    args = signature.arguments(device)

    def part(chosen: Choice) -> Part:
        return lambda: dispatch.run(signature.op, args, chosen)

    def exists(chosen: Choice) -> bool:
        refusal = _refusal(part(chosen))
        return not isinstance(refusal, IndexError) and "does not exist" not in str(refusal)

    named = [Choice(backend) for backend in dispatch.backends_of(signature.op) if backend in backends]
    found = [default for default in named if _refusal(part(default)) is None]
    for backend in [default.backend for default in found if default.backend != "aten"]:
        found += itertools.takewhile(exists, (Choice(backend, number) for number in range(1, _MOST)))
    return {str(chosen): part(chosen) for chosen in found}


# ------------------------------------------------------------------------------------------- plans of end units


def _end_units(calls: list[Call]) -> Iterator[tuple[EndUnit, ConvBN]]:
    """Units that may be in the Gram form or run again, each once, with the unit itself."""
    seen: set[EndUnit] = set()
    for call in calls:
        for unit, conv in planner.end_units(call):
            if unit not in seen and isinstance(conv, ConvBN):
                seen.add(unit)
                yield unit, conv


def _plans_of(unit: EndUnit, conv: ConvBN, device: torch.device) -> dict[str, Part]:
    """A training step of a block of this unit alone, by either plan; a projection beside another such unit."""

    def activation(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, device=device).to(unit.dtype).contiguous(memory_format=torch.channels_last)

    x = activation(unit.x_shape).requires_grad_()
    weight = conv.weight.detach().to(device, unit.dtype).requires_grad_()
    vectors = [torch.ones(weight.shape[0], device=device, requires_grad=True) for _ in range(2)]
    own = ConvBN(weight, gamma=vectors[0], beta=vectors[1], stride=conv.stride, eps=conv.eps)
    shape = own.geometry.out_shape(tuple(x.shape), weight.shape)
    dy = activation(shape)

    def step(plan: str) -> None:
        with planner.forced_plan(plan):
            y = functional.residual_block(x, [own], own if unit.projection else None)
        torch.autograd.grad(y, [x, weight, *vectors], dy)

    return {plan: functools.partial(step, plan) for plan in LEAN_PLANS}
