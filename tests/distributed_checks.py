"""What two processes check of norms that they share (nn.SyncBatchNorm); `test_distributed.py` starts them.

Each process has its part of a batch. The reference is eager PyTorch with nn.BatchNorm2d in one process on the whole
batch, which every process runs for itself.
"""

from __future__ import annotations

import copy
import datetime
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conftest import (
    Case,
    Observed,
    assert_agrees,
    geometric_mean,
    observe_module,
    random_case,
    randomise,
    relative_error,
)
from test_gram_form import gram_case
from test_preact_block import Eager
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet

import resnet_fused as rf
from resnet_fused.functional import ConvBN
from resnet_fused.ops.pointwise import as_on_a_gpu
from resnet_fused.recorder import recording

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


def run_all(rank: int, folder: str, names: Sequence[str]) -> None:
    """Process `rank`: the checks' errors, by name, into a file."""
    torch.set_num_threads(1)
    warnings.filterwarnings("error", "Grad strides|.*custom operator")  # DDP's, and of outputs that share memory
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=WORLD, timeout=timeout)
    errors = {}
    for name in names:
        torch.manual_seed(0)
        torch.compiler.reset()
        try:
            CHECKS[name]()
        except Exception:
            errors[name] = traceback.format_exc()
            print(f"process {rank}, {name}: {errors[name]}", file=sys.stderr)  # the other may not live to tell
    torch.save(errors, Path(folder) / f"errors-{rank}")
    dist.destroy_process_group()


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
    from resnet_fused.ops import block

    for correlations in ((0.9999, 0.9999), (0.9999, 0.0)):
        parts = [gram_case(shortcut, correlation, "one across", size=12) for correlation in correlations]
        case, found, original = parts[0], [], block.cancelling
        x = torch.cat([p.x.detach()[:1] for p in parts]).contiguous(memory_format=torch.channels_last).requires_grad_()

        def spy(*args: Any, found: list[int] = found, original: Any = original) -> Tensor:
            found.append(original(*args).numel())
            return original(*args)

        block.cancelling = spy
        try:
            run_case(case.with_tensors({**dict(case.named()), "x": x}), (1, 1))
        finally:
            block.cancelling = original
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


# ------------------------------------------------------------------------------------------------------ networks


def network() -> nn.Module:
    """A ResNet-18 of two blocks: stem, identity, projection."""
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 10)
    return randomise(model)


def fused(model: nn.Module) -> nn.Module:
    own = copy.deepcopy(model)
    assert not rf.fuse_(own).composed
    return own


def parallel(model: nn.Module, **options: Any) -> DistributedDataParallel:
    """Under DDP, which on a CPU refuses a SyncBatchNorm in what it is given: the norms are converted behind it."""
    own = DistributedDataParallel(model, **options)
    nn.SyncBatchNorm.convert_sync_batchnorm(own.module)
    return own


def photos(n: int, dtype: torch.dtype = torch.float64, size: int = 32) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, size, size, dtype=torch.float64).to(dtype), torch.randint(10, (n,))


def train(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], accumulate: int = 1, context: Any = nullcontext
) -> Observed:
    """SGD with momentum, a step every `accumulate` batches; what the model is then."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    for i, (x, labels) in enumerate(batches):
        last = i % accumulate == accumulate - 1
        with nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync():
            with context():
                loss = nn.functional.cross_entropy(model(x), labels) / accumulate
            loss.backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
    state = model.module.state_dict() if isinstance(model, DistributedDataParallel) else model.state_dict()
    return {name: t.clone() for name, t in state.items()}


def mine(batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(x.chunk(WORLD)[dist.get_rank()], labels.chunk(WORLD)[dist.get_rank()]) for x, labels in batches]


@check("plain", "accumulated", "channels_last", "compiled")
def three_steps_with_ddp(how: str) -> None:
    """Those of one process on the whole batch."""
    model = network().double()
    accumulate = 2 if how == "accumulated" else 1
    batches = [photos(16 // accumulate) for _ in range(3 * accumulate)]
    if how == "channels_last":
        batches = [(x.contiguous(memory_format=torch.channels_last), labels) for x, labels in batches]
    own = fused(model)
    if how == "compiled":
        own.compile(fullgraph=True, backend="aot_eager")
    seen = train(parallel(own), mine(batches), accumulate)
    assert_close(seen, train(model, batches, accumulate), 1e-9)


@check()
def before_and_after_fuse() -> None:
    """convert_sync_batchnorm in front of fuse_, and unfuse_."""
    model, (x, _) = network(), photos(4, torch.float32)
    one, other = shared(fused(model)), shared(model)
    assert not rf.fuse_(other).composed
    assert torch.equal(one(x), other(x))
    with recording() as calls:
        one(x)
    assert [call.reason for call in calls] == [None] * 3
    rf.unfuse_(other)
    assert type(other) is resnet.ResNet
    assert type(other.layer1[0].bn1) is nn.SyncBatchNorm


@check()
def unused_blocks() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = rf.BasicBlock(8, 8), rf.BasicBlock(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model, x = randomise(Two()).double(), image(16, 8, 6)
    ddp = parallel(copy.deepcopy(model), find_unused_parameters=True)
    ddp(part(x, HALVES)).square().mean().backward()
    composed(model.used)(x).square().mean().backward()
    for got, want in zip(ddp.module.parameters(), model.parameters(), strict=True):
        assert (got.grad is None) == (want.grad is None)
        assert got.grad is None or relative_error(got.grad, want.grad) < 1e-10


# ------------------------------------------------------------------------------------------ 16 bits, and kernels


KERNELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "bottleneck": (lambda: rf.Bottleneck(32, 8), 32),
    "bottleneck, stride 2": (lambda: rf.Bottleneck(16, 8, 2, down(16, 32)), 16),
    "basic, projection": (lambda: rf.BasicBlock(8, 16, 2, down(8, 16)), 8),
    "pre-activation": (lambda: rf.PreActBottleneck(32, 8), 32),
    "concat": (lambda: rf.ConcatBottleneck(16, 8), 16),
}


def draw_kernels(
    kind: str, dtype: torch.dtype, sizes: Sizes, memory: str, place: Any
) -> tuple[Observed, Observed, Observed]:
    make, channels = KERNELS[kind]
    block, x = randomise(make()), image(sum(sizes), channels, 12, dtype)
    own, exact, eager = (
        shared(block).to(dtype),
        composed(copy.deepcopy(block)).double(),
        composed(copy.deepcopy(block)).to(dtype),
    )
    exact.load_state_dict({n: t.double() for n, t in eager.state_dict().items()})
    own.load_state_dict({n.replace("inner.", ""): t for n, t in eager.state_dict().items()})
    own.memory = memory
    with torch.no_grad():
        dy = torch.randn(copy.deepcopy(exact)(x.double()).shape).to(dtype)
    with place():
        seen = whole(observe_module(own, part(x, sizes), part(dy, sizes)))
    runs = (observe_module(eager, x, dy), observe_module(exact, x.double(), dy.double()))
    plain, wide = (share_of({n.replace("inner.", ""): t for n, t in run.items()}, sizes) for run in runs)
    return seen, plain, wide


@check(*KERNELS)
def blocks_on_the_matrix_kernels(kind: str) -> None:
    """Composed of ATen's convolutions, as on a GPU; their sums over pixels are of 16-bit products."""
    for memory in ("lean", "fast"):
        draws = [draw_kernels(kind, torch.bfloat16, UNEQUAL, memory, as_on_a_gpu) for _ in range(6)]
        assert_agrees(draws, torch.bfloat16, geometric_mean)


@check("bfloat16", "float16", "bfloat16, kernels")
def autocast(kind: str) -> None:
    """A step of a network under autocast, with float16 one of a GradScaler; the stem too on the matrix kernels."""
    name, _, kernels = kind.partition(", ")
    dtype, place = getattr(torch, name), as_on_a_gpu if kernels else nullcontext

    def step(model: nn.Module, x: Tensor, labels: Tensor, low: bool) -> Observed:
        scaler = torch.amp.GradScaler("cpu", 1024.0, enabled=low and dtype == torch.float16)
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        with torch.autocast("cpu", dtype, enabled=low):
            y = model(x)
            loss = nn.functional.cross_entropy(y, labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        module = model.module if isinstance(model, DistributedDataParallel) else model
        return {"y": y.detach().float(), **{n: t.clone() for n, t in module.state_dict().items()}}

    draws = []
    for _ in range(3):
        model, (x, labels) = network(), photos(16, torch.float32, 16)
        own, exact = parallel(fused(model)), copy.deepcopy(model).double()
        ((x_own, labels_own),) = mine([(x, labels)])
        with place(), recording() as calls:
            seen = step(own, x_own, labels_own, True)
        assert bool(calls[0].units) == bool(kernels)
        wide, plain = step(exact, x.double(), labels, False), step(model, x, labels, True)
        draws.append((seen, share_of(plain, HALVES), share_of(wide, HALVES)))
    assert_agrees(draws, dtype, geometric_mean)


@check()
def compiled_blocks() -> None:
    for kind in ("bottleneck, projection", "pre-activation, sequence"):
        make, channels = BLOCKS[kind]
        block, x = randomise(make()).double(), image(16, channels, 6)
        dy = torch.randn_like(copy.deepcopy(block)(x).detach())
        one = observe_module(shared(block), part(x, UNEQUAL), part(dy, UNEQUAL))
        compiled = torch.compile(shared(block), fullgraph=True, backend="aot_eager")
        seen = observe_module(compiled, part(x, UNEQUAL), part(dy, UNEQUAL))
        assert_close({name.replace("_orig_mod.", ""): t for name, t in seen.items()}, one, 1e-12)


SLOW = ("emulated", "inductor")


@check("bottleneck", "bottleneck, stride 2", "basic, projection")
def emulated(kind: str) -> None:
    """The CUDA kernels themselves, each process's on its emulator."""
    from device import Device

    device = Device("emulated")
    draws = [draw_kernels(kind, torch.bfloat16, UNEQUAL, "lean", lambda: device._kernels(0)) for _ in range(2)]
    assert_agrees(draws, torch.bfloat16, geometric_mean)
    assert device.symbols


@check()
def inductor() -> None:
    model, batches = network(), [photos(16, torch.float32)]
    own = fused(model)
    own.compile(fullgraph=True)
    seen = train(parallel(own), mine(batches))
    assert_close(seen, train(model, batches), 1e-4)
