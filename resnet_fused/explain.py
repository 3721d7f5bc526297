"""`explain`: what runs fused, by which plan and why, and the bytes it moves and keeps against eager PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import BNReLU, BNReLUMaxPool, ConvBNAct, FusedBlock, FusedStem, GateAct, Join, PreActBlock
from .modules import group_of
from .ops.bn_act_pool import Pool
from .ops.preact_block import PreActSpec
from .ops.sync import Group
from .planner import explain_units, special_shortcut
from .recorder import Call, Pass, recording
from .traffic import Bytes, block_bytes, stem_bytes, units_on_kernels

_OURS = (FusedBlock, PreActBlock, ConvBNAct, BNReLU, BNReLUMaxPool, GateAct, Join)


@dataclass(frozen=True)
class Row:
    """One line of the table. Bytes are of a training step by passes (`traffic.py`), None where not counted."""

    name: str
    kind: str
    shape: tuple[int, ...]
    plan: str
    reason: str
    moved: float | None = None
    moved_eager: float | None = None
    saved: float | None = None
    saved_eager: float | None = None


@dataclass
class Explanation:
    """`rows` in the order of execution; `str()` is a plain table, `columns` and `cells` serve other renderers."""

    rows: list[Row] = field(default_factory=list)

    columns = ("unit", "kind", "input", "plan", "moved (of eager)", "kept (of eager)", "reason")

    def cells(self) -> list[tuple[str, ...]]:
        return [
            (
                row.name,
                row.kind,
                "x".join(map(str, row.shape)),
                row.plan,
                _against(row.moved, row.moved_eager),
                _against(row.saved, row.saved_eager),
                row.reason,
            )
            for row in self.rows
        ]

    def total(self) -> Row:
        """The sums over the counted rows."""
        counted = [row for row in self.rows if row.moved is not None]

        def add(field: str) -> float:
            return sum(getattr(row, field) for row in counted)

        return Row(
            "total", f"{len(counted)} units", (), "", "", add("moved"), add("moved_eager"), add("saved"),
            add("saved_eager"),
        )  # fmt: skip

    def __str__(self) -> str:
        table = [self.columns, *self.cells(), *Explanation([self.total()]).cells()]
        widths = [max(len(row[i]) for row in table) for i in range(len(self.columns))]
        return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in table)


def _against(ours: float | None, eager: float | None) -> str:
    if ours is None or not eager:
        return ""
    return f"{ours / 2**20:,.1f} MiB ({ours / eager:.2f})"


def explain(model: nn.Module, example_input: Tensor) -> Explanation:
    """Run `model` once on `example_input` [N, C, H, W] and tell how each part of it ran.

    example_input: of any dtype that the model takes. The mode (train or eval) is the model's; buffers and random state
    are put back afterwards. Bytes are those of a training step, forward and backward. Where norms are shared by several
    processes, each of them makes the call. `print` of the result is a table.
    Raises TypeError for a `model` that is no module; else what the model itself raises for this input.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected an nn.Module")
    explanation = Explanation()
    with ExitStack() as stack:
        stack.enter_context(unchanged(model))
        calls = stack.enter_context(recording())
        for name, module in _watched(model):
            handles = _watch(name, module, calls, explanation)
            for handle in handles:
                stack.callback(handle.remove)
        for name, network in model.named_modules():
            if isinstance(network, FusedStem):
                _watch_stem(f"{name}." if name else "", network, calls, explanation)
                stack.callback(vars(network).pop, "stem")
        stack.enter_context(torch.set_grad_enabled(model.training))
        model(example_input)
    return explanation


def _watched(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Fused modules, and the leaves outside of them that hold parameters."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        if isinstance(module, FusedStem):
            inside.add(id(module.bn1))  # a hook there would make the stem run composed
            if type(module.conv1) is nn.Conv2d:
                inside.add(id(module.conv1))
        if isinstance(module, _OURS):
            inside.update(id(child) for child in module.modules())
            yield name or "model", module
        elif not any(module.children()) and any(True for _ in module.parameters()):
            yield name, module


def _watch(name: str, module: nn.Module, calls: list[Call], out: Explanation) -> list[Any]:
    def before(_module: nn.Module, args: tuple) -> None:
        calls.clear()

    def after(module: nn.Module, args: tuple, _output: Any) -> None:
        if isinstance(module, _OURS):
            out.rows.extend(_row(name, type(module).__name__, module, call) for call in calls)
            calls.clear()
            return
        out.rows.append(_not_ours(name, module, args[0] if args else None))

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def _watch_stem(prefix: str, network: FusedStem, calls: list[Call], out: Explanation) -> None:
    """Until `stem` is deleted from the network's own attributes."""

    def stem(x: Tensor) -> Tensor:
        calls.clear()
        y = type(network).stem(network, x)
        whole = any(call.units for call in calls)
        if type(network.conv1) is nn.Conv2d and not whole:
            out.rows.append(_not_ours(f"{prefix}conv1", network.conv1, x))
        kind = network.stem_kind
        name, kind = ("conv1", f"Conv2d+{kind}") if whole else ("bn1", kind)
        out.rows.extend(_row(prefix + name, kind, network, call) for call in calls)
        return y

    network.stem = stem  # type: ignore[method-assign]


def _not_ours(name: str, module: nn.Module, x: Any) -> Row:
    shape = tuple(x.shape) if isinstance(x, Tensor) else ()
    return Row(name, type(module).__name__, shape, "eager", "not part of a block or stem")


def _row(name: str, kind: str, module: nn.Module, call: Call) -> Row:
    if call.reason is not None:
        return Row(name, kind, call.x_shape, "eager", call.reason)
    spec: Any = call.spec
    if isinstance(spec, Pass):
        return Row(name, kind, call.x_shape, spec.plan, spec.what)
    if isinstance(spec, PreActSpec):
        reason = "normalised, activated and added in the passes between" + _collectives(spec.groups)
        return Row(name, kind, call.x_shape, "fused", reason)
    if isinstance(spec, Pool):
        tail = "batch norm, ReLU and max pool in one pass"
        tail += _collectives([Group.of(group_of(getattr(module, "bn1", module)))])
        plan, reason = ("cuda: conv", f"statistics with the convolution, {tail}") if call.units else ("fused", tail)
        return _counted(name, kind, call, plan, reason, *stem_bytes(call))
    projected = spec.shortcut == "projection"
    everything = [*call.units, *([call.shortcut] if projected else [])]
    special = special_shortcut(spec.shortcut, spec.shortcut_scale)
    asked = (projected, _memory(module), call.dtype, call.kernels, special, call.device)
    reasons = explain_units(call.x_shape, everything, *asked)
    ends = [reasons[spec.chain - 1], *([reasons[-1]] if projected else [])]
    on_kernels = call.kernels and any(units_on_kernels(call))
    plan = ("cuda: " if on_kernels else "aten: ") + " + ".join(p for p, _ in ends)
    why = dict.fromkeys([*(r for _, r in ends), *([special] if special else [])])
    groups = [unit.group for unit in spec.units]
    sent = _collectives(groups, together=projected and groups[-1] == groups[-2])
    return _counted(name, kind, call, plan, "; ".join(why) + sent, *block_bytes(call))


def _collectives(groups: Sequence[Group | None], together: bool = False) -> str:
    """What a unit's norms send; `together`: the last two in one message."""
    shared = [group for group in groups if group is not None]
    if not shared:
        return ""
    size = "/".join(dict.fromkeys(str(group.size) for group in shared))
    return (
        f"; statistics of {size} processes: {len(shared) - (together and groups[-1] is not None)} + {len(shared)} "
        "collectives, forward + backward"
    )


def _counted(name: str, kind: str, call: Call, plan: str, reason: str, eager: Bytes, ours: Bytes) -> Row:
    return Row(name, kind, call.x_shape, plan, reason, ours.moved, eager.moved, ours.saved, eager.saved)


def _memory(module: nn.Module) -> str:
    return getattr(module, "memory", "lean")


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Puts the model's buffers and the random state back."""
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        with torch.no_grad():
            for buffer, kept in buffers:
                buffer.copy_(kept)
