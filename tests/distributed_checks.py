"""What two processes check of norms that they share (nn.SyncBatchNorm); `test_distributed.py` starts them.

Each process has its part of a batch. The reference is eager PyTorch with nn.BatchNorm2d in one process on the whole
batch, which every process runs for itself.
"""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from conftest import (
    Case,
    Observed,
    observe_module,
    random_case,
    randomise,
    relative_error,
)
from distributed_tools import (
    HALVES,
    LOCAL,
    UNEQUAL,
    WORLD,
    Sizes,
    assert_close,
    check,
    fused,
    image,
    network,
    part,
    photos,
    sent,
    share_of,
    shared,
    summed,
    whole,
)
from test_gram_form import gram_case
from test_preact_block import Eager
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused.functional import ConvBN
from resnet_fused.ops import block, end_unit
from resnet_fused.ops.gram_form import cancelling
from resnet_fused.recorder import recording

# ------------------------------------------------------------------------------------------------------ blocks


def down(c: int, k: int, stride: int = 2) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=False), nn.BatchNorm2d(k))


BLOCKS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and the input's channels
    "basic": (lambda: rf.BasicBlock(8, 8), 8),
    "basic, stride 2": (lambda: rf.BasicBlock(8, 12, 2, down(8, 12)), 8),
    "bottleneck": (lambda: rf.Bottleneck(16, 4), 16),
    "bottleneck, projection": (lambda: rf.Bottleneck(8, 4, 1, down(8, 16, 1)), 8),
    "bottleneck, stride 2": (lambda: rf.Bottleneck(8, 4, 2, down(8, 16)), 8),
    "padded": (lambda: rf.BasicBlock(8, 12, 2, rf.PaddedShortcut(8, 12, 2)), 8),
    "scaled": (lambda: rf.ScaledBasicBlock(8, 8, branch_scale=0.3, shortcut_scale=0.7), 8),
    "scaled bottleneck": (lambda: rf.ScaledBottleneck(8, 4, 1, down(8, 16, 1), branch_scale=0.3), 8),
    "concat": (lambda: rf.ConcatBasicBlock(8, 4), 8),
    "concat bottleneck": (lambda: rf.ConcatBottleneck(8, 4), 8),
    "unit": (lambda: rf.ConvBNAct(8, 12, 3, padding=1), 8),
    "pre-activation": (lambda: rf.PreActBasicBlock(8, 8), 8),
    "pre-activation, stride 2": (lambda: rf.PreActBottleneck(8, 4, 2), 8),
    "pre-activation, sequence": (
        lambda: rf.PreActSequential(
            rf.PreActBasicBlock(8, 8), rf.PreActBasicBlock(8, 12, 2), rf.PreActBasicBlock(12, 12)
        ),
        8,
    ),
}


def composed(module: nn.Module) -> nn.Module:
    """The same modules run one by one."""
    if isinstance(module, rf.PreActBasicBlock | rf.PreActBottleneck | rf.PreActSequential):
        return Eager(module)
    for m in module.modules():
        m.register_forward_hook(lambda *_: None)
    return module


def run_block(kind: str, sizes: Sizes, memory: str = "lean", size: int = 6) -> tuple[Observed, Observed, list[Any]]:
    """(what this process sees, what it should see, the recorded calls)"""
    make, channels = BLOCKS[kind]
    block = randomise(make()).double()
    own, x = shared(block), image(sum(sizes), channels, size)
    own.memory = memory
    eager = composed(block)
    with torch.no_grad():
        dy = torch.randn_like(copy.deepcopy(eager)(x))
    with recording() as calls:
        seen = whole(observe_module(own, part(x, sizes), part(dy, sizes)))
    want = observe_module(eager, x, dy)
    return seen, share_of({name.replace("inner.", ""): t for name, t in want.items()}, sizes), calls


@check(*BLOCKS)
def block_is_that_of_the_whole_batch(kind: str) -> None:
    for sizes in (HALVES, UNEQUAL):
        for memory in ("lean", "fast"):
            seen, want, calls = run_block(kind, sizes, memory)
            assert all(call.reason is None for call in calls)
            assert len(calls) > 0
            assert_close(seen, want)


@check()
def every_plan_is_among_them() -> None:
    plans = set()
    for kind in ("bottleneck", "bottleneck, projection"):
        for memory in ("lean", "fast"):
            for size in (4, 12):
                seen, want, calls = run_block(kind, HALVES, memory, size)
                assert_close(seen, want)
                plans |= {unit.plan for unit in calls[0].spec.units[-2:]}
    assert plans == {"keep", "recompute", "gram"}, plans


# ------------------------------------------------------------------------------------------- functional calls


def run_case(case: Case, sizes: Sizes) -> list[Any]:
    """A call with a group on this process's part of x, against the plain one on all of it; the recorded calls."""

    def grouped(unit: Any) -> Any:
        return replace(unit, group=dist.group.WORLD) if isinstance(unit, ConvBN) else unit

    with torch.no_grad():
        dy = torch.randn_like(case.map(torch.clone).eager())
    want = case.observe("eager", dy)
    tensors = dict(case.named())
    own = {n: part(t, sizes).detach().requires_grad_(t.requires_grad) for n, t in tensors.items() if n in LOCAL}
    mine = case.with_tensors(tensors | own)
    mine = replace(mine, units=tuple(map(grouped, mine.units)), shortcut=grouped(mine.shortcut))
    with recording() as calls:
        seen = whole(mine.observe("fused", part(dy, sizes)))
    biases = [n for n in want if n.startswith("gradient") and n.endswith("bias")]
    assert all(relative_error(seen.pop(n), torch.zeros(())) < 1e-10 for n in biases)  # autograd leaves noise there
    assert_close(seen, share_of({n: t for n, t in want.items() if n not in biases}, sizes))
    return calls


OPTIONS: dict[str, dict[str, Any]] = {
    "cumulative average": {"momentum": None},
    "no running statistics": {"track": False},
    "no affine": {"affine": False},
    "bias": {"bias": True},
    "another eps": {"eps": 0.1},
    "given statistics": {"training": False},
}


def batch_of(case: Case, n: int) -> Case:
    return case.with_tensors(dict(case.named()) | {"x": image(n, case.x.shape[1], case.x.shape[2])})


@check(*OPTIONS)
def norms_with(kind: str) -> None:
    for shortcut in ("identity", "projection"):
        run_case(batch_of(random_case(3, shortcut, **OPTIONS[kind]), 16), UNEQUAL)


@check()
def frozen_parameters() -> None:
    for frozen in ("gamma", "beta", "weight", "x"):
        case = batch_of(random_case(3, "projection"), 16)
        run_case(case.with_tensors({n: t.detach() if n.endswith(frozen) else t for n, t in case.named()}), HALVES)


@check()
def one_pixel_a_process() -> None:
    case = batch_of(random_case(2, "identity", last_kernel=3, size=1), 2)
    run_case(case, (1, 1))


@check()
def an_empty_batch_takes_part() -> None:
    for shortcut in ("identity", "projection"):
        run_case(batch_of(random_case(3, shortcut), 6), (0, 6))
    for kind in ("pre-activation", "concat"):
        seen, want, _ = run_block(kind, (6, 0))
        assert_close(seen, want)
    model, (x, labels) = network().double(), photos(6)
    own = shared(fused(model))
    y = own(part(x, (0, 6)))
    nn.functional.cross_entropy(y, part(labels, (0, 6)), reduction="sum").backward()
    nn.functional.cross_entropy(model(x), labels, reduction="sum").backward()
    for got, want in zip(own.parameters(), model.parameters(), strict=True):
        assert relative_error(summed(got.grad), want.grad) < 1e-10
    assert_close(dict(own.named_buffers()), dict(model.named_buffers()))


@check()
def what_runs_as_plain_pytorch() -> None:
    case = batch_of(random_case(2, None), 16)
    residual = torch.randn(16, 1, 1, 1, dtype=torch.float64).requires_grad_()
    calls = run_case(Case(case.x, case.units, residual), UNEQUAL)
    assert "broadcasts" in calls[0].reason


@check("identity", "tensor", "projection")
def gram_outputs_that_cancel(shortcut: str) -> None:
    """On one process only, and on both."""
    for correlations in ((0.9999, 0.9999), (0.9999, 0.0)):
        parts = [gram_case(shortcut, correlation, "one across", size=12) for correlation in correlations]
        case, found = parts[0], []
        x = torch.cat([p.x.detach()[:1] for p in parts]).contiguous(memory_format=torch.channels_last).requires_grad_()

        def spy(*args: Any, found: list[int] = found) -> Tensor:
            found.append(cancelling(*args).numel())
            return cancelling(*args)

        with mock.patch.object(block, "cancelling", spy), mock.patch.object(end_unit, "cancelling", spy):
            run_case(case.with_tensors({**dict(case.named()), "x": x}), (1, 1))
        everyone = summed(torch.tensor(sum(found)))
        assert everyone > 0


# --------------------------------------------------------------------------------------------------- what is sent


@check()
def collectives_are_counted() -> None:
    """One a norm and direction, the projection's with the last norm's in forward; none in eval mode, nor alone."""
    alone = [dist.new_group([rank]) for rank in range(WORLD)][dist.get_rank()]
    for kind, forward, backward in (
        ("basic", 2, 2), ("bottleneck", 3, 3), ("bottleneck, projection", 3, 4), ("unit", 1, 1),
        ("pre-activation", 2, 2), ("pre-activation, sequence", 6, 6),
    ):  # fmt: skip
        make, channels = BLOCKS[kind]
        x = image(8, channels, 6)
        for module, *expected in (
            (shared(make()), forward, backward), (shared(make()).eval(), 0, 0), (shared(make(), alone), 0, 0),
            (make(), 0, 0),
        ):  # fmt: skip
            before = sent()
            y = module.double()(x)
            between = sent()
            y.sum().backward()
            assert [between - before, sent() - between] == expected, kind
            with torch.no_grad():
                module(x)
            assert sent() - between == sum(expected), kind


@check()
def explain_tells_of_them() -> None:
    row = rf.explain(shared(BLOCKS["bottleneck, projection"][0]()), image(8, 8, 6, torch.float32)).rows[0]
    assert row.reason.endswith("statistics of 2 processes: 3 + 4 collectives, forward + backward")
    row = rf.explain(shared(BLOCKS["basic"][0]()).eval(), image(8, 8, 6, torch.float32)).rows[0]
    assert "collectives" not in row.reason
    model = network()
    rf.fuse_(model)
    rows = {row.name: row.reason for row in rf.explain(shared(model), torch.randn(4, 3, 32, 32)).rows}
    assert "1 + 1 collectives" in rows["bn1"]
    assert "2 + 2 collectives" in rows["layer1.0"]


@check()
def groups_of_some_processes() -> None:
    """Norms of a group that this process is not in, or alone in, are its own."""
    first = dist.new_group([0])
    case = batch_of(random_case(2, "identity", last_kernel=3), 4)
    units = tuple(ConvBN(**(vars(unit) | {"group": first})) for unit in case.units)
    x = case.x.detach()
    got = rf.functional.residual_block(x, units)
    assert relative_error(got, rf.functional.residual_block(x, case.units)) < 1e-12


@check()
def settings_that_differ_are_errors() -> None:
    """Other channels, and other modes, where PyTorch watches a group's collectives: the one at once, the other when its
    time is over."""
    level, messages = dist.get_debug_level(), []
    for seconds, mode in ((60, True), (2, dist.get_rank() == 0)):
        dist.set_debug_level(dist.DebugLevel.DETAIL)
        group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=seconds))
        dist.set_debug_level(level)
        width = 8 + 4 * dist.get_rank()
        block = shared(rf.BasicBlock(width, width), group).double().train(mode)
        try:
            block(image(2, width, 5))
        except RuntimeError as error:
            messages.append(str(error))
    assert "Detected mismatch between collectives" in messages[0], messages
    assert len(messages) == (1 if dist.get_rank() else 2), messages
