"""Which kernel serves each convolution and batch norm of a network, forward and backward, and what binds it.

A training step runs on the meta device as on a GPU (`network.py`): what is listed is what ran. Of every op of ours the
plan for a compute capability is asked for, as its launch would; ATen's convolutions come with the reason why no kernel
of ours takes them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import plans
from .choice import decide
from .costs import MACHINES, Cost, costs_of
from .counting import COMPOSITIONS
from .functional import Memory
from .network import create, images, stages_of
from .ops import kernel_block, residual_block
from .ops.dispatch import COMPOSED
from .ops.pointwise import as_on_a_gpu
from .plans import Plan
from .signature import Signature

_SOMEWHERE = 4096  # an address: plans ask only whether it is one, and aligned
_GEOMETRY = ("stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w", "groups")


@dataclass(frozen=True)
class Launch:
    """An op that ran, and what it costs: one of ours with its plan, or a convolution of ATen's."""

    op: str
    problem: dict[str, Any]
    plan: Plan | None  # None: ATen's
    costs: tuple[Cost, ...]  # of its steps
    asked: Signature | None = None  # what "auto" is asked; None where there is no choice
    auto: str = ""  # what it chooses, and the runner-up


class Row(NamedTuple):
    """A launch of a unit."""

    unit: str  # names of its convolutions, of several blocks where they are alike
    shape: str
    backward: bool
    launch: Launch
    reason: str  # why it is not a kernel's, or what of


class _Tracer(TorchDispatchMode):
    """Launches, each with the unit that it belongs to: the name of its convolution."""

    def __init__(self, weights: dict[int, str], arch: int) -> None:
        super().__init__()
        self._names, self._arch = weights, arch
        self._producers: dict[int, str] = {}  # units by their raw outputs
        self._end = self._projection = ""  # of the block that runs: the last of its chain, and of all
        self._input = 0
        self._last = ""
        self.backward = False
        self.found: list[tuple[str, bool, Launch]] = []
        self.reasons: dict[str, str | None] = {}
        self.small = 0  # other ops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, ours = func._opname, func.namespace == "resnet_fused"
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
        if ours and name in COMPOSITIONS:
            self._enter(given)
            with self:
                return COMPOSITIONS[name](*args)
        out = func(*args, **(kwargs or {}))
        if ours:
            self._add(self._planned(func, args, given, out), given, out)
        elif name == "convolution":
            out = out.contiguous(memory_format=torch.channels_last)  # which the meta device forgets
            self._add(aten_launch("fprop", given["input"], given["weight"], out), given, out)
        elif name == "convolution_backward":
            self._last = self._names.get(_storage(given["weight"]), self._last)  # a Gram matrix's has no name
            for kind, wanted in zip(("dgrad", "wgrad"), given["output_mask"], strict=False):
                if wanted:
                    launch = aten_launch(kind, given["input"], given["weight"], given["grad_output"])
                    self.found.append((self._last, self.backward, launch))
        else:
            self.small += not func.is_view and not name.startswith(("empty", "new_empty", "detach"))
        return out

    def _enter(self, given: dict[str, Any]) -> None:
        if "weight" in given:  # the stem, of one unit
            self._last = self._end = self._names[_storage(given["weight"])]
            return
        config = {name: given[name] for name in residual_block.CONFIG}
        spec, weights = residual_block.decode(**config, save=True), given["weights"]
        names = [self._names[_storage(w)] for w in weights]
        self._end, self._projection = names[spec.chain - 1], names[-1]
        self._input = _storage(given["x"])
        x = given["x"]
        routes = kernel_block.routes_of(spec, weights, tuple(x.shape), x.dtype, self._arch)
        self.reasons |= {name: own.fprop for name, own in zip(names, routes, strict=True)}

    def _add(self, launch: Launch, given: dict[str, Any], out: Any) -> None:
        unit = self._unit_of(launch.op, given)
        if launch.op in ("conv1x1", "conv2d", "fprop"):
            self._producers[_storage(out if launch.plan is None else out[0])] = unit
        self.found.append((unit, self.backward, launch))

    def _unit_of(self, op: str, given: dict[str, Any]) -> str:
        """By the weight if it is a parameter, else by the raw output that is read."""
        weight = given.get("weight")
        if weight is not None and _storage(weight) in self._names:
            self._last = self._names[_storage(weight)]
            return self._last
        if op in ("gram", "expand_dgrad") or (op == "conv1x1_wgrad" and given["u"] is None):  # they read the operand
            return self._projection if _storage(given["x"]) == self._input else self._end
        for name in ("u", "x"):
            t = given.get(name)
            if isinstance(t, Tensor) and _storage(t) in self._producers:
                return self._producers[_storage(t)]
        return self._last

    def _planned(self, func: Any, args: Any, given: dict[str, Any], out: Any) -> Launch:
        op, results = func._opname, out if isinstance(out, (tuple, list)) else (out,)
        tensors = {name: t for name, t in given.items() if isinstance(t, Tensor)}
        names = (r.name or "mask" for r in func._schema.returns)
        tensors |= {name: t for name, t in zip(names, results, strict=True) if t.numel()}
        problem = _problem(op, given, tensors)
        plan = plans.plan(op, problem, self._arch, dict.fromkeys(tensors, _SOMEWHERE))
        asked = Signature.of(op, args) if op in COMPOSED else None
        costs = tuple(costs_of(op, problem, tensors, plan))
        alike = tuple(replace(step, params=b"") for step in plan.steps)  # there are gaps in them, of any bytes
        return Launch(op, problem, replace(plan, steps=alike), costs, asked)


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _problem(op: str, given: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The fields of an op's problem, from its arguments and results."""
    first = tensors["dy"] if "dy" in tensors else tensors["x"]
    image = tensors.get("da", tensors.get("dx", tensors.get("x", first)))  # [N, C, H, W]
    n, c, h, w = image.shape
    weight = tensors.get("weight", tensors.get("dw"))
    every: dict[str, Any] = {"dtype": first.dtype, "M": n * h * w, "N": n, "H": h, "W": w, "C": c}
    every |= {name: int(given[name]) for name in ("relu", "wide", "kernel", "padding") if name in given}
    if isinstance(given.get("stride"), int):
        every["stride"] = given["stride"]
    if weight is not None:
        every["K"] = weight.shape[0]
        every |= {"R": weight.shape[2], "S": weight.shape[3]}
    if "geometry" in given:
        every |= dict(zip(_GEOMETRY, given["geometry"], strict=True))
    if "x2" in tensors:
        _, c2, h2, w2 = tensors["x2"].shape
        every |= {"C2": c2, "H2": h2, "W2": w2}
    fields = {field[0] for field in plans._PROBLEMS[op]._fields_}
    return {name: value for name, value in every.items() if name in fields}


def aten_launch(kind: str, x: Tensor, weight: Tensor, out: Tensor) -> Launch:
    """A convolution of ATen's: each of its three tensors is read or written once."""
    (n, c, h, w), (k, _, r, s) = x.shape, weight.shape
    sizes = [t.numel() * t.element_size() for t in (x, weight, out)]
    result = {"fprop": 2, "dgrad": 0, "wgrad": 1}[kind]
    flops = 2 * out.numel() * weight[0].numel()
    cost = Cost(sum(sizes) - sizes[result], sizes[result], flops, flops)
    return Launch(kind, {"N": n, "H": h, "W": w, "C": c, "K": k, "R": r, "S": s}, None, (cost,))


# ------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Trace:
    """A training step of a network: its launches, unit by unit, and how many other ops ATen runs."""

    rows: list[Row]
    small: int
    arch: int

    columns = ("unit", "input", "pass", "kernel", "grid", "KiB", "MiB", "GFLOP", "floor, us", "bound", "auto")

    def cells(self) -> Iterator[tuple[str, ...]]:
        """Blocks that are alike, one after the other, are one."""
        machine = MACHINES[self.arch]
        for row in folded(self.rows):
            launch = row.launch
            moved, flops = sum(c.moved for c in launch.costs), sum(c.flops for c in launch.costs)
            seconds, bound = machine.floor(moved, flops, len(launch.costs))
            kernel, grid, shared = f"ATen {launch.op}: {row.reason}", "", ""
            if launch.plan is not None and launch.plan.steps:
                step = launch.plan.steps[0]
                kernel, grid, shared = step.symbol, "x".join(map(str, step.grid[:2])), f"{step.smem / 1024:.0f}"
            elif launch.plan is not None:
                kernel = f"none: {launch.plan.reason}"
            yield (
                row.unit, row.shape, "backward" if row.backward else "forward", kernel, grid, shared,
                f"{moved / 2**20:.1f}", f"{flops / 1e9:.1f}", f"{seconds * 1e6:.1f}", bound, launch.auto,
            )  # fmt: skip

    @property
    def moved(self) -> int:
        """Bytes of all launches."""
        return sum(cost.moved for row in self.rows for cost in row.launch.costs)

    def floor(self) -> float:
        """Seconds that all launches take at the least, one after the other."""
        machine = MACHINES[self.arch]
        return sum(
            machine.floor(sum(c.moved for c in launch.costs), sum(c.flops for c in launch.costs), len(launch.costs))[0]
            for _, _, _, launch, _ in self.rows
        )

    def __str__(self) -> str:
        ours = sum(len(row.launch.costs) for row in self.rows if row.launch.plan is not None)
        aten = sum(row.launch.plan is None for row in self.rows)
        return (
            f"{ours} launches of our kernels and {aten} convolutions of ATen's move {self.moved / 2**30:.1f} GiB, "
            f"{self.floor() * 1e3:.1f} ms or more on an {MACHINES[self.arch].name}; beside them ATen runs {self.small} "
            "ops on vectors, small matrices and the head"
        )


def trace(
    name: str, batch: int, size: int = 224, memory: Memory = "lean", dtype: torch.dtype = torch.bfloat16,
    arch: int = 80, device: torch.device | None = None, training: bool = True,
) -> Trace:  # fmt: skip
    """A training step of torchvision's ResNet `name`, fused, as on a GPU of compute capability `arch` / 10, or without
    `training` an inference by given statistics; `device`: whose measurements are shown where there are any."""
    model = create(name, dtype, memory).train(training)
    convs = {key: m for key, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    tracer = _Tracer({_storage(m.weight): key for key, m in convs.items()}, arch)
    x = images(batch, size, dtype)
    graphs: list[Tensor] = []  # they keep raw outputs alive: no storage comes twice
    with as_on_a_gpu(), torch.autograd.set_multithreading_enabled(False), torch.set_grad_enabled(training):
        for stage in stages_of(model):
            with tracer:
                tracer.backward = False
                y = stage(x)
                tracer.backward = True
                inputs = [*([x] if graphs else []), *model.parameters()]
                if training:
                    torch.autograd.grad(y, inputs, torch.empty_like(y), True, allow_unused=True)
            graphs.append(y)
            x = y.detach().requires_grad_(training)
    order = {key: i for i, key in enumerate(convs)}
    found = sorted(tracer.found, key=lambda entry: (order[entry[0]], entry[1]))
    shapes = {unit: _shape(convs[unit], launch.problem) for unit, _, launch in reversed(found) if "H" in launch.problem}

    def with_choice(launch: Launch) -> Launch:  # not while tracing, which knows tensors by where they are
        return launch if launch.asked is None else replace(launch, auto=str(decide(launch.asked, device, arch)))

    rows = [
        Row(unit, shapes[unit], backward, with_choice(launch), tracer.reasons.get(unit, "not part of a block") or "")
        for unit, backward, launch in found
    ]
    return Trace(rows, tracer.small, arch)


def _shape(conv: nn.Conv2d, problem: dict[str, Any]) -> str:
    kernel = "x".join(map(str, conv.kernel_size))
    stride = f"/{conv.stride[0]}" if conv.stride[0] > 1 else ""
    groups = f", {conv.groups} groups" if conv.groups > 1 else ""
    size = f"{problem['H']}x{problem['W']}"
    return f"{size}, {conv.in_channels} -> {conv.out_channels}, {kernel}{stride}{groups}"


def folded(rows: Sequence[Row]) -> list[Row]:
    """Blocks that follow each other and are alike become one, under both names."""

    def split(name: str) -> tuple[str, str]:
        block, _, unit = name.partition(".")[2].partition(".") if name.startswith("layer") else (name, "", "")
        return (f"{name.split('.')[0]}.{block}", unit) if unit else (name, "")

    blocks = [(key, list(own)) for key, own in itertools.groupby(rows, key=lambda row: split(row.unit)[0])]
    out: list[Row] = []
    for _, run in itertools.groupby(blocks, key=lambda block: [(split(r.unit)[1], *r[1:]) for r in block[1]]):
        names, first = zip(*run, strict=True)
        last = names[-1].rpartition(".")[2]
        name = names[0] if len(names) == 1 else f"{names[0]}-{last}"
        out += [row._replace(unit=f"{name}.{unit}" if (unit := split(row.unit)[1]) else name) for row in first[0]]
    return out
