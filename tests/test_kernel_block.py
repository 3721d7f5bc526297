"""Blocks on the matrix kernels: what runs, and that it is right, as composed in production.

On the emulator, and on a GPU where there is one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import Observed, assert_agrees, observe_module, randomise, relative_error
from device import DEVICES, Device
from op_cases import activation, nhwc
from test_device import block
from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet

import resnet_fused as rf
from resnet_fused import functional
from resnet_fused.ops.gram_form import Gram, conv_stats, sample_center
from resnet_fused.recorder import recording

ops = torch.ops.resnet_fused
HALVES = [torch.bfloat16, torch.float16]
KERNEL_DEVICES = [name for name in DEVICES if name != "cpu"]


@pytest.fixture(params=KERNEL_DEVICES)
def device(request: pytest.FixtureRequest) -> Device:
    return Device(request.param)


def families(device: Device) -> set[str]:
    """The matrix kernels of the last run, without element type and tile."""
    names = {symbol.split("_bf16_")[0].split("_f16_")[0] for symbol in device.symbols}
    return {name for name in names if name.startswith(("conv1x1", "conv2d", "expand", "gram"))} - {
        "gram_finalize",
        "gram_operand",
    }


def step_draws(
    fused: nn.Module, eager: nn.Module, device: Device, dtype: torch.dtype, shape: tuple[int, ...], count: int = 6
) -> None:
    """Asserts a training step's outputs, gradients and statistics by the rule, over several draws."""
    draws = []
    for seed in range(count):
        torch.manual_seed(seed)
        randomise(eager)
        fused.load_state_dict(eager.state_dict())
        ours, plain = copy.deepcopy(fused).to(dtype), copy.deepcopy(eager).to(dtype)
        exact = copy.deepcopy(plain).double()
        x = activation(*shape, dtype).requires_grad_()
        dy = torch.randn(copy.deepcopy(plain)(x).shape).to(dtype)
        got = device.run(observe_module, ours, x, dy, seed=seed)
        draws.append((got, observe_module(plain, x, dy), observe_module(exact, x.double(), dy.double())))
    assert_agrees(draws, dtype)


INNER = {"conv1x1_fprop", "conv1x1_wgrad_backward", "conv1x1_dgrad_backward_add"}
INNER |= {"conv2d_fprop", "conv2d_wgrad_backward_affine", "conv2d_dgrad_gate"}
STRIDED = INNER - {"conv2d_fprop"} | {"conv2d_fprop_strided"}
GRAM = {"gram", "expand_affine", "conv1x1_wgrad_masked_affine", "expand_dgrad"}
KEPT = {"conv1x1_fprop_affine", "conv1x1_wgrad_backward_affine", "conv1x1_dgrad_backward_gate"}
DUAL = {"gram", "expand_dual", "conv1x1_wgrad_masked_affine", "expand_dgrad", "expand_dgrad_projection"}
EXPECTED = {
    ("identity", "lean"): INNER | GRAM,
    ("projection", "lean"): INNER | DUAL | {"conv1x1_wgrad_masked"},
    ("stride 2", "lean"): STRIDED | DUAL | {"gram_strided", "conv1x1_wgrad_masked_strided"},
    ("identity", "fast"): INNER | KEPT,
    ("projection", "fast"): INNER | KEPT,
    ("stride 2", "fast"): STRIDED | KEPT | {"conv1x1_wgrad_backward_strided"},
}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("kind", "memory"), EXPECTED)
def test_bottleneck(kind: str, memory: str, dtype: torch.dtype, device: Device) -> None:
    eager = block(torchvision_resnet, "Bottleneck", kind)
    fused = block(rf, "Bottleneck", kind)
    fused.memory = memory
    step_draws(fused, eager, device, dtype, (8, 32, 15, 13))
    if device.name == "emulated":
        assert families(device) == EXPECTED[kind, memory]


BASIC = {"conv2d_wgrad_backward", "conv2d_wgrad_backward_affine", "conv2d_dgrad_add", "conv2d_dgrad_gate"}
PROJECTED = {"gram", "expand", "conv1x1_wgrad_masked", "expand_dgrad_projection"}
BASIC_EXPECTED = {
    "identity": BASIC | {"conv2d_fprop"},
    "projection": BASIC | PROJECTED | {"conv2d_fprop"},
    "stride 2": BASIC
    | PROJECTED - {"gram", "conv1x1_wgrad_masked"}
    | {"conv2d_fprop", "conv2d_fprop_strided", "gram_strided", "conv1x1_wgrad_masked_strided"},
}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", BASIC_EXPECTED)
def test_basic_block(kind: str, dtype: torch.dtype, device: Device) -> None:
    """Its last unit is 3x3, whose output is kept; a projection still takes the Gram form."""
    eager, fused = block(torchvision_resnet, "BasicBlock", kind), block(rf, "BasicBlock", kind)
    step_draws(fused, eager, device, dtype, (8, 32, 15, 13), count=16)
    if device.name == "emulated":
        assert families(device) == BASIC_EXPECTED[kind]


@pytest.mark.parametrize(("groups", "width"), [(2, 32), (8, 64), (32, 4)])
def test_grouped_bottleneck(groups: int, width: int, device: Device) -> None:
    """ResNeXt's: groups of at least eight channels run on the kernels, of fewer through ATen, and both are right."""
    made = [source.Bottleneck(64, 16, groups=groups, base_width=width) for source in (torchvision_resnet, rf)]
    per_group = made[0].conv2.weight.shape[1]
    step_draws(made[1], made[0], device, torch.bfloat16, (4, 64, 9, 7), count=4)
    if device.name == "emulated":
        assert ("conv2d_fprop" in families(device)) == (per_group >= 8)


def freeze_statistics(module: nn.Module) -> nn.Module:
    for bn in module.modules():
        if isinstance(bn, nn.BatchNorm2d):
            bn.eval()
    return module


def freeze_weights(module: nn.Module) -> nn.Module:
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            conv.requires_grad_(False)
    return module


def freeze_norms(module: nn.Module) -> nn.Module:
    freeze_statistics(module)
    for bn in module.modules():
        if isinstance(bn, nn.BatchNorm2d):
            bn.requires_grad_(False)
    return module


@pytest.mark.parametrize("change", [freeze_statistics, freeze_weights, freeze_norms])
@pytest.mark.parametrize("kind", ["identity", "stride 2"])
def test_frozen_parts(change: Callable[[nn.Module], nn.Module], kind: str, device: Device) -> None:
    eager, fused = (change(block(source, "Bottleneck", kind)) for source in (torchvision_resnet, rf))
    step_draws(fused, eager, device, torch.bfloat16, (8, 32, 15, 13), count=3)


def test_zero_gamma(device: Device) -> None:
    """zero_init_residual: nothing divides by gamma."""
    torch.manual_seed(0)
    eager, fused = block(torchvision_resnet, "Bottleneck", "identity"), block(rf, "Bottleneck", "identity")
    randomise(eager)
    nn.init.zeros_(eager.bn3.weight)
    fused.load_state_dict(eager.state_dict())
    x, dy = activation(4, 32, 9, 9, torch.bfloat16).requires_grad_(), torch.randn(4, 32, 9, 9).bfloat16()
    ours, plain = fused.bfloat16(), eager.bfloat16()
    exact = copy.deepcopy(plain).double()
    got = device.run(observe_module, ours, x, dy)
    assert_agrees([(got, observe_module(plain, x, dy), observe_module(exact, x.double(), dy.double()))], torch.bfloat16)


@pytest.mark.parametrize("kind", ["identity", "projection", "stride 2"])
def test_inference(kind: str, device: Device) -> None:
    draws = []
    for seed in range(3):
        torch.manual_seed(seed)
        eager, fused = block(torchvision_resnet, "Bottleneck", kind), block(rf, "Bottleneck", kind)
        fused.load_state_dict(randomise(eager).state_dict())
        ours, plain = fused.bfloat16().eval(), eager.bfloat16().eval()
        x = activation(3, 32, 15, 13, torch.bfloat16)
        with torch.no_grad():
            got = {"y": device.run(ours, x, seed=seed)}
            want = {"y": copy.deepcopy(plain).double()(x.double())}
            draws.append((got, {"y": plain(x)}, want))
        if device.name == "emulated":
            assert "gram" not in families(device)
    assert_agrees(draws, torch.bfloat16)


@pytest.mark.parametrize("relu", [True, False])
def test_one_unit_with_a_residual(relu: bool, device: Device) -> None:
    """A single unit is an end unit without a prologue; a residual's gradient is its own tensor."""

    def step(x: Tensor, r: Tensor, w: Tensor, gamma: Tensor, beta: Tensor, dy: Tensor, f: Callable) -> Observed:
        inputs = {"x": x, "r": r, "w": w, "gamma": gamma, "beta": beta}
        for t in inputs.values():
            t.requires_grad_()
        unit = functional.ConvBN(w, gamma, beta, training=True)
        y = f(x, [unit], r, relu)
        grads = torch.autograd.grad(y, list(inputs.values()), dy)
        return {"y": y.detach(), **dict(zip(inputs, grads, strict=True))}

    draws = []
    for seed in range(4):
        torch.manual_seed(seed)
        x, r, dy = (activation(3, c, 11, 13, torch.bfloat16) for c in (24, 40, 40))
        w = (torch.randn(40, 24, 1, 1) / 5).bfloat16()
        gamma, beta = torch.rand(40).bfloat16(), torch.randn(40).bfloat16()
        tensors = (x, r, nhwc(w), gamma, beta, dy)
        fresh = [t.detach().clone() for t in tensors]
        got = device.run(lambda *t: step(*t, functional.residual_block), *fresh, seed=seed)
        plain = rf.reference.residual_block
        eager = step(*(t.detach().clone() for t in tensors), plain)
        draws.append((got, eager, step(*(t.detach().double() for t in tensors), plain)))
    assert_agrees(draws, torch.bfloat16)


# ----------------------------------------------------------------------------------- variances from Gram matrices


def variance_error(x: Tensor, weight: Tensor, device: Device) -> float:
    """Of the outputs' variances from the Gram matrix, relative, against float64 for the operand as it is."""
    center = sample_center(x)
    mean, cov = device.run(ops.gram, x, None, None, center, 1)
    got = conv_stats(Gram(center, mean, cov), weight)[1].double()
    u = x.double().permute(0, 2, 3, 1).flatten(0, 2) @ weight.double().flatten(1).t()
    return ((got - u.var(0, unbiased=False)) / u.var(0, unbiased=False)).abs().max().item()


@pytest.mark.parametrize("correlation", [0.0, 0.9, 0.99])
@pytest.mark.parametrize(("dtype", "ratio"), [(torch.bfloat16, 0), (torch.bfloat16, 64), (torch.float16, 1000)])
def test_variance_from_the_gram_matrix(dtype: torch.dtype, ratio: float, correlation: float, device: Device) -> None:
    """At most 1e-3, for mean/std up to 64 in bfloat16 and 1000 in float16, also where w' Cov w cancels."""
    torch.manual_seed(int(100 * correlation))
    n, c, h, w = 4, 40, 23, 25
    common, own = torch.randn(n, 1, h, w), torch.randn(n, c, h, w)
    x = correlation**0.5 * common + (1 - correlation) ** 0.5 * own + ratio * (torch.rand(1, c, 1, 1) + 0.5)
    weight = torch.randn(48, c, 1, 1)
    weight[:16] -= weight[:16].mean(1, keepdim=True)  # orthogonal to what the channels have in common
    assert variance_error(nhwc(x.to(dtype)), weight.to(dtype), device) < 1e-3


def test_a_graph_that_was_planned_on_a_cpu(device: Device) -> None:
    """Of 12 channels the CPU makes a Gram matrix, the kernels do not."""
    block = randomise(rf.Bottleneck(48, 12)).bfloat16()
    x = activation(2, 48, 6, 5, torch.bfloat16)
    with torch.no_grad(), recording() as calls:
        want = copy.deepcopy(block)(x)
        program = torch.export.export(block, (x,)).module()
    assert calls[0].spec.units[-1].plan == "gram"
    with torch.no_grad():
        assert relative_error(device.run(program, x), want) < 1e-2
