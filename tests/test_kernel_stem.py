"""A network's stem on the matrix kernels: conv1, bn1, ReLU and max pool, forward and backward, as in production.

On the emulator, and on a GPU where there is one.
"""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import assert_agrees, observe_module, randomise
from device import DEVICES, Device
from op_cases import activation, ops
from test_kernel_block import step_draws
from torch import Tensor, nn
from torchvision import models

import resnet_fused as rf
from resnet_fused.blocks import FusedStem
from resnet_fused.measure import saved_bytes
from resnet_fused.ops.pointwise import as_on_a_gpu
from resnet_fused.recorder import recording

HALVES = [torch.bfloat16, torch.float16]
KERNELS = {"conv2d_few_fprop_4x2", "conv2d_few_wgrad_backward_4"}


@pytest.fixture(params=[name for name in DEVICES if name != "cpu"])
def device(request: pytest.FixtureRequest) -> Device:
    return Device(request.param)


class Eager(nn.Module):
    """The first four modules of torchvision's ResNet."""

    def __init__(self, channels: int = 3, width: int = 16, kernel: int = 7, stride: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))


class Fused(FusedStem, Eager):
    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x)


def kernels(device: Device) -> set[str]:
    """Those of the convolution in the last run, without element type."""
    names = {symbol.removesuffix("_bf16").removesuffix("_f16") for symbol in device.symbols}
    return {name for name in names if name.startswith("conv2d")}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_step(dtype: torch.dtype, layout: str, device: Device) -> None:
    """Output, gradients and running statistics; the image needs no gradient, as in training."""
    draws = []
    for seed in range(4):
        torch.manual_seed(seed)
        eager, fused = Eager(), Fused()
        fused.load_state_dict(randomise(eager).state_dict())
        ours, plain = fused.to(dtype), eager.to(dtype)
        exact = copy.deepcopy(plain).double()
        x = activation(6, 3, 33, 29, dtype)
        if layout == "nchw":
            x = x.contiguous()
        dy = torch.randn(copy.deepcopy(plain)(x).shape).to(dtype)
        got = device.run(observe_module, ours, x, dy, seed=seed)
        draws.append((got, observe_module(plain, x, dy), observe_module(exact, x.double(), dy.double())))
        if device.name == "emulated":
            assert kernels(device) == KERNELS
            assert "bn_act_backward_apply" not in " ".join(device.symbols)  # du is never stored
    assert_agrees(draws, dtype)


@pytest.mark.parametrize(("channels", "kernel", "stride"), [(3, 7, 2), (1, 5, 1), (2, 3, 1)])
def test_step_with_the_gradient_of_the_image(channels: int, kernel: int, stride: int, device: Device) -> None:
    sizes = (channels, 16, kernel, stride)
    step_draws(Fused(*sizes), Eager(*sizes), device, torch.bfloat16, (6, channels, 17, 19), count=4)


@pytest.mark.parametrize("frozen", ["statistics", "weight", "norm"])
def test_frozen_parts(frozen: str, device: Device) -> None:
    pair = []
    for module in (Fused(), Eager()):
        if frozen != "weight":
            module.bn1.eval()
        if frozen == "norm":
            module.bn1.requires_grad_(False)
        if frozen == "weight":
            module.conv1.requires_grad_(False)
        pair.append(module)
    step_draws(*pair, device, torch.bfloat16, (6, 3, 17, 19), count=3)


def test_inference(device: Device) -> None:
    draws = []
    for seed in range(3):
        torch.manual_seed(seed)
        eager, fused = Eager(), Fused()
        fused.load_state_dict(randomise(eager).state_dict())
        ours, plain = fused.bfloat16().eval(), eager.bfloat16().eval()
        x = activation(3, 3, 33, 29, torch.bfloat16)
        with torch.no_grad():
            got = {"y": device.run(ours, x, seed=seed)}
            draws.append((got, {"y": plain(x)}, {"y": copy.deepcopy(plain).double()(x.double())}))
    assert_agrees(draws, torch.bfloat16)


def test_two_runs_are_bit_equal(device: Device) -> None:
    module, x = randomise(Fused()).bfloat16(), activation(3, 3, 33, 29, torch.bfloat16)
    dy = torch.randn(3, 16, 9, 8).bfloat16()
    runs = [device.run(observe_module, copy.deepcopy(module), x, dy, seed=seed) for seed in (1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(*(run.values() for run in runs), strict=True))


# --------------------------------------------------------------------------- planned as on a GPU, computed by ATen


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), list(model.parameters())), *model.buffers()]


def units(model: nn.Module, x: Tensor) -> list[int]:
    """Of each recorded call: whether conv1 is a part of it."""
    with torch.no_grad(), recording() as calls:
        model(x)
    assert all(call.reason is None for call in calls)
    return [len(call.units) for call in calls]


CHANGES = {
    "hook": lambda m: m.conv1.register_forward_hook(lambda *_: None),
    "bias": lambda m: setattr(m, "conv1", nn.Conv2d(3, 16, 7, 2, 3).bfloat16()),
    "width": lambda m: (
        setattr(m, "conv1", nn.Conv2d(3, 12, 7, 2, 3, bias=False).bfloat16())
        or setattr(m, "bn1", nn.BatchNorm2d(12).bfloat16())
    ),
    "parametrization": lambda m: torch.nn.utils.parametrize.register_parametrization(m.conv1, "weight", nn.Identity()),
    "dilation": lambda m: setattr(m, "conv1", nn.Conv2d(3, 16, 5, 2, 4, 2, bias=False).bfloat16()),
}


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_what_conv1_must_be(change: str | None) -> None:
    model, x = Fused().bfloat16(), activation(2, 3, 17, 19, torch.bfloat16)
    if change is not None:
        CHANGES[change](model)
    assert units(model, x) == [0]  # a CPU
    with as_on_a_gpu():
        assert units(model, x) == [int(change is None)]
        assert units(Fused(), x.float()) == [0]
        with torch.autocast("cpu", torch.bfloat16):
            assert units(Fused(), x.float()) == [1]


def test_autocast_gives_what_the_types_give() -> None:
    torch.manual_seed(0)
    model, x = Fused(), activation(2, 3, 17, 19, torch.float32)
    halved = copy.deepcopy(model)
    halved.conv1.bfloat16()
    with as_on_a_gpu():
        with torch.autocast("cpu", torch.bfloat16):
            got = step(model, x)
        wanted = step(halved, x.bfloat16())
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype))


def test_compiles_and_exports() -> None:
    torch._dynamo.reset()
    model, x = randomise(Fused()).bfloat16(), activation(2, 3, 17, 19, torch.bfloat16)
    with as_on_a_gpu():
        wanted = step(copy.deepcopy(model), x)
        compiled = step(torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager"), x)
        exported = torch.export.export(copy.deepcopy(model), (x,))
        assert sum("resnet_fused.stem" in str(node.target) for node in exported.graph.nodes) == 1
        got = step(exported.module(), x)
    for results in (compiled, got):
        for a, b in zip(results, wanted, strict=True):
            torch.testing.assert_close(a, b)


def test_keeps_the_image_u_and_the_argmax() -> None:
    model, x = Fused().bfloat16(), activation(2, 3, 64, 64, torch.bfloat16)
    u, pooled = 2 * 16 * 32 * 32 * 2, 2 * 16 * 16 * 16
    with as_on_a_gpu():
        assert saved_bytes(lambda: model(x), model.parameters(), least=1000) == x.nbytes + u + pooled


def test_explain_says_how_it_ran() -> None:
    model = models.resnet18().bfloat16()
    rf.fuse_(model)
    x = activation(2, 3, 64, 64, torch.bfloat16)
    rows = {row.name: row for row in rf.explain(model, x).rows}
    assert (rows["conv1"].plan, rows["bn1"].plan) == ("eager", "fused")
    with as_on_a_gpu():
        rows = {row.name: row for row in rf.explain(model, x).rows}
    assert rows["conv1"].plan == "cuda: conv"
    assert "bn1" not in rows
    u, image, pooled = 2 * 64 * 32 * 32 * 2, x.nbytes, 2 * 64 * 16 * 16
    assert rows["conv1"].saved == image + u + pooled
    assert rows["conv1"].moved == 7 * u + 2 * image + 6 * pooled
    assert rows["conv1"].moved < 0.5 * rows["conv1"].moved_eager


def test_second_derivative_raises() -> None:
    model, x = Fused().bfloat16(), activation(2, 3, 17, 19, torch.bfloat16)
    with as_on_a_gpu():
        (dw,) = torch.autograd.grad(model(x).float().square().sum(), model.conv1.weight, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            torch.autograd.grad(dw.float().sum(), model.conv1.weight)


def test_direct_calls_train() -> None:
    x, w = activation(2, 3, 17, 19, torch.float64), torch.randn(8, 3, 5, 5).double().requires_grad_()
    gamma, beta = (torch.rand(8).double().requires_grad_() for _ in range(2))
    none = torch.empty(0).double(), torch.empty(0).double()
    y, *rest = ops.stem(x, w, gamma, beta, *none, 1e-5, True, "", [2, 2, 2, 2, 1, 1, 1], [3, 2, 1])
    assert not any(t.requires_grad for t in rest)
    got = torch.autograd.grad(y.square().sum(), (w, gamma, beta))
    u = torch.nn.functional.conv2d(x, w, None, 2, 2)
    z = torch.nn.functional.max_pool2d(
        torch.batch_norm(u, gamma, beta, None, None, True, 0, 1e-5, False).relu(), 3, 2, 1
    )
    for a, b in zip(got, torch.autograd.grad(z.square().sum(), (w, gamma, beta)), strict=True):
        torch.testing.assert_close(a, b)
