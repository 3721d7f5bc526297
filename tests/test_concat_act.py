"""concat_act and concat_act_backward, the shortcut that is concatenated, and the blocks on top."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Case, assert_agrees, observe_module, random_unit, randomise, relative_error
from device import Device
from op_cases import DTYPES, acc_of, activation, bits, isa, isas, nhwc, ops, same_bits, threads, vector
from pointwise_cases import (
    HALVES,
    Arguments,
    assert_dense,
    assert_refused,
    columns,
    compare,
    empty,
    mask_of,
    masked,
    summed,
)
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused import functional, reference
from resnet_fused.counting import counting
from resnet_fused.ops.pointwise import as_on_a_gpu
from resnet_fused.recorder import recording
from resnet_fused.traffic import block_bytes

# channels of x, of u, H, W: 16-byte accesses in both parts, in one, in none; several panels
PLACES = [(8, 16, 7, 5), (64, 40, 6, 9), (16, 3, 5, 4), (3, 16, 4, 4), (1, 1, 1, 1), (33, 300, 3, 5), (264, 8, 3, 3)]


def kinds(device: Device) -> list[torch.dtype]:
    return [d for d in DTYPES if device.name == "cpu" or d != torch.float64]


# ------------------------------------------------------------------------------------------------ the ops


def forward(x: Tensor, u: Tensor, scale: Tensor, shift: Tensor, relu: bool, save_mask: bool) -> tuple[Tensor, ...]:
    z = columns(scale) * u + columns(shift)
    return (torch.cat([x, (F.relu(z) if relu else z).to(x.dtype)], 1),)


def backward(dy: Tensor, mask: Tensor | None, u: Tensor | None, mean: Tensor | None, before: int) -> tuple[Tensor, ...]:
    dz = masked(dy[:, before:], mask)
    if u is None or mean is None:
        return dz, dz.to(acc_of(dz.dtype)).sum((0, 2, 3)), empty(dz)
    return summed(dz, u, mean)


def inputs(place: tuple[int, ...], relu: bool, dtype: torch.dtype) -> Arguments:
    c, k, h, w = place
    x, u = activation(3, c, h, w, dtype), activation(3, k, h, w, dtype)
    return {"x": x, "u": u, "scale": vector(k, dtype), "shift": vector(k, dtype), "relu": relu, "save_mask": relu}


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_forward(place: tuple[int, ...], relu: bool, device: Device) -> None:
    c = place[0]
    for dtype in kinds(device):
        results = compare(device, lambda **a: ops.concat_act(**a)[:1], forward, lambda d: inputs(place, relu, d), dtype)
        for args, got in results:
            y, mask = device.run(lambda a: ops.concat_act(**a), args)
            assert_dense(y)
            assert same_bits(y[:, :c].contiguous(), args["x"].contiguous())
            assert torch.equal(y, got["0"])
            if relu:
                assert torch.equal(bits(mask, args["u"]), y[:, c:] > 0)


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_backward(place: tuple[int, ...], gated: bool, sums: bool, device: Device) -> None:
    c, k, h, w = place

    def make(dtype: torch.dtype) -> Arguments:
        dy, u = activation(3, c + k, h, w, dtype), activation(3, k, h, w, dtype) if sums else None
        mask = mask_of(3, k, h, w) if gated else None
        return {"dy": dy, "mask": mask, "u": u, "mean": vector(k, dtype) if sums else None, "before": c}

    for dtype in kinds(device):
        compare(device, ops.concat_act_backward, backward, make, dtype)


@pytest.mark.parametrize("level", isas())
def test_every_instruction_set_and_number_of_threads(level: int) -> None:
    given = inputs((40, 72, 40, 33), True, torch.bfloat16)
    runs = []
    for count in (1, 2):
        with isa(level), threads(count):
            y, mask = ops.concat_act(**given)
            runs.append([y, mask, *ops.concat_act_backward(y, mask, given["u"], given["shift"], 40)])
    assert all(same_bits(a, b) for a, b in zip(*runs, strict=True))
    torch.testing.assert_close(runs[0][0], nhwc(forward(**given)[0]), rtol=2e-2, atol=2e-2)


def test_x_is_copied_to_the_bit(device: Device) -> None:
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]).repeat(8).view(1, 8, 2, 2)
    x, one = nhwc(special), torch.ones(8)
    y, _ = device.run(lambda *a: ops.concat_act(*a, True, False), x, nhwc(torch.zeros(1, 8, 2, 2)), one, one)
    assert same_bits(y[:, :8].contiguous(), special)


X, U, V = nhwc(torch.zeros(2, 8, 4, 5)), nhwc(torch.zeros(2, 16, 4, 5)), torch.ones(16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X.half()}, r"x has dtype float16, expected float32 \(u is float32\)"),
        ({"x": nhwc(torch.zeros(2, 8, 5, 4))}, r"x has shape \[2, 8, 5, 4\], expected \[2, 8, 4, 5\]"),
        ({"u": U.contiguous()}, "u has shape .* expected a dense channels_last tensor"),
        ({"scale": V[:8]}, r"scale has shape \[8\], expected \[16\]"),
        ({"relu": False}, "save_mask is True and relu is False"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str, device: Device) -> None:
    given = {"x": X, "u": U, "scale": V, "shift": V, "relu": True, "save_mask": True}
    assert_refused(device, ops.concat_act, given, changes, f"concat_act: {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"before": 0}, r"before is 0, expected 1 to 23 \(dy has 24 channels\)"),
        ({"before": 24}, "before is 24, expected 1 to 23"),
        ({"before": 9}, r"u has shape \[2, 16, 4, 5\], expected \[2, 15, 4, 5\]"),
        ({"mean": None}, "u is given without mean"),
        ({"mask": torch.zeros(2, 40, dtype=torch.int32)}, r"mask has shape \[2, 40\], expected \[1, 40\]"),
    ],
)
def test_backward_refuses(changes: dict[str, Any], message: str, device: Device) -> None:
    given = {"dy": nhwc(torch.zeros(2, 24, 4, 5)), "mask": None, "u": U, "mean": V, "before": 8}
    assert_refused(device, ops.concat_act_backward, given, changes, f"concat_act_backward: {message}")


# ------------------------------------------------------------------------------------------------ the block


def case_of(last_kernel: int, c: int = 5, k: int = 7, side: int = 6, **unit: Any) -> Case:
    """Two units whose output stands behind x."""
    x = activation(2, c, side, side - 1, torch.float64).requires_grad_()
    first = random_unit(c, 2 * c, 3, padding=(1, 1), **unit)
    return Case(x, (first, random_unit(2 * c, k, last_kernel, padding=(last_kernel // 2,) * 2, **unit)), "concat")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("last_kernel", [1, 3])
def test_gradcheck(last_kernel: int, relu: bool, training: bool) -> None:
    case = replace(case_of(last_kernel, training=training), relu=relu)
    names = list(case.leaves())

    def call(*tensors: Tensor) -> Tensor:
        return case.with_tensors(dict(case.named()) | dict(zip(names, tensors, strict=True))).fused()

    assert torch.autograd.gradcheck(call, tuple(case.leaves().values()), fast_mode=True)


@pytest.mark.parametrize("memory", ["lean", "fast"])
@pytest.mark.parametrize("last_kernel", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_agrees_with_eager(dtype: torch.dtype, last_kernel: int, memory: str) -> None:
    draws = [replace(case_of(last_kernel), memory=memory).to(dtype).draw() for _ in range(4)]
    assert_agrees(draws, dtype)


@pytest.mark.parametrize("last_kernel", [1, 3])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_on_the_kernels(dtype: torch.dtype, last_kernel: int, device: Device) -> None:
    draws = [device.run(case_of(last_kernel, 16, 24, 12).to(dtype).draw) for _ in range(4)]
    assert_agrees(draws, dtype)
    if device.name == "emulated":
        assert {"concat_act_copy", "bn_act_backward_reduce"} <= {s.rsplit("_", 2)[0] for s in device.symbols}


@pytest.mark.parametrize("frozen", ["x", "gamma", "beta", "weight"])
@pytest.mark.parametrize("training", [True, False])
def test_any_tensor_may_refuse_its_gradient(frozen: str, training: bool, device: Device) -> None:
    case = case_of(3, 8, 16, training=training).to(torch.bfloat16 if device.name == "emulated" else torch.float32)
    for name, t in case.named():
        if name.endswith(frozen):
            t.requires_grad_(False)
    dtype = case.x.dtype
    assert_agrees([device.run(case.draw) for _ in range(1)], dtype)


def test_without_norms_and_without_gradients() -> None:
    for unit in ({"norm": False, "bias": True}, {"training": False}, {}):
        case = case_of(3, **unit).to(torch.float32)
        case.check()
        detached = case.map(torch.detach)
        assert relative_error(detached.fused(), detached.to(torch.float64).eager()) < 1e-6


def test_under_autocast_x_stays_as_it_is() -> None:
    """As torch.cat has it, which promotes; the branch is narrow."""
    block = randomise(rf.ConcatBasicBlock(8, 16))
    x, eager = torch.randn(2, 8, 6, 5), Eager(copy.deepcopy(block))
    for mode in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            y, want = block.train(mode)(x), eager.train(mode)(x)
        assert y.dtype == want.dtype == torch.float32
        assert torch.equal(y[:, :8], x)
        assert relative_error(y, want) < 2e-2


def test_a_scaled_shortcut_runs_as_plain_pytorch() -> None:
    case = replace(case_of(3), shortcut_scale=0.5, branch_scale=2.0)
    with recording() as calls:
        assert torch.equal(case.fused(), case.eager())
    assert [call.reason for call in calls] == ["the shortcut is scaled and concatenated"]


def test_other_pixels_are_refused() -> None:
    x, unit = torch.zeros(2, 4, 6, 5), random_unit(4, 3, stride=(2, 2)).weight.float()
    with pytest.raises(ValueError, match=r'"concat" has shape \[2, 4, 6, 5\], the chain gives \[2, 3, 3, 3\]'):
        functional.residual_block(x, [functional.ConvBN(unit, stride=(2, 2))], "concat")
    with pytest.raises(ValueError, match='shortcut is \'cat\', expected "identity", "concat"'):
        functional.residual_block(x, [functional.ConvBN(unit)], "cat")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ modules

BLOCKS: dict[str, Callable[[], Any]] = {
    "basic": lambda: rf.ConcatBasicBlock(16, 8),
    "bottleneck": lambda: rf.ConcatBottleneck(16, 8),
    "bottleneck, groups": lambda: rf.ConcatBottleneck(16, 8, groups=2),
}


class Eager(nn.Module):
    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        b = self.block
        out = F.relu(b.bn2(b.conv2(F.relu(b.bn1(b.conv1(x))))))
        if hasattr(b, "bn3"):
            out = F.relu(b.bn3(b.conv3(out)))
        return torch.cat([x, out], 1)


@pytest.mark.parametrize("kind", BLOCKS)
def test_modules(kind: str, device: Device) -> None:
    dtype = torch.float32 if device.name == "cpu" else torch.bfloat16
    draws = []
    for seed in range(4):
        torch.manual_seed(seed)
        block = randomise(BLOCKS[kind]()).to(dtype)
        eager = Eager(copy.deepcopy(block))
        exact = copy.deepcopy(eager).double()
        x = activation(4, 16, 9, 7, dtype).requires_grad_()
        dy = torch.randn(copy.deepcopy(eager)(x).shape).to(dtype)
        seen = (observe_module(eager, x, dy), observe_module(exact, x.double(), dy.double()))
        plain, wide = ({name.replace("block.", ""): t for name, t in s.items()} for s in seen)
        draws.append((device.run(observe_module, block, x, dy), plain, wide))
    assert_agrees(draws, dtype)


@pytest.mark.parametrize("kind", BLOCKS)
def test_modules_run_fused_and_compose_to_the_same(kind: str) -> None:
    block = randomise(BLOCKS[kind]()).double()
    x = activation(2, 16, 6, 6, torch.float64)
    row = rf.explain(block, x).rows[0]
    assert "the output is written beside the shortcut's" in row.reason
    assert row.moved is not None
    assert row.moved < 1.3 * (row.moved_eager or 0)
    block.eval()
    with torch.no_grad():
        want = Eager(block)(x)
        assert relative_error(block(x), want) < 1e-12
        handle = block.conv1.register_forward_hook(lambda *_: None)  # now module by module
        assert relative_error(block(x), want) < 1e-12
        handle.remove()
        assert relative_error(rf.optimize_for_inference(block, x)(x), want) < 1e-12


@pytest.mark.parametrize("memory", ["lean", "fast"])
@pytest.mark.parametrize("kind", ["basic", "bottleneck", "padded"])
def test_traffic_is_as_predicted(kind: str, memory: str) -> None:
    """On the kernels and through ATen, in whole passes."""
    make: dict[str, Callable[[], Any]] = {
        "basic": lambda: rf.ConcatBasicBlock(64, 32),
        "bottleneck": lambda: rf.ConcatBottleneck(64, 32),
        "padded": lambda: rf.BasicBlock(32, 64, 1, rf.PaddedShortcut(32, 64)),
    }
    block = make[kind]().to("meta", torch.bfloat16).to(memory_format=torch.channels_last)
    block.memory = memory
    x = activation(64, block.conv1.in_channels, 32, 32, torch.bfloat16).to("meta")
    with as_on_a_gpu(), recording() as calls:
        with counting() as forward_pass:
            y = block(x.requires_grad_())
        dy = torch.ones_like(y)
        with counting() as backward_pass:
            y.backward(dy)
    ours = block_bytes(calls[0])[1]
    assert forward_pass.moved.passes == pytest.approx(ours.forward, rel=5e-3)  # weights and vectors are counted too
    assert backward_pass.moved.passes == pytest.approx(ours.backward, rel=5e-3)


def test_fuse_converts_the_plain_blocks_children_of_a_network_only() -> None:
    """A reference block of this kind is no torchvision block: it stays, and its fused twin loads its state."""
    plain, fused = reference.ConcatBasicBlock(16, 8), rf.ConcatBasicBlock(16, 8)
    fused.load_state_dict(plain.state_dict())
    x = activation(2, 16, 6, 6, torch.float32)
    rf.fuse_(nn.Sequential(plain))
    assert relative_error(fused(x), plain(x)) < 1e-6
    assert relative_error(torch.compile(fused, fullgraph=True)(x), plain(x)) < 1e-6
