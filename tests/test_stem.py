"""BNReLUMaxPool: the stem's tail against nn.BatchNorm2d, ReLU and MaxPool2d."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_agrees, check_modules, draw_modules, randomise, relative_error
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import resnet_fused as rf
from resnet_fused.measure import saved_bytes
from resnet_fused.recorder import recording


class Eager(nn.BatchNorm2d):
    """The stem's tail as torchvision runs it."""

    def forward(self, x):
        return F.max_pool2d(F.relu(super().forward(x)), 3, 2, 1)


def pair(channels: int = 6, **options) -> tuple[nn.Module, nn.Module]:
    return rf.BNReLUMaxPool(channels, **options), randomise(Eager(channels, **options))


def activation(channels: int = 6, size: int = 9, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(2, channels, size, size).to(dtype)
    return x.to(memory_format=torch.channels_last).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_agrees_with_eager(training, dtype) -> None:
    draws = []
    for _ in range(4):
        fused, eager = (m.to(torch.float64 if dtype == torch.float64 else torch.float32) for m in pair())
        draws.append(draw_modules(fused.train(training), eager.train(training), activation(size=33, dtype=dtype)))
    assert_agrees(draws, dtype)


@pytest.mark.parametrize(
    "options",
    [{"momentum": None}, {"eps": 0.2}, {"affine": False}, {"track_running_stats": False}],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_options(options, training) -> None:
    fused, eager = pair(**options)
    for _ in range(2):
        check_modules(fused.train(training), eager.train(training), activation())


@given(st.integers(0, 3), st.integers(1, 9), st.integers(1, 12), st.integers(1, 12), st.sampled_from(["nchw", "nhwc"]))
def test_any_shape(n, c, h, w, layout) -> None:
    x = torch.randn(n, c, h, w)
    if layout == "nhwc":
        x = x.to(memory_format=torch.channels_last)
    fused, eager = pair(c)
    training = n * h * w > 3
    check_modules(fused.train(training), eager.train(training), x.requires_grad_())


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(training) -> None:
    fused = randomise(rf.BNReLUMaxPool(3)).double().train(training)

    def call(x, weight, bias):
        return torch.func.functional_call(fused, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(call, (activation(3, 6, torch.float64), fused.weight, fused.bias), fast_mode=True)


def test_runs_fused_and_says_so() -> None:
    fused, _ = pair()
    with recording() as calls:
        fused(activation())
        fused(torch.empty(0, 6, 9, 9))
    assert [c.reason for c in calls] == [None, "empty input"]


@pytest.mark.parametrize("frozen", ["weight", "bias", "x"])
def test_any_tensor_may_be_frozen(frozen) -> None:
    fused, eager = pair()
    x = activation()
    if frozen == "x":
        x = x.detach()
    else:
        for module in (fused, eager):
            module.get_parameter(frozen).requires_grad_(False)
    check_modules(fused, eager, x)


def test_tracking_switched_off_later() -> None:
    for training in (True, False):
        fused, eager = (m.train(training) for m in pair())
        fused.track_running_stats = eager.track_running_stats = False
        check_modules(fused, eager, activation())


def test_nan_wins_as_in_eager() -> None:
    fused, eager = (m.eval() for m in pair(1))
    fused.load_state_dict(eager.state_dict())
    x = torch.randn(1, 1, 7, 7)
    x[0, 0, 3, 3] = float("nan")
    torch.testing.assert_close(fused(x), eager(x), equal_nan=True)


def test_saves_bits_not_activations() -> None:
    """Kept for backward: its input and one byte per pooled element, where eager keeps two more activations."""
    fused, _ = pair(8)
    x = activation(8, 64)
    assert saved_bytes(lambda: fused(x)) <= x.nbytes + x.numel() // 4 + 1000


def test_second_derivative_raises() -> None:
    fused, _ = pair()
    x = activation()
    (dx,) = torch.autograd.grad(fused(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(dx.sum(), x)


def test_copies_and_state() -> None:
    fused, eager = pair()
    assert list(fused.state_dict()) == list(eager.state_dict())
    for clone in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        check_modules(clone, copy.deepcopy(eager), activation())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 5, 9, 9), r"\[2, 5, 9, 9\].*6 channels"),
        ((6, 9, 9), "expected 4D input"),
        ((1, 6, 1, 1), "more than 1 value per channel"),
    ],
)
def test_errors_leave_no_trace(shape, message) -> None:
    fused, _ = pair()
    before = copy.deepcopy(fused.state_dict())
    with pytest.raises(ValueError, match=message):
        fused(torch.randn(shape))
    assert all(torch.equal(t, before[name]) for name, t in fused.state_dict().items())


def test_two_runs_are_bit_equal() -> None:
    fused, _ = pair()
    x = activation(size=40)
    runs = []
    for _ in range(2):
        y = copy.deepcopy(fused)(x)
        runs.append((y, *torch.autograd.grad(y.square().sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert relative_error(runs[0][0], F.max_pool2d(F.relu(nn.BatchNorm2d.forward(fused, x)), 3, 2, 1)) < 1e-6
