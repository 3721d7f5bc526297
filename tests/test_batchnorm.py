"""BatchNorm semantics inside the blocks, each against PyTorch's own modules."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from conftest import assert_agrees, check_modules, draw_modules, random_unit, randomise, relative_error
from torch import nn
from torchvision.models import resnet as tv
from torchvision.ops import FrozenBatchNorm2d

import resnet_fused as rf
from resnet_fused import functional
from resnet_fused.recorder import recording


def bottlenecks(norm_layer=nn.BatchNorm2d, planes: int = 4) -> tuple[nn.Module, nn.Module]:
    """(fused, torchvision's) Bottleneck(4*planes, planes) with a projection."""

    def build(block):
        wide = 4 * planes
        shortcut = nn.Sequential(nn.Conv2d(wide, wide, 1, bias=False), norm_layer(wide))
        return randomise(block(wide, planes, downsample=shortcut, norm_layer=norm_layer))

    return build(rf.Bottleneck), build(tv.Bottleneck)


def norms(block: nn.Module) -> list[nn.Module]:
    return [block.bn1, block.bn2, block.bn3, block.downsample[1]]


def activation(channels: int = 16, size: int = 6) -> torch.Tensor:
    return torch.randn(4, channels, size, size).to(memory_format=torch.channels_last).requires_grad_()


def assert_runs_fused(block: nn.Module, x: torch.Tensor) -> None:
    with recording() as calls:
        copy.deepcopy(block)(x)
    assert [c.reason for c in calls] == [None]


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": None},
        {"momentum": 0.0},
        {"momentum": 1.0},
        {"eps": 0.3},
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_options(options, training) -> None:
    fused, eager = (block.train(training) for block in bottlenecks(partial(nn.BatchNorm2d, **options)))
    assert_runs_fused(fused, activation())
    check_modules(fused, eager, activation())


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_running_statistics_over_several_steps(momentum) -> None:
    fused, eager = bottlenecks(partial(nn.BatchNorm2d, momentum=momentum))
    fused.load_state_dict(eager.state_dict())
    exact = copy.deepcopy(eager).double()
    for _ in range(4):
        x = activation()
        fused(x), eager(x), exact(x.double())
    assert fused.bn2.num_batches_tracked == 4
    assert_agrees([tuple(dict(m.named_buffers()) for m in (fused, eager, exact))], torch.float32)


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_tracking_switched_off_later(momentum) -> None:
    """bn.track_running_stats = False on a norm that has its buffers: they rest in training and serve in eval."""
    for training in (True, False):
        fused, eager = (block.train(training) for block in bottlenecks(partial(nn.BatchNorm2d, momentum=momentum)))
        for block in (fused, eager):
            for bn in norms(block):
                bn.track_running_stats = False
        check_modules(fused, eager, activation())


def test_frozen_statistics_in_a_training_step() -> None:
    fused, eager = bottlenecks()
    for block in (fused, eager):
        for bn in norms(block):
            bn.eval()
    assert_runs_fused(fused, activation())
    check_modules(fused, eager, activation())
    assert fused.bn1.num_batches_tracked == 0


@pytest.mark.parametrize("evaluated", range(4))
def test_one_norm_in_eval_mode(evaluated) -> None:
    fused, eager = bottlenecks()
    for block in (fused, eager):
        norms(block)[evaluated].eval()
    assert_runs_fused(fused, activation())
    check_modules(fused, eager, activation())


@pytest.mark.parametrize("training", [True, False])
def test_gamma_without_gradient(training) -> None:
    fused, eager = (block.train(training) for block in bottlenecks())
    for block in (fused, eager):
        for bn in norms(block):
            bn.weight.requires_grad_(False)
    check_modules(fused, eager, activation())
    assert fused.bn3.weight.grad is None


@pytest.mark.parametrize("memory", ["lean", "fast"])
def test_gamma_zero(memory) -> None:
    """zero_init_residual: nothing may divide by gamma, and its gradient is the first thing to be learnt."""
    fused, eager = bottlenecks()
    fused.memory = memory
    nn.init.zeros_(eager.bn3.weight)
    nn.init.zeros_(eager.downsample[1].weight)
    check_modules(fused, eager, activation())
    assert fused.bn3.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("ratio", [64, 1000])
@pytest.mark.parametrize("memory", ["lean", "fast"])
def test_mean_far_from_zero(ratio, memory) -> None:
    """fp32 operands with mean/std = ratio, through a Gram unit (lean) and a plain one (fast)."""
    x = (torch.randn(4, 8, 16, 16) + ratio * torch.linspace(-1, 1, 8).view(-1, 1, 1)).requires_grad_()
    unit = random_unit(8, 32, dtype=torch.float32, momentum=1.0)
    with recording() as calls:
        functional.conv_bn_act(x, unit, memory=memory)
    assert calls[0].spec.units[0].plan == ("gram" if memory == "lean" else "keep")
    u = torch.nn.functional.conv2d(x.double(), unit.weight.double())
    assert relative_error(unit.running_var, u.var((0, 2, 3))) < 1e-3
    assert relative_error(unit.running_mean, u.mean((0, 2, 3))) < 1e-6


@pytest.mark.parametrize("memory", ["lean", "fast"])
def test_block_with_means_far_from_zero(memory) -> None:
    """bn2's shift puts the last unit's operand at mean/std 1000."""
    fused, eager = bottlenecks()
    fused.memory = memory
    nn.init.constant_(eager.bn2.weight, 0.01)
    nn.init.constant_(eager.bn2.bias, 10)
    check_modules(fused, eager, activation())


def test_one_value_a_channel() -> None:
    fused, eager = bottlenecks()
    before = copy.deepcopy(fused.state_dict())
    x = torch.randn(1, 16, 1, 1)
    messages = []
    for block in (fused, eager):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training") as error:
            block(x)
        messages.append(str(error.value))
    assert messages[0].startswith(messages[1])
    assert all(torch.equal(t, before[name]) for name, t in fused.state_dict().items())
    check_modules(fused.eval(), eager.eval(), x.requires_grad_())


def test_torchvision_frozen_batch_norm() -> None:
    fused, eager = bottlenecks(FrozenBatchNorm2d)
    for block in (fused, eager):
        for i, bn in enumerate(norms(block)):
            torch.manual_seed(i)
            bn.weight.uniform_(0.5, 1.5), bn.bias.normal_(), bn.running_mean.normal_(), bn.running_var.uniform_(0.5, 2)
    assert_runs_fused(fused, activation())
    check_modules(fused, eager, activation())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_low_precision_parameters_and_statistics(dtype, training) -> None:
    """model.bfloat16(): also the running statistics."""
    draws = []
    for _ in range(4):
        fused, eager = (block.train(training).to(dtype) for block in bottlenecks(planes=16))
        draws.append(draw_modules(fused, eager, activation(64, 16).detach().to(dtype).requires_grad_()))
    assert_agrees(draws, dtype)


@pytest.mark.parametrize("memory", ["lean", "fast"])
@pytest.mark.parametrize("module", ["block", "stem"])
def test_a_training_step_before_the_backward_of_an_evaluation(module, memory) -> None:
    """Backward is that of the statistics that its forward used. (Eager's batch norm reads the moved ones.)"""
    fused = bottlenecks()[0] if module == "block" else randomise(rf.BNReLUMaxPool(16))
    fused.double().eval().memory = memory
    x = activation().double().detach().requires_grad_()
    leaves = [x, *fused.parameters()]
    expected = torch.autograd.grad(fused(x).square().sum(), leaves)
    y = fused(x)
    fused.train()(3 * x.detach() + 1)
    for got, want in zip(torch.autograd.grad(y.square().sum(), leaves), expected, strict=True):
        torch.testing.assert_close(got, want)
