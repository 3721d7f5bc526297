"""On a real GPU: streams, several devices, steps without synchronisation, and CUDA graphs.

What of it can be shown without one is in test_launch.py (made-up GPUs) and test_host_sync.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from conftest import Observed, randomise
from device import on_gpus
from op_cases import activation, same_bits
from test_device import block
from torch import Tensor, nn

import resnet_fused as rf

OPS = torch.ops.resnet_fused
SPIN = 50_000_000  # cycles, some 30 ms: what is queued behind it has certainly not run yet
KINDS = ("identity", "projection", "stride 2")


def bottleneck(kind: str, device: str = "cuda", memory: str = "lean") -> nn.Module:
    torch.manual_seed(0)
    module = randomise(block(rf, "Bottleneck", kind)).bfloat16()
    module.memory = memory
    return module.to(device)


def step(module: nn.Module, x: Tensor, dy: Tensor) -> Observed:
    """Output, gradients and running statistics."""
    parameters = dict(module.named_parameters())
    y = module(x)
    grads = torch.autograd.grad(y, [x, *parameters.values()], dy)
    seen = {"y": y.detach(), **dict(zip(["x", *parameters], grads, strict=True))}
    return seen | {name: b.clone() for name, b in module.named_buffers()}


def inputs(module: nn.Module, kind: str, device: str = "cuda") -> tuple[Tensor, Tensor]:
    x = activation(4, 32, 15, 13, torch.bfloat16).to(device).requires_grad_()
    with torch.no_grad():
        y = copy.deepcopy(module)(x)
    return x, torch.randn(y.shape).to(y).contiguous(memory_format=torch.channels_last)


def assert_same(got: Observed, want: Observed) -> None:
    assert got.keys() == want.keys()
    assert [name for name in want if not same_bits(got[name].cpu(), want[name].cpu())] == []


def deterministic(test: Callable[[], None]) -> Callable[[], None]:
    """cuDNN's 3x3 convolutions too."""

    def run() -> None:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False, allow_tf32=False):
            test()

    run.__name__ = test.__name__
    return run


@on_gpus(1)
def test_ops_run_on_the_current_stream() -> None:
    """Behind what the stream has to do before: the input is written late, and the other streams are idle."""
    x = activation(8, 64, 28, 28, torch.bfloat16).cuda()
    want = OPS.bn_stats(x)
    late, side = torch.zeros_like(x), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SPIN)
        late.copy_(x)
        got = OPS.bn_stats(late)
        done = torch.cuda.Event()
        done.record()
    assert not done.query(), "nobody has waited"
    side.synchronize()
    for a, b in zip(got, want, strict=True):
        assert same_bits(a.cpu(), b.cpu())


@on_gpus(1)
@deterministic
def test_a_training_step_on_a_side_stream() -> None:
    for kind in KINDS:
        module = bottleneck(kind)
        x, dy = inputs(module, kind)
        want = step(copy.deepcopy(module), x, dy)
        late, side = torch.zeros_like(x), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(SPIN)
            late.copy_(x.detach())
            got = step(copy.deepcopy(module), late.requires_grad_(), dy)
        side.synchronize()
        assert_same(got, want)


@on_gpus(1)
@deterministic
def test_a_training_step_waits_for_nothing() -> None:
    for kind in KINDS:
        for memory in ("lean", "fast"):
            module = bottleneck(kind, memory=memory)
            x, dy = inputs(module, kind)
            step(module, x, dy)  # libraries set themselves up
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                step(module, x, dy)
            finally:
                torch.cuda.set_sync_debug_mode("default")


@on_gpus(1)
@deterministic
def test_a_captured_training_step_replays() -> None:
    """As a CUDA graph, on new data, with the same bits as without."""
    for kind in KINDS:
        module = bottleneck(kind)
        x, dy = inputs(module, kind)
        state = copy.deepcopy(module.state_dict())
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # a graph holds no set-up: that comes before, as torch's manual says
            for _ in range(3):
                step(module, x, dy)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(module, x, dy)
        for _ in range(2):
            fresh = activation(4, 32, 15, 13, torch.bfloat16).cuda()
            with torch.no_grad():
                x.copy_(fresh)
                dy.copy_(torch.randn(dy.shape))
            module.load_state_dict(state)
            graph.replay()
            torch.cuda.synchronize()
            got = {name: t.clone() for name, t in captured.items()}
            module.load_state_dict(state)
            assert_same(got, step(module, x, dy))


@on_gpus(2)
@deterministic
def test_a_device_that_is_not_the_current_one() -> None:
    for kind in KINDS:
        module = bottleneck(kind)
        x, dy = inputs(module, kind)
        want = step(copy.deepcopy(module), x, dy)
        with torch.cuda.device(0):
            other = copy.deepcopy(module).to("cuda:1")
            got = step(other, x.detach().to("cuda:1").requires_grad_(), dy.to("cuda:1"))
            assert torch.cuda.current_device() == 0
        if torch.cuda.get_device_capability(0) == torch.cuda.get_device_capability(1):
            assert_same(got, want)
        assert all(t.device.index == 1 and t.float().isfinite().all() for t in got.values())


@on_gpus(2)
def test_streams_of_another_device() -> None:
    x = activation(8, 64, 28, 28, torch.bfloat16)
    want = OPS.bn_stats(x.to("cuda:1"))
    side = torch.cuda.Stream("cuda:1")
    late = torch.zeros_like(x, device="cuda:1")
    torch.cuda.synchronize("cuda:1")
    with torch.cuda.stream(side):
        torch.cuda._sleep(SPIN)
        late.copy_(x.to("cuda:1", non_blocking=True))
        with torch.cuda.device(0):  # the current stream of the tensor's device is what counts
            got = OPS.bn_stats(late)
    side.synchronize()
    for a, b in zip(got, want, strict=True):
        assert same_bits(a.cpu(), b.cpu())
