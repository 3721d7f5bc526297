"""Pre-activation blocks: the op, the function, the modules, and statistics handed from block to block."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Observed, assert_agrees, observe_module, random_unit, randomise, relative_error
from device import DEVICES, Device
from op_cases import activation, ops
from pointwise_cases import HALVES
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused import functional
from resnet_fused.functional import BNConv, ConvBN
from resnet_fused.preact import PreActBlock
from resnet_fused.recorder import recording


def bn_conv(c: int, k: int, kernel: int, stride: int = 1, **fields: Any) -> BNConv:
    """A unit whose norm is that of its input's channels."""
    norm = random_unit(1, c, 1, **fields)
    conv = random_unit(c, k, kernel, norm=False)
    where = {"stride": (stride, stride), "padding": (kernel // 2,) * 2}
    return BNConv(**{**vars(norm), "weight": conv.weight, **where})


def units_of(kind: str, **fields: Any) -> tuple[list[BNConv], ConvBN | None]:
    if kind == "identity":
        return [bn_conv(6, 4, 3, **fields), bn_conv(4, 6, 3, **fields)], None
    if kind == "bottleneck":
        return [bn_conv(6, 3, 1, **fields), bn_conv(3, 3, 3, **fields), bn_conv(3, 6, 1, **fields)], None
    projection = random_unit(6, 8, 1, norm=False, stride=(2, 2))
    return [bn_conv(6, 4, 3, 2, **fields), bn_conv(4, 8, 3, **fields)], projection


KINDS = ["identity", "bottleneck", "projection"]


@pytest.mark.parametrize("handed", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, training: bool, handed: bool) -> None:
    units, projection = units_of(kind, training=training)
    x = activation(2, 6, 5, 4, torch.float64).requires_grad_()
    leaves = [x, *(t for u in units for t in (u.weight, u.gamma, u.beta))]
    leaves += [] if projection is None else [projection.weight]

    def call(*tensors: Tensor) -> Tensor:
        own = [replace(u, weight=w, gamma=g, beta=b, running_mean=u.running_mean.clone(), num_batches_tracked=None)
               for u, w, g, b in zip(units, tensors[1:-1:3], tensors[2::3], tensors[3::3], strict=False)]  # fmt: skip
        if projection is None:
            own[-1] = replace(own[-1], weight=tensors[-3])
        last = projection if projection is None else replace(projection, weight=tensors[-1])
        stats = ops.bn_stats(tensors[0].detach()) if handed else None
        return functional.preact_block(tensors[0], own, last, stats)[0]

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


# ------------------------------------------------------------------------------------------------ modules


class Eager(nn.Module):
    """The same modules, one by one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        for block in self.inner if isinstance(self.inner, nn.Sequential) else [self.inner]:
            x = block.composed(x) if isinstance(block, PreActBlock) else block(x)
        return x


def stage() -> nn.Module:
    return rf.PreActSequential(
        rf.PreActBasicBlock(16, 16), rf.PreActBasicBlock(16, 32, 2), rf.PreActBottleneck(32, 8), nn.BatchNorm2d(32)
    )


def shared() -> nn.Module:
    """One block twice: its norms count two batches."""
    block = rf.PreActBasicBlock(16, 16)
    return rf.PreActSequential(block, block)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: rf.PreActBasicBlock(16, 16),
    "basic, stride 2": lambda: rf.PreActBasicBlock(16, 32, 2),
    "bottleneck": lambda: rf.PreActBottleneck(16, 4),
    "bottleneck, kernels": lambda: rf.PreActBottleneck(32, 8),
    "bottleneck, stride 2": lambda: rf.PreActBottleneck(16, 8, 2),
    "stage": stage,
    "shared": shared,
}


def draw(
    kind: str, dtype: torch.dtype, seed: int, run: Callable[..., Any], training: bool = True
) -> tuple[Observed, Observed, Observed]:
    torch.manual_seed(seed)
    fused = randomise(MODULES[kind]()).train(training)
    eager = Eager(copy.deepcopy(fused)).to(dtype).train(training)
    exact = copy.deepcopy(eager).double()
    n, h, w = (8, 15, 13) if dtype in HALVES else (4, 9, 7)  # of a ReLU's signs some flip by rounding: of many
    x = activation(n, 32 if "kernels" in kind else 16, h, w, dtype).requires_grad_()
    dy = torch.randn(copy.deepcopy(eager)(x).shape).to(dtype)
    seen = (observe_module(eager, x, dy), observe_module(exact, x.double(), dy.double()))
    plain, wide = ({name.replace("inner.", ""): t for name, t in s.items()} for s in seen)
    return run(observe_module, fused.to(dtype), x, dy), plain, wide


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", MODULES)
def test_agrees_with_eager(kind: str, training: bool) -> None:
    # In float16 a ReLU's sign flips so rarely that chance decides a few draws: it gets many.
    for dtype, count in ((torch.float32, 4), (torch.bfloat16, 6), (torch.float16, 20), (torch.float64, 2)):
        assert_agrees([draw(kind, dtype, seed, lambda f, *a: f(*a), training) for seed in range(count)], dtype)


@pytest.mark.parametrize("name", [name for name in DEVICES if name != "cpu"])
@pytest.mark.parametrize("kind", ["basic", "bottleneck, kernels", "bottleneck, stride 2", "stage"])
def test_agrees_on_kernels(kind: str, name: str) -> None:
    device = Device(name)
    assert_agrees([draw(kind, torch.bfloat16, seed, device.run) for seed in range(4)], torch.bfloat16)
    if name == "emulated":
        symbols = " ".join(device.symbols)
        assert ("add_stats" in symbols) == (kind == "stage")
        assert ("conv1x1_dgrad_gate" in symbols) == (kind != "basic")


def test_a_sequence_takes_no_statistics_of_what_a_block_wrote() -> None:
    """Of three blocks only the first reads its input for them, and once more for the norm behind the second's conv."""
    counts = {"bn_stats": 0, "add_stats": 0}

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func._opname
            if name == "preact_block":
                counts["handed"] = counts.get("handed", 0) + bool(args[6])
                counts["handed on"] = counts.get("handed on", 0) + bool(args[10])
            return func(*args, **(kwargs or {}))

    blocks = rf.PreActSequential(*(rf.PreActBasicBlock(8, 8) for _ in range(3)))
    x = activation(2, 8, 5, 5, torch.float32)
    with Count():
        blocks(x)
    assert (counts["handed"], counts["handed on"]) == (2, 2)
    counts.clear()
    with Count():
        blocks.eval()(x)
    assert (counts["handed"], counts["handed on"]) == (0, 0)


def test_handed_statistics_are_those_of_the_output() -> None:
    block = randomise(rf.PreActBasicBlock(8, 8)).double()
    x = activation(2, 8, 5, 5, torch.float64)
    y, stats = block.run(x, hand_on=True)
    assert stats is not None
    var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    assert relative_error(stats[0], mean) < 1e-12
    assert relative_error(stats[1], var) < 1e-12
    assert not stats[0].requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_frozen_parts(training: bool) -> None:
    for frozen in ("x", "weight", "conv"):
        fused = randomise(rf.PreActBasicBlock(8, 8)).double().train(training)
        for name, p in fused.named_parameters():
            p.requires_grad_(frozen not in name)
        eager = Eager(copy.deepcopy(fused))
        x = activation(2, 8, 5, 5, torch.float64).requires_grad_(frozen != "x")
        dy = torch.randn(2, 8, 5, 5, dtype=torch.float64)
        got, want = observe_module(fused, x, dy), observe_module(eager, x, dy)
        want = {name.replace("inner.", ""): t for name, t in want.items()}
        assert got.keys() == want.keys()
        assert all(relative_error(got[name].double(), t.double()) < 1e-9 for name, t in want.items())


def test_hooks_and_foreign_modules_run_composed() -> None:
    x = activation(2, 8, 5, 5, torch.float32)
    for change in ("hook", "bias", "foreign"):
        block = randomise(rf.PreActBasicBlock(8, 8)).eval()
        seen: list[Any] = []
        if change == "hook":
            block.conv1.register_forward_hook(lambda *a, seen=seen: seen.append(a))
        elif change == "bias":
            block.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        else:
            block.bn2 = nn.GroupNorm(2, 8)
        with recording() as calls:
            y = rf.PreActSequential(block, block)(x)
        assert all(call.reason for call in calls)
        assert relative_error(y, block.composed(block.composed(x))) < 1e-6
        assert bool(seen) == (change == "hook")


def test_a_hook_on_a_block_sees_it_called() -> None:
    blocks, seen = rf.PreActSequential(*(rf.PreActBasicBlock(8, 8) for _ in range(2))), []
    blocks[1].register_forward_hook(lambda *a: seen.append(a))
    blocks(activation(2, 8, 5, 5, torch.float32))
    assert len(seen) == 1


def test_explain_shows_it_fused() -> None:
    rows = rf.explain(stage(), activation(2, 16, 8, 8, torch.float32)).rows
    assert [row.plan for row in rows] == ["fused", "fused", "fused", "eager"]


def test_compiles_and_exports() -> None:
    torch.compiler.reset()
    block, x = (
        randomise(rf.PreActSequential(*(rf.PreActBasicBlock(8, 8) for _ in range(2)))),
        activation(2, 8, 5, 5, torch.float32),
    )
    dy = torch.ones(2, 8, 5, 5)
    want = observe_module(copy.deepcopy(block), x.requires_grad_(), dy)
    got = observe_module(torch.compile(copy.deepcopy(block), fullgraph=True), x, dy)
    got = {name.replace("_orig_mod.", ""): t for name, t in got.items()}
    assert all(relative_error(got[name].double(), t.double()) < 1e-5 for name, t in want.items())


def test_second_derivatives_raise() -> None:
    x = activation(2, 8, 5, 5, torch.float64).requires_grad_()
    (dx,) = torch.autograd.grad(rf.PreActBasicBlock(8, 8).double()(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(dx.sum(), x)


def test_autocast() -> None:
    block = randomise(rf.PreActSequential(*(rf.PreActBasicBlock(8, 8) for _ in range(2))))
    x = activation(4, 8, 9, 9, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = block(x), Eager(copy.deepcopy(block))(x)
    assert got.dtype == torch.bfloat16
    assert relative_error(got, want) < 5e-2


BAD = {
    "no units": (lambda u, x: functional.preact_block(x, []), "units is empty"),
    "shape": (lambda u, x: functional.preact_block(x, u[:1]), r"x has shape \[2, 6, 5, 4\], expected \[2, 4, 5, 4\]"),
    "gamma": (
        lambda u, x: functional.preact_block(x, [replace(u[0], gamma=torch.ones(4)), u[1]]),
        r"units\[0\].gamma has shape \[4\] on cpu, expected \[6\]",
    ),
    "no norm": (
        lambda u, x: functional.preact_block(x, [replace(u[0], has_norm=False), u[1]]),
        r"units\[0\] has no norm",
    ),
    "stats": (
        lambda u, x: functional.preact_block(x, u, None, (torch.ones(6), torch.ones(6))),
        r"stats: mean is \[6\] torch.float32 on cpu, expected \[6\] torch.float64 on cpu",
    ),
    "projection's norm": (
        lambda u, x: functional.preact_block(x, u, random_unit(6, 6)),
        "projection has a norm, expected has_norm=False",
    ),
    "one value": (lambda u, x: functional.preact_block(x[:1, :, :1, :1], u), "Expected more than 1 value per channel"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_arguments(kind: str) -> None:
    call, message = BAD[kind]
    units, _ = units_of("identity")
    before = [u.running_mean.clone() for u in units]
    with pytest.raises(ValueError, match=message):
        call(units, activation(2, 6, 5, 4, torch.float64))
    assert all(torch.equal(u.running_mean, old) for u, old in zip(units, before, strict=True))
