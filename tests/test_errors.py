"""Bad arguments: the message names the argument, what came and what was expected, and nothing was written."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from conftest import Case, random_case, random_unit
from torch import nn

import resnet_fused as rf
from resnet_fused import functional


def case() -> Case:
    """A good call: x [2, 16, 4, 4], widths 4, 4, 16."""
    return random_case(3, "projection").to(torch.float32)


def with_unit(i: int, **fields) -> Case:
    good = case()
    units = list(good.units)
    units[i] = replace(units[i], **fields)
    return replace(good, units=tuple(units))


def vector(n: int) -> torch.Tensor:
    return torch.ones(n)


BAD = {
    "x is no tensor": (lambda: replace(case(), x=[1, 2]), TypeError, ["x is a list", "expected a Tensor"]),
    "x has 3 dimensions": (
        lambda: replace(case(), x=torch.randn(16, 4, 4)),
        ValueError,
        ["x has shape [16, 4, 4]", "[N, C, H, W]"],
    ),
    "x has 5 dimensions": (
        lambda: replace(case(), x=torch.randn(2, 16, 4, 4, 1)),
        ValueError,
        ["x has shape", "4 dimensions"],
    ),
    "channels": (
        lambda: replace(case(), x=torch.randn(2, 15, 4, 4)),
        ValueError,
        ["units[0].weight", "16 channels", "has 15"],
    ),
    "inner channels": (
        lambda: with_unit(1, weight=torch.randn(4, 5, 3, 3)),
        ValueError,
        ["units[1].weight has shape [4, 5, 3, 3]", "has 4"],
    ),
    "integers": (
        lambda: replace(case(), x=torch.ones(2, 16, 4, 4, dtype=torch.int64)),
        ValueError,
        ["x is torch.int64", "expected one of torch.float32"],
    ),
    "dtype of a weight": (
        lambda: with_unit(2, weight=torch.randn(16, 4, 1, 1).half()),
        ValueError,
        ["units[2].weight is torch.float16", "expected torch.float32"],
    ),
    "dtype of x": (
        lambda: replace(case(), x=case().x.double()),
        ValueError,
        ["units[0].weight is torch.float32", "expected torch.float64"],
    ),
    "weight's dimensions": (
        lambda: with_unit(1, weight=torch.randn(4, 4, 3)),
        ValueError,
        ["units[1].weight has shape [4, 4, 3]", "4 dimensions"],
    ),
    "device of a weight": (
        lambda: with_unit(1, weight=torch.empty(4, 4, 3, 3, device="meta")),
        ValueError,
        ["units[1].weight is on meta", "expected cpu"],
    ),
    "device of a vector": (
        lambda: with_unit(1, beta=torch.empty(4, device="meta")),
        ValueError,
        ["units[1].beta is on meta", "expected cpu"],
    ),
    "groups": (lambda: with_unit(1, groups=3), ValueError, ["units[1].groups is 3", "divisor of the 4"]),
    "no groups": (lambda: with_unit(1, groups=0), ValueError, ["units[1].groups is 0"]),
    "groups without channels": (
        lambda: with_unit(1, groups=2),
        ValueError,
        ["units[1].weight", "groups=2", "8 channels", "has 4"],
    ),
    "stride": (lambda: with_unit(1, stride=(0, 1)), ValueError, ["units[1].stride is (0, 1)", ">= 1"]),
    "padding": (lambda: with_unit(1, padding=(1, -1)), ValueError, ["units[1].padding is (1, -1)", ">= 0"]),
    "dilation": (lambda: with_unit(1, dilation=(0, 1)), ValueError, ["units[1].dilation is (0, 1)", ">= 1"]),
    "one stride": (lambda: with_unit(1, stride=(1,)), ValueError, ["units[1].stride is (1,)", "two integers"]),
    "large kernel": (
        lambda: with_unit(1, dilation=(3, 3)),
        ValueError,
        ["units[1]: a [3, 3] kernel", "dilation [3, 3]", "[2, 4, 4, 4]"],
    ),
    "gamma": (lambda: with_unit(0, gamma=vector(5)), ValueError, ["units[0].gamma has shape [5]", "expected [4]"]),
    "beta": (lambda: with_unit(0, beta=vector(3)), ValueError, ["units[0].beta has shape [3]", "expected [4]"]),
    "bias": (lambda: with_unit(2, bias=vector(4)), ValueError, ["units[2].bias has shape [4]", "expected [16]"]),
    "running_mean": (
        lambda: with_unit(2, running_mean=vector(1)),
        ValueError,
        ["units[2].running_mean has shape [1]", "expected [16]"],
    ),
    "running_var": (
        lambda: with_unit(2, running_var=torch.ones(16, 1)),
        ValueError,
        ["units[2].running_var has shape [16, 1]", "expected [16]"],
    ),
    "half the statistics": (
        lambda: with_unit(1, running_mean=None),
        ValueError,
        ["units[1]: running_mean and running_var"],
    ),
    "residual's shape": (
        lambda: replace(case(), shortcut=torch.randn(2, 16, 4, 5)),
        ValueError,
        ["shortcut gives shape [2, 16, 4, 5]", "expected [2, 16, 4, 4]"],
    ),
    "residual that is larger": (
        lambda: replace(case(), x=torch.randn(1, 16, 4, 4), shortcut=torch.randn(2, 16, 4, 4)),
        ValueError,
        ["shortcut gives shape [2, 16, 4, 4]", "expected [1, 16, 4, 4]"],
    ),
    "residual's dtype": (
        lambda: replace(case(), shortcut=torch.randn(2, 16, 4, 4).double()),
        ValueError,
        ["shortcut is torch.float64", "expected torch.float32"],
    ),
    "residual's device": (
        lambda: replace(case(), shortcut=torch.empty(2, 16, 4, 4, device="meta")),
        ValueError,
        ["on meta", "expected torch.float32 on cpu"],
    ),
    "shortcut's name": (lambda: replace(case(), shortcut="conv"), ValueError, ["shortcut is 'conv'", "identity"]),
    "identity of another shape": (
        lambda: replace(case(), units=case().units[:2], shortcut="identity"),
        ValueError,
        ["shortcut gives shape [2, 16, 4, 4]", "expected [2, 4, 4, 4]"],
    ),
    "projection of another shape": (
        lambda: replace(case(), shortcut=random_unit(16, 12, dtype=torch.float32)),
        ValueError,
        ["shortcut gives shape [2, 12, 4, 4]", "expected [2, 16, 4, 4]"],
    ),
    "projection's channels": (
        lambda: replace(case(), shortcut=random_unit(8, 16, dtype=torch.float32)),
        ValueError,
        ["shortcut.weight", "8 channels", "has 16"],
    ),
    "memory": (lambda: replace(case(), memory="x"), ValueError, ["memory is 'x'", '"lean" or "fast"']),
    "no units": (lambda: replace(case(), units=()), ValueError, ["units is empty", "at least one"]),
    "one value a channel": (
        lambda: replace(case(), x=torch.randn(1, 16, 1, 1)),
        ValueError,
        ["Expected more than 1 value per channel", "torch.Size([1, 4, 1, 1])", "units[0]"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_message_and_no_trace(name) -> None:
    make, error, parts = BAD[name]
    bad = make()
    state = {n: t for n, t in bad.named() if isinstance(t, torch.Tensor) and t.device.type != "meta"}
    before = {n: t.detach().clone() for n, t in state.items()}
    with pytest.raises(error) as caught:
        bad.fused()
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert all(torch.equal(t.detach(), before[n]) for n, t in state.items())


def test_conv_bn_act_checks_as_well() -> None:
    unit = random_unit(8, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"\[2, 4, 5, 5\].*expected \[2, 4, 4, 4\]"):
        functional.conv_bn_act(torch.randn(2, 8, 4, 4), unit, torch.randn(2, 4, 5, 5))
    with pytest.raises(ValueError, match="memory is 'huge'"):
        functional.conv_bn_act(torch.randn(2, 8, 4, 4), unit, memory="huge")


def test_meta_tensors_run_as_in_eager() -> None:
    block = rf.Bottleneck(16, 4)
    y = block.to("meta")(torch.empty(2, 16, 4, 4, device="meta"))
    assert (y.device.type, y.shape) == ("meta", (2, 16, 4, 4))


@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck", "ConvBNAct"])
@pytest.mark.parametrize(
    ("x", "parts"),
    [
        (torch.randn(2, 7, 6, 6), ["16 channels", "has 7"]),
        (torch.randn(16, 6, 6), ["x has shape [16, 6, 6]", "4 dimensions"]),
        (torch.ones(2, 16, 6, 6, dtype=torch.int32), ["x is torch.int32"]),
        (torch.randn(2, 16, 6, 6).double(), ["weight is torch.float32", "expected torch.float64"]),
    ],
    ids=["channels", "dimensions", "integers", "float64"],
)
def test_blocks(block, x, parts) -> None:
    module = {
        "BasicBlock": lambda: rf.BasicBlock(16, 16),
        "Bottleneck": lambda: rf.Bottleneck(16, 4),
        "ConvBNAct": lambda: rf.ConvBNAct(16, 4, 3, padding=1),
    }[block]()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        module(x)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


def test_block_needs_its_projection() -> None:
    block = rf.Bottleneck(16, 4, stride=2)
    with pytest.raises(ValueError, match=r"shortcut gives shape \[2, 16, 6, 6\], expected \[2, 16, 3, 3\]"):
        block(torch.randn(2, 16, 6, 6))
    assert block.bn1.num_batches_tracked == 0


def test_bad_memory_of_a_module() -> None:
    with pytest.raises(ValueError, match="memory is 'tiny'"):
        rf.ConvBNAct(4, 4, 1, memory="tiny")
    block = rf.BasicBlock(4, 4)
    block.memory = "tiny"
    with pytest.raises(ValueError, match="memory is 'tiny'"):
        block(torch.randn(2, 4, 4, 4))


def test_what_eager_takes_is_taken() -> None:
    """Empty batches and complex numbers have no kernel and run as plain PyTorch."""
    block = rf.BasicBlock(4, 4).eval()
    assert block(torch.empty(0, 4, 5, 5)).shape == (0, 4, 5, 5)
    unit = functional.ConvBN(torch.randn(3, 2, 1, 1, dtype=torch.complex64), has_norm=False, training=False)
    y = functional.conv_bn_act(torch.randn(2, 2, 4, 4, dtype=torch.complex64), unit, relu=False)
    assert y.is_complex()
    unbatched = rf.ConvBNAct(4, 6, 3, norm=False)
    x = torch.randn(4, 5, 5)
    torch.testing.assert_close(unbatched(x), nn.functional.relu(unbatched.conv(x)))
