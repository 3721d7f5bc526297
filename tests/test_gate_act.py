"""gate_act and gate_act_backward, the function and the modules on top."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_agrees, observe_module, relative_error
from device import Device
from hypothesis import given
from hypothesis import strategies as st
from op_cases import DTYPES, activation, bits, isa, isas, nhwc, ops, same_bits, threads
from pointwise_cases import Arguments, assert_refused, compare, mask_of
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused import functional, reference

SHAPES = [(1, 1, 1, 1), (3, 8, 7, 5), (2, 33, 5, 4), (2, 72, 9, 11), (1, 300, 3, 3)]


def kinds(device: Device) -> list[torch.dtype]:
    return [d for d in DTYPES if device.name == "cpu" or d != torch.float64]


def forward(v: Tensor, x: Tensor, f: Tensor, relu: bool, save_mask: bool) -> tuple[Tensor, ...]:
    return (reference.gate_act(v, x, f, relu),)


def backward(dy: Tensor, mask: Tensor | None, v: Tensor, x: Tensor, f: Tensor) -> tuple[Tensor, ...]:
    dz, g = dy if mask is None else dy * bits(mask, dy), torch.sigmoid(v)
    return dz * (f - x) * g * (1 - g), dz * (1 - g), dz * g


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Arguments:
    x, f = (activation(*shape, dtype) for _ in range(2))
    return {"v": nhwc((4 * torch.randn(shape)).to(dtype)), "x": x, "f": f}


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape: tuple[int, ...], relu: bool, device: Device) -> None:
    for dtype in kinds(device):
        results = compare(
            device, lambda **a: ops.gate_act(**a)[:1], forward,
            lambda d: inputs(shape, d) | {"relu": relu, "save_mask": False}, dtype,
        )  # fmt: skip
        for args, got in results:
            if relu:
                y, mask = device.run(lambda a: ops.gate_act(**a), args | {"save_mask": True})
                assert torch.equal(y, got["0"])
                assert torch.equal(bits(mask, y), y > 0)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(shape: tuple[int, ...], masked: bool, device: Device) -> None:
    def make(dtype: torch.dtype) -> Arguments:
        mask = mask_of(*shape) if masked else None
        return {"dy": activation(*shape, dtype), "mask": mask, **inputs(shape, dtype)}

    for dtype in kinds(device):
        compare(device, ops.gate_act_backward, backward, make, dtype)


@given(
    n=st.integers(0, 4), c=st.integers(1, 400), h=st.integers(1, 9), w=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES), level=st.sampled_from(isas()),
)  # fmt: skip
def test_any_shape(n: int, c: int, h: int, w: int, dtype: torch.dtype, level: int) -> None:
    given = inputs((n, c, h, w), dtype)
    dy = activation(n, c, h, w, dtype)
    with isa(level):
        y, mask = ops.gate_act(**given, relu=True, save_mask=True)
        grads = ops.gate_act_backward(dy, mask, **given)
    wide = {name: t.double() for name, t in given.items()}
    exact = (*forward(**wide, relu=True, save_mask=False), *backward(dy.double(), mask, **wide))
    for got, want in zip((y, *grads), exact, strict=True):
        assert ((got.double() - want).abs() <= 2 * torch.finfo(dtype).eps * (want.abs() + 8)).all()


@pytest.mark.parametrize("level", isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_whole_range_of_the_sigmoid(dtype: torch.dtype, level: int) -> None:
    """g and 1 - g to a few roundings of themselves, and the ends: infinities and NaN as in PyTorch."""
    v = torch.linspace(-70, 70, 4001, dtype=dtype).view(1, -1, 1, 1)
    one, zero = torch.ones_like(v), torch.zeros_like(v)
    with isa(level):
        g, rest = (ops.gate_act(v, *pair, False, False)[0] for pair in ((zero, one), (one, zero)))
        ends = torch.tensor([float("inf"), float("-inf"), float("nan")], dtype=dtype).view(1, -1, 1, 1)
        y = ops.gate_act(ends, -torch.ones_like(ends), torch.ones_like(ends), False, False)[0].flatten()
    for got, want in ((g, torch.sigmoid(v.double())), (rest, torch.sigmoid(-v.double()))):
        assert ((got.double() - want).abs() <= 8 * torch.finfo(dtype).eps * want).all()
    assert y[:2].tolist() == pytest.approx([1.0, -1.0], rel=1e-6 if dtype == torch.float32 else 1e-14)
    assert y[2].isnan()


def test_nan_and_infinity(device: Device) -> None:
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0]).repeat(8).view(1, 8, 2, 2)
    one, two = torch.ones(1, 8, 2, 2), 2 * torch.ones(1, 8, 2, 2)
    y, mask = device.run(lambda *a: ops.gate_act(*a, True, True), *(nhwc(t) for t in (special, one, two)))
    want = reference.gate_act(special, one, two)
    torch.testing.assert_close(y, nhwc(want), equal_nan=True)
    assert bits(mask, y).all()  # as threshold_backward has it, a NaN passes


def test_threads_change_nothing() -> None:
    given = inputs((2, 24, 60, 65), torch.bfloat16)
    runs = []
    for count in (1, 2):
        with threads(count):
            y, mask = ops.gate_act(**given, relu=True, save_mask=True)
            runs.append([y, mask, *ops.gate_act_backward(y, mask, **given)])
    assert all(same_bits(a, b) for a, b in zip(*runs, strict=True))


X = nhwc(torch.zeros(2, 8, 4, 5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v": X.contiguous()}, "v has shape .* expected a dense channels_last tensor"),
        ({"x": X.half()}, r"x has dtype float16, expected float32 \(v is float32\)"),
        ({"f": nhwc(torch.zeros(2, 8, 5, 4))}, r"f has shape \[2, 8, 5, 4\], expected \[2, 8, 4, 5\]"),
        ({"relu": False}, "save_mask is True and relu is False"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str, device: Device) -> None:
    given = {"v": X, "x": X, "f": X, "relu": True, "save_mask": True}
    assert_refused(device, ops.gate_act, given, changes, f"gate_act: {message}")


# --------------------------------------------------------------------------------- the function, the modules


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("layout", ["nhwc", "nchw", "strided"])
def test_function(relu: bool, layout: str) -> None:
    draws = []
    for _ in range(4):
        base = [torch.randn(2, 6, 5, 4) for _ in range(4)]
        if layout == "nhwc":
            base = [nhwc(t) for t in base]
        elif layout == "strided":
            base = [torch.randn(2, 6, 5, 8)[..., ::2] for _ in range(4)]
        dy, *leaves = base
        runs = []
        for f, dtype in ((functional.gate_act, None), (reference.gate_act, None), (reference.gate_act, torch.float64)):
            own = [(t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in leaves]
            y = f(*own, relu)
            grads = torch.autograd.grad(y, own, dy.to(y.dtype))
            runs.append({"y": y.detach(), **{str(i): g for i, g in enumerate(grads)}})
        draws.append((runs[0], runs[1], runs[2]))
    assert_agrees(draws, torch.float32)


def test_what_the_kernels_do_not_take_runs_as_plain_pytorch() -> None:
    v, x = torch.randn(2, 6, 1, 1), torch.randn(2, 6, 4, 4)
    assert torch.equal(functional.gate_act(v, x, x), reference.gate_act(v, x, x))
    assert functional.gate_act(x, x.double(), x).dtype == torch.float64
    with pytest.raises(TypeError, match="expected a Tensor"):
        functional.gate_act(1, x, x)  # type: ignore[arg-type]


class EagerGated(nn.Module):
    def __init__(self, block: rf.GatedBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        b = self.block
        f = b.conv2.conv(F.relu(b.conv1.conv(x)))
        return reference.gate_act(b.gate.conv(x), x, f)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gated_block(dtype: torch.dtype) -> None:
    draws = []
    for seed in range(3):
        torch.manual_seed(seed)
        block = rf.GatedBlock(8).to(dtype)
        eager = EagerGated(copy.deepcopy(block))
        exact = copy.deepcopy(eager).double()
        x, dy = activation(2, 8, 9, 7, dtype).requires_grad_(), torch.randn(2, 8, 9, 7).to(dtype)
        seen = (observe_module(eager, x, dy), observe_module(exact, x.double(), dy.double()))
        plain, wide = ({name.replace("block.", ""): t for name, t in s.items()} for s in seen)
        draws.append((observe_module(block, x, dy), plain, wide))
    assert_agrees(draws, dtype)


def test_gated_block_under_autocast_and_compiled() -> None:
    block, x = rf.GatedBlock(8), activation(2, 8, 9, 7, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    assert relative_error(y, EagerGated(block)(x)) < 2e-2
    torch.compiler.reset()
    assert relative_error(torch.compile(block, fullgraph=True)(x), block(x)) < 1e-6
