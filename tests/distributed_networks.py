"""The checks of `distributed_checks.py` on whole networks under DistributedDataParallel, in 16 bits and compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from conftest import (
    Observed,
    assert_agrees,
    geometric_mean,
    observe_module,
    randomise,
    relative_error,
)
from distributed_checks import BLOCKS, composed, down
from distributed_tools import (
    HALVES,
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
    share_of,
    shared,
    whole,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet

import resnet_fused as rf
from resnet_fused.ops.pointwise import as_on_a_gpu
from resnet_fused.recorder import recording

# ------------------------------------------------------------------------------------------------------ networks


def parallel(model: nn.Module, **options: Any) -> DistributedDataParallel:
    """Under DDP, which on a CPU refuses a SyncBatchNorm in what it is given: the norms are converted behind it."""
    own = DistributedDataParallel(model, **options)
    nn.SyncBatchNorm.convert_sync_batchnorm(own.module)
    return own


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
