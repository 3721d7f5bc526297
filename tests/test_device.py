"""The Python ops, autograd and modules on every device: the same calls on the CPU's and on the CUDA kernels.

Everything is held to the tolerance rule (conftest.py), against plain PyTorch in the same dtype and in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Observed, assert_agrees, observe_module, randomise
from device import Device
from op_cases import activation, bits, vector
from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet

import resnet_fused as rf

ops = torch.ops.resnet_fused

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEEDS = (0, 1)  # of the data and of the order of the warps
# [N, C, H, W]: rows that fill no tile of 8; channels for 16-byte accesses, for those of float32 only, for none
SHAPES = [(3, 40, 7, 9), (2, 12, 5, 7), (1, 33, 5, 5)]
WINDOW = (3, 2, 1)  # kernel, stride, padding of the pool


# ------------------------------------------------------------------------------------------------- the tail ops


def columns(v: Tensor) -> Tensor:
    """A vector [C] over [N, C, H, W]."""
    return v.view(-1, 1, 1)


def gate(mask: Tensor | None, scale: Tensor | None, shift: Tensor | None, x: Tensor) -> Tensor:
    """relu' of a backward op's arguments, as booleans."""
    if mask is not None:
        return bits(mask, x)
    return torch.ones_like(x, dtype=torch.bool) if scale is None else columns(scale) * x + columns(shift) > 0


def bn_stats(x: Tensor) -> tuple[Tensor, ...]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.mean((0, 2, 3)), wide.var((0, 2, 3), unbiased=False)


def bn_act(x, scale, shift, residual, residual_scale, residual_shift, relu, save_mask) -> tuple[Tensor, ...]:
    z = columns(scale) * x + columns(shift)
    if residual_scale is not None:
        z = z + columns(residual_scale) * residual + columns(residual_shift)
    elif residual is not None:
        z = z + residual
    mask = (z > 0).to(scale.dtype) if save_mask else torch.empty(0, dtype=torch.int32)
    return (F.relu(z) if relu else z).to(x.dtype), mask


def gram_operand(x, scale, shift, relu, center, stride) -> tuple[Tensor, ...]:
    z = x[:, :, ::stride, ::stride]
    if scale is not None:
        z = columns(scale) * z + columns(shift)
    a = ((F.relu(z) if relu else z) - columns(center)).to(x.dtype)
    return a, a.to(center.dtype).mean((0, 2, 3))


def backward_reduce(dy, mask, x, scale, shift, mean, write_dz) -> tuple[Tensor, ...]:
    dz = dy * gate(mask, scale, shift, dy if x is None else x)
    wide = dz.to(torch.promote_types(dy.dtype, torch.float32))
    weighted = torch.empty(0, dtype=wide.dtype) if mean is None else (wide * (x - columns(mean))).sum((0, 2, 3))
    return (dz if write_dz else dz.new_empty(0)), wide.sum((0, 2, 3)), weighted


def backward_apply(dy, mask, x, scale, shift, mean, coef_dz, coef_x, coef_1) -> tuple[Tensor]:
    dz = dy * gate(mask, scale, shift, x)
    return ((columns(coef_dz) * dz + columns(coef_x) * (x - columns(mean)) + columns(coef_1)).to(x.dtype),)


def pool(x, scale, shift, dy, window: tuple[int, int, int] = WINDOW) -> tuple[Tensor, ...]:
    """The pooled activation, and the gradient of what was pooled."""
    a = F.relu(columns(scale) * x + columns(shift)).requires_grad_()
    y = F.max_pool2d(a, *window)
    (da,) = torch.autograd.grad(y, a, dy.to(y.dtype))
    return y.detach().to(x.dtype), da.to(x.dtype)


def fused_pool(x, scale, shift, dy, window: tuple[int, int, int] = WINDOW) -> tuple[Tensor, ...]:
    y, argmax = ops.bn_act_pool(x, scale, shift, *window)
    return y, ops.bn_act_pool_backward(dy, argmax, *x.shape[2:], *window)


def with_bits(f: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """An op (x, ...) -> (y, mask) whose mask comes as 0 and 1 in [N, C, H, W]."""

    def call(*arguments: Any) -> tuple[Tensor, Tensor]:
        y, mask = f(*arguments)
        return y, bits(mask.cpu(), y.cpu()).float() if mask.numel() else mask

    return call


def residual(affine: bool = False) -> Callable[[Tensor], tuple[Any, ...]]:
    return lambda x: (like(x), *((v(x), v(x)) if affine else (None, None)))


def like(x: Tensor) -> Tensor:
    return activation(*x.shape, x.dtype)


def v(x: Tensor) -> Tensor:
    return vector(x.size(1), x.dtype)


def packed(x: Tensor) -> Tensor:
    """A random mask, int32 [ceil(C/32), M]."""
    return ops.relu_mask(like(x))


@dataclass(frozen=True)
class Op:
    """An op, what it is in plain PyTorch, and its arguments for an activation."""

    fused: Callable[..., Any]
    plain: Callable[..., Any]
    arguments: Callable[[Tensor], tuple[Any, ...]]


REDUCE, APPLY = ops.bn_act_backward_reduce, lambda *a: (ops.bn_act_backward_apply(*a),)
OPS = {
    "bn_stats": Op(ops.bn_stats, bn_stats, lambda x: (2 * x + 3,)),
    "bn_act": Op(ops.bn_act, bn_act, lambda x: (x, v(x), v(x), None, None, None, False, False)),
    "bn_act, mask": Op(with_bits(ops.bn_act), bn_act, lambda x: (x, v(x), v(x), None, None, None, True, True)),
    "bn_act, residual": Op(ops.bn_act, bn_act, lambda x: (x, v(x), v(x), like(x), None, None, True, False)),
    "bn_act, affine": Op(with_bits(ops.bn_act), bn_act, lambda x: (x, v(x), v(x), like(x), v(x), v(x), True, True)),
    "relu_mask": Op(lambda y: (bits(ops.relu_mask(y).cpu(), y.cpu()),), lambda y: (y > 0,), lambda x: (x,)),
    "gram_operand": Op(ops.gram_operand, gram_operand, lambda x: (x, v(x), v(x), True, v(x), 1)),
    "gram_operand, strided": Op(ops.gram_operand, gram_operand, lambda x: (x, None, None, False, v(x), 2)),
    "reduce, mask": Op(REDUCE, backward_reduce, lambda x: (like(x), packed(x), x, None, None, v(x), True)),
    "reduce, recomputed": Op(REDUCE, backward_reduce, lambda x: (like(x), None, x, v(x), v(x), v(x), False)),
    "reduce, one sum": Op(REDUCE, backward_reduce, lambda x: (like(x), packed(x), None, None, None, None, False)),
    "apply, mask": Op(APPLY, backward_apply, lambda x: (like(x), packed(x), x, None, None, v(x), v(x), v(x), v(x))),
    "apply, added": Op(
        lambda *a: (ops.bn_act_backward_apply(*a),),
        lambda *a: (backward_apply(*a[:-1])[0] + a[-1],),
        lambda x: (like(x), packed(x), x, None, None, v(x), v(x), v(x), v(x), like(x)),
    ),
    "apply, recomputed": Op(APPLY, backward_apply, lambda x: (like(x), None, x, *(v(x) for _ in range(6)))),
    "pool": Op(fused_pool, pool, lambda x: (x, v(x), v(x), like(F.max_pool2d(x, *WINDOW)))),
}


def named(results: tuple[Tensor, ...]) -> Observed:
    return {str(i): t for i, t in enumerate(results)}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_op(op: Op, shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> None:
    check_op(op, shape, dtype, device)


def check_op(op: Op, shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> None:
    draws = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        arguments = op.arguments(activation(*shape, dtype))
        exact = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
        got = device.run(op.fused, *arguments, seed=seed)
        draws.append((named(got), named(op.plain(*arguments)), named(op.plain(*exact))))
    assert_agrees(draws, dtype)


def test_emulated_calls_take_the_kernels_of_their_alignment() -> None:
    emulated = Device("emulated")
    for channels, variant in ((40, "f16_v8"), (12, "f16")):
        emulated.run(ops.bn_stats, activation(2, channels, 5, 7, torch.float16))
        assert emulated.symbols == [f"bn_stats_{variant}", "bn_stats_finalize"]


def test_emulated_calls_that_launch_nothing_fail() -> None:
    with pytest.raises(AssertionError, match="no kernel was launched"):
        Device("emulated").run(torch.relu, torch.zeros(1))


# --------------------------------------------------------------------------------------------- blocks and models


class EagerStem(nn.BatchNorm2d):
    """The stem's tail as torchvision runs it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(super().forward(x)), *WINDOW)


def block(source: Any, name: str, kind: str, planes: int = 8) -> nn.Module:
    """A block of torchvision's or ours that takes 4 * planes channels."""
    cls, wide = getattr(source, name), 4 * planes
    if kind == "identity":
        return cls(wide, wide // cls.expansion)
    out, stride = planes * cls.expansion, 2 if kind == "stride 2" else 1
    return cls(wide, planes, stride, nn.Sequential(nn.Conv2d(wide, out, 1, stride, bias=False), nn.BatchNorm2d(out)))


def pair(name: str, kind: str) -> tuple[nn.Module, nn.Module]:
    """(ours, PyTorch's), of one random state."""
    if name == "BNReLUMaxPool":
        fused, eager = rf.BNReLUMaxPool(32), EagerStem(32)
    else:
        fused, eager = block(rf, name, kind), block(torchvision_resnet, name, kind)
    fused.load_state_dict(randomise(eager).state_dict())
    return fused, eager


MODULES = [("BNReLUMaxPool", "stem")]
MODULES += [(name, kind) for name in ("BasicBlock", "Bottleneck") for kind in ("identity", "projection", "stride 2")]


@pytest.mark.parametrize(("name", "kind"), MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_module_step(name: str, kind: str, dtype: torch.dtype, device: Device) -> None:
    """Output, gradients and running statistics."""
    draws = []
    # In few data a sign that rounding flips is a large error, ours or eager's: bfloat16 has many.
    for seed in range(6) if dtype == torch.bfloat16 else SEEDS:
        torch.manual_seed(seed)
        fused, eager = (module.to(dtype) for module in pair(name, kind))
        exact = copy.deepcopy(eager).double()
        x = activation(24, 32, 15, 15, dtype).requires_grad_()
        dy = torch.randn(copy.deepcopy(eager)(x).shape).to(dtype)
        got = device.run(observe_module, fused, x, dy, seed=seed)
        draws.append((got, observe_module(eager, x, dy), observe_module(exact, x.double(), dy.double())))
    assert_agrees(draws, dtype)


def training_step(model: nn.Module, x: Tensor, labels: Tensor) -> Observed:
    """A step of SGD from a state with momentum: loss, gradients and everything that it changes."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for _ in range(2):
        optimiser.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimiser.step()
    momenta = {f"momentum of {name}": optimiser.state[p]["momentum_buffer"] for name, p in model.named_parameters()}
    return {"loss": loss.detach(), **model.state_dict(), **momenta}


def test_training_step_of_a_bottleneck(device: Device) -> None:
    """By the rule, with what the CPU's kernels give in the place of eager's."""
    models = []
    for source, stem in ((rf, rf.BNReLUMaxPool), (torchvision_resnet, EagerStem)):
        tail = [block(source, "Bottleneck", "stride 2"), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)]
        models.append(nn.Sequential(nn.Conv2d(3, 32, 3, bias=False), stem(32), *tail))
    fused, eager = models
    fused.load_state_dict(randomise(eager).state_dict())
    x, labels = activation(4, 3, 13, 11, torch.float32), torch.arange(4)
    on_cpu = training_step(copy.deepcopy(fused), x, labels)
    exact = training_step(eager.double(), x.double(), labels)
    assert_agrees([(device.run(training_step, fused, x, labels), on_cpu, exact)], torch.float32)
    if device.name == "emulated":
        kernels = {symbol.split("_f32")[0] for symbol in device.symbols}
        assert kernels >= {"bn_stats", "bn_act", "bn_act_backward_reduce", "bn_act_backward_apply", "bn_act_pool"}
