"""Shortcuts that the join reads as they are: strided and padded with channels of zeros, or scaled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    Case,
    Observed,
    assert_agrees,
    observe_module,
    random_case,
    random_unit,
    randomise,
    relative_error,
)
from device import Device
from op_cases import activation, bits, nhwc, ops, vector
from pointwise_cases import HALVES, Arguments, assert_refused, columns, compare, dtypes, mask_of, strided, weight
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused import functional, reference
from resnet_fused.ops.layout import Padded
from resnet_fused.recorder import recording

# in channels, out channels, stride, channels of zeros in front, H, W: 16-byte accesses and single ones, several panels
PLACES = [(8, 16, 2, 4, 7, 5), (16, 32, 2, 8, 6, 9), (3, 7, 2, 2, 5, 4), (40, 72, 3, 0, 10, 8), (24, 24, 1, 0, 4, 4),
          (1, 70, 2, 69, 3, 3), (33, 300, 1, 100, 3, 5)]  # fmt: skip


# ---------------------------------------------------------------------------------------------- bn_act


def plain(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor, residual_scale: Tensor | None,
    residual_shift: Tensor | None, relu: bool, save_mask: bool, residual_stride: int, residual_offset: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    z = columns(scale) * x + columns(shift)
    r = Padded(residual_stride, residual_offset)(residual, x.shape[1])
    z = z + (r if residual_scale is None else columns(residual_scale) * r + columns(residual_shift))
    return ((F.relu(z) if relu else z).to(x.dtype),)


def arguments(place: tuple[int, ...], affine: bool, dtype: torch.dtype) -> Arguments:
    c, k, stride, offset, h, w = place
    given = {
        "x": activation(3, k, strided(h, stride), strided(w, stride), dtype),
        "scale": vector(k, dtype), "shift": vector(k, dtype), "residual": activation(3, c, h, w, dtype),
        "residual_scale": None, "residual_shift": None, "relu": True, "save_mask": True,
        "residual_stride": stride, "residual_offset": offset,
    }  # fmt: skip
    if affine:
        given |= {"residual_scale": vector(k, dtype), "residual_shift": vector(k, dtype)}
    return given


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_bn_act_reads_a_padded_residual(place: tuple[int, ...], affine: bool, device: Device) -> None:
    for dtype in [*dtypes(device), *([torch.float32] if device.name != "cpu" else [])]:
        results = compare(
            device, lambda **a: ops.bn_act(**a)[:1], plain, lambda d: arguments(place, affine, d), dtype
        )  # fmt: skip
        for given, got in results:
            y, mask = device.run(lambda a: ops.bn_act(**a), given)
            assert torch.equal(y, got["0"])
            assert torch.equal(bits(mask, y), y > 0)


def test_bn_act_padded_is_zero_padding_to_the_bit(device: Device) -> None:
    """The same numbers as with a tensor made for it."""
    for place in PLACES:
        given = arguments(place, False, torch.float32)
        made = nhwc(Padded(*place[2:4])(given["residual"], place[1]))
        got = device.run(lambda a: ops.bn_act(**a), given)
        plainly = given | {"residual": made, "residual_stride": 0, "residual_offset": 0}
        want = device.run(lambda a: ops.bn_act(**a), plainly)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_gradcheck_bn_act_padded(affine: bool, relu: bool) -> None:
    given = arguments(PLACES[2], affine, torch.float64)
    names = ["x", "scale", "shift", "residual", *(["residual_scale", "residual_shift"] if affine else [])]

    def call(*tensors: Tensor) -> Tensor:
        return ops.bn_act(**given | dict(zip(names, tensors, strict=True)) | {"relu": relu, "save_mask": relu})[0]

    assert torch.autograd.gradcheck(call, [given[name].requires_grad_() for name in names])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"residual_stride": -1, "residual_offset": 0}, "residual_stride is -1, expected 0 or more"),
        ({"residual": None}, "residual_stride is given without residual"),
        ({"residual_stride": 0}, "residual_offset is given without residual_stride"),
        ({"residual_stride": 3}, r"residual has shape \[3, 8, 7, 5\], of which stride 3 does not make x's pixels"),
        ({"residual_offset": 9}, r"residual_offset is 9, expected 0 to 8 \(x has 16 channels, residual 8\)"),
        ({"residual_offset": -1}, "residual_offset is -1, expected 0 to 8"),
        ({"residual": activation(3, 8, 7, 5, torch.float64)}, "residual has dtype float64, expected float32"),
    ],
)
def test_bn_act_refuses(changes: Arguments, message: str, device: Device) -> None:
    assert_refused(device, ops.bn_act, arguments(PLACES[0], False, torch.float32), changes, f"bn_act: {message}")


# --------------------------------------------------------------------------------------- conv1x1_dgrad


def plain_dgrad(
    dy: Tensor, weight: Tensor, height: int, width: int, stride: int, addend: Tensor, addend_mask: Tensor | None,
    addend_scale: float, addend_stride: int, addend_offset: int, **_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    shape = (dy.shape[0], weight.shape[1], height, width)
    dx = torch.nn.grad.conv2d_input(shape, weight, dy, stride=stride)
    addend = addend if addend_mask is None else addend * bits(addend_mask, addend)
    if addend_stride:
        addend = Padded(addend_stride, addend_offset).adjoint(addend, torch.zeros_like(dx))
    return (dx + addend_scale * addend,)


# C, K of the convolution, its stride; the shortcut's stride, channels of dy, channels in front; H, W
ADDENDS = [(16, 32, 1, 2, 40, 8, 9, 7), (64, 24, 1, 2, 128, 0, 8, 6), (72, 40, 2, 2, 144, 64, 7, 9),
           (24, 32, 2, 4, 56, 32, 9, 5), (40, 16, 1, 1, 64, 16, 5, 5), (40, 16, 2, 0, 40, 0, 6, 5)]  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, -0.375])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("place", ADDENDS, ids=str)
def test_dgrad_adds_the_gradient_of_a_padded_shortcut(
    place: tuple[int, ...], masked: bool, scale: float, device: Device
) -> None:
    c, k, stride, addend_stride, wide, offset, h, w = place
    step = addend_stride or 1

    def make(dtype: torch.dtype) -> Arguments:
        pixels = (strided(h, step), strided(w, step))
        names = ("mask", "u", "scale", "shift", "mean", "coef_dz", "coef_x", "coef_1", "gate_u", "gate_scale",
                 "gate_shift", "gate_mean")  # fmt: skip
        return dict.fromkeys(names) | {
            "dy": activation(2, k, strided(h, stride), strided(w, stride), dtype), "weight": weight(k, c, dtype),
            "height": h, "width": w, "stride": stride, "addend": activation(2, wide, *pixels, dtype),
            "addend_mask": mask_of(2, wide, *pixels) if masked else None, "addend_scale": scale,
            "addend_stride": addend_stride, "addend_offset": offset,
        }  # fmt: skip

    for dtype in dtypes(device):
        compare(device, lambda **a: ops.conv1x1_dgrad(**a)[:1], plain_dgrad, make, dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"addend_stride": -1}, "addend_stride is -1, expected 0 or more"),
        ({"addend_stride": 0}, "addend_offset is given without addend_stride"),
        ({"addend": None}, "addend_stride is given without addend"),
        ({"addend_stride": 3}, "addend has shape .*, whose pixels are not those that stride 3 makes of dx"),
        ({"addend_offset": 32}, r"addend_offset is 32, expected 0 to 24 \(dx has 16 channels, addend 40\)"),
        ({"addend_scale": 0.0}, "addend_scale is 0, expected another value"),
    ],
)
def test_dgrad_refuses(changes: Arguments, message: str, device: Device) -> None:
    arguments = dict.fromkeys(("mask", "u", "scale", "shift", "mean", "coef_dz", "coef_x", "coef_1", "addend_mask",
                               "gate_u", "gate_scale", "gate_shift", "gate_mean")) | {
        "dy": activation(2, 32, 6, 4, torch.bfloat16), "weight": weight(32, 16, torch.bfloat16), "height": 6,
        "width": 4, "stride": 1, "addend": activation(2, 40, 3, 2, torch.bfloat16), "addend_scale": 1.0,
        "addend_stride": 2, "addend_offset": 8,
    }  # fmt: skip
    assert_refused(device, ops.conv1x1_dgrad, arguments, changes, message)


# ----------------------------------------------------------------------------------------------- blocks


def special_case(kind: str, last_kernel: int, *, scale: float = 1.0, **unit: Any) -> Case:
    """Two units, the first strided; its shortcut padded, or scaled and of another kind."""
    stride, k = (2, 10) if kind in ("padded", "projection") else (1, 5)
    x = activation(2, 5, 5, 4, torch.float64).requires_grad_()
    first = random_unit(5, 6, 3, stride=(stride, stride), padding=(1, 1), **unit)
    last = random_unit(6, k, last_kernel, padding=(last_kernel // 2,) * 2, **unit)
    shortcut: Any = kind
    if kind == "padded":
        shortcut = Padded(2, 3)
    elif kind == "projection":
        shortcut = random_unit(5, 10, stride=(2, 2), **unit)
    elif kind == "tensor":
        shortcut = activation(2, 5, 5, 4, torch.float64).requires_grad_()
    return Case(x, (first, last), shortcut, branch_scale=0.1 if scale != 1 else 1.0, shortcut_scale=scale)


KINDS = [("padded", 1.0), ("padded", -0.75), ("identity", 0.5), ("tensor", 0.5), ("projection", 0.5), ("none", 0.5)]


def of_kind(kind: str, scale: float, last_kernel: int, **unit: Any) -> Case:
    case = special_case("identity" if kind == "none" else kind, last_kernel, scale=scale, **unit)
    return replace(case, shortcut=None) if kind == "none" else case


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("last_kernel", [1, 3])
@pytest.mark.parametrize(("kind", "scale"), KINDS)
def test_gradcheck_block(kind: str, scale: float, last_kernel: int, training: bool) -> None:
    for relu in (True, False):
        case = replace(of_kind(kind, scale, last_kernel, training=training), relu=relu)
        names = list(case.leaves())

        def call(*tensors: Tensor, case: Case = case, names: list[str] = names) -> Tensor:
            return case.with_tensors(dict(case.named()) | dict(zip(names, tensors, strict=True))).fused()

        assert torch.autograd.gradcheck(call, tuple(case.leaves().values()), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("kind", "scale"), KINDS)
def test_block_agrees_with_eager(kind: str, scale: float, dtype: torch.dtype) -> None:
    draws = [of_kind(kind, scale, kernel).to(dtype).draw() for kernel in (1, 3, 3, 1, 3, 1)]
    same = [draw for draw, kernel in zip(draws, (1, 3, 3, 1, 3, 1), strict=True) if kernel == 3]
    assert_agrees(same, dtype)
    assert_agrees([draw for draw, kernel in zip(draws, (1, 3, 3, 1, 3, 1), strict=True) if kernel == 1], dtype)


@pytest.mark.parametrize(("kind", "scale"), KINDS)
def test_without_norms_and_without_gradients(kind: str, scale: float) -> None:
    case = of_kind(kind, scale, 3, norm=False, bias=True).to(torch.float32)
    case.check()
    for training in (True, False):
        frozen = of_kind(kind, scale, 3, training=training).to(torch.float32).map(torch.detach)
        assert relative_error(frozen.fused(), frozen.to(torch.float64).eager()) < 1e-6


def test_a_scale_of_zero() -> None:
    for kind in ("identity", "padded"):
        case = replace(of_kind(kind, 0.5, 3), branch_scale=0.0, shortcut_scale=0.0).to(torch.float32)
        assert not case.fused().any()
        assert not any(g.any() for g in torch.autograd.grad(case.fused().sum(), list(case.leaves().values())))


def test_the_branchs_scale_costs_no_plan() -> None:
    """It is a part of the batch norm; a scale of the shortcut is a part of the join."""
    case = random_case(3, "identity")
    with recording() as calls:
        functional.residual_block(case.x, case.units, "identity", branch_scale=0.1)
        functional.residual_block(case.x, case.units, "identity", shortcut_scale=0.1)
    assert [call.spec.units[-1].plan for call in calls] == ["gram", "recompute"]
    assert [call.spec.adds_as_it_is for call in calls] == [True, False]


@pytest.mark.parametrize(
    ("shortcut", "message"),
    [
        (Padded(0, 0), "shortcut.stride is 0, expected at least 1"),
        (Padded(2, 6), "shortcut.before is 6, expected 0 to 5: x has 5 channels, the chain gives 10"),
        (Padded(2, -1), "shortcut.before is -1, expected 0 to 5"),
        (Padded(1, 0), r"shortcut gives shape \[2, 10, 5, 4\], expected \[2, 10, 3, 2\]"),
    ],
)
def test_bad_padding(shortcut: Padded, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(special_case("padded", 3), shortcut=shortcut).fused()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((4, 8, 0), "stride is 0, expected at least 1"), ((4, 8, 2, 5), "before is 5, expected 0 to 4")],
)
def test_bad_module(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rf.PaddedShortcut(*arguments)


# ---------------------------------------------------------------------------------------------- modules


class Eager(nn.Module):
    """relu(shortcut_scale * shortcut + branch_scale * F), in torchvision's order of modules."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        b: Any = self.block
        out = F.relu(b.bn1(b.conv1(x)))
        out = b.bn2(b.conv2(out))
        if hasattr(b, "bn3"):
            out = b.bn3(b.conv3(F.relu(out)))
        shortcut = x
        if isinstance(b.downsample, rf.PaddedShortcut):
            wide, (stride, before) = out.shape[1], b.downsample.padded
            sub = x[:, :, ::stride, ::stride]
            shortcut = torch.zeros_like(out)
            shortcut[:, before : before + x.shape[1]] = sub
            assert wide == b.downsample.out_channels
        elif b.downsample is not None:
            shortcut = b.downsample(x)
        return F.relu(shortcut * b.shortcut_scale + out * b.branch_scale)


def projection() -> nn.Module:
    return nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "basic, padded": lambda: rf.BasicBlock(16, 32, 2, rf.PaddedShortcut(16, 32, 2)),
    "basic, padded in front": lambda: rf.BasicBlock(16, 32, 2, rf.PaddedShortcut(16, 32, 2, before=8)),
    "bottleneck, padded": lambda: rf.Bottleneck(16, 8, 2, rf.PaddedShortcut(16, 32, 2, before=8)),
    "scaled": lambda: rf.ScaledBasicBlock(16, 16, branch_scale=0.3),
    "scaled shortcut": lambda: rf.ScaledBottleneck(16, 4, branch_scale=0.7, shortcut_scale=0.5),
    "scaled projection": lambda: rf.ScaledBasicBlock(16, 32, 2, projection(), branch_scale=0.3, shortcut_scale=0.5),
    "scaled and padded": lambda: rf.ScaledBottleneck(
        16, 8, 2, rf.PaddedShortcut(16, 32, 2), branch_scale=0.7, shortcut_scale=-0.5
    ),
}


def module_draw(
    kind: str, dtype: torch.dtype, seed: int, run: Callable[..., Any]
) -> tuple[Observed, Observed, Observed]:
    torch.manual_seed(seed)
    fused = BLOCKS[kind]()
    eager = Eager(randomise(copy.deepcopy(fused))).to(dtype)
    fused.load_state_dict(eager.block.state_dict())
    exact = copy.deepcopy(eager).double()
    x = activation(*((8, 16, 15, 13) if dtype in HALVES else (4, 16, 9, 7)), dtype).requires_grad_()
    dy = torch.randn(copy.deepcopy(eager)(x).shape).to(dtype)
    seen = (observe_module(eager, x, dy), observe_module(exact, x.double(), dy.double()))
    plain, wide = ({name.replace("block.", ""): t for name, t in s.items()} for s in seen)
    return run(observe_module, fused.to(dtype), x, dy), plain, wide


@pytest.mark.parametrize("kind", BLOCKS)
def test_modules(kind: str, device: Device) -> None:
    # In float16 a ReLU's sign flips so rarely that chance decides a few draws; the ops' own tests have it.
    for dtype in [torch.float32, torch.bfloat16] if device.name == "cpu" else [torch.bfloat16]:
        draws = [module_draw(kind, dtype, seed, lambda *a: device.run(*a)) for seed in range(6)]
        assert_agrees(draws, dtype)
    if device.name == "emulated" and "padded" in kind:
        assert any(symbol.startswith("bn_act_padded") for symbol in device.symbols)


@pytest.mark.parametrize("kind", BLOCKS)
def test_modules_run_fused_and_compose_to_the_same(kind: str) -> None:
    block = randomise(BLOCKS[kind]()).double()
    x = activation(2, 16, 6, 6, torch.float64)
    row = rf.explain(block, x).rows[0]
    assert row.plan.startswith("aten: ")
    if "padded" in kind:
        assert "strided and padded where it is read" in row.reason
    block.eval()
    with torch.no_grad():
        want = Eager(block)(x)
        assert relative_error(block(x), want) < 1e-12
        handle = block.conv1.register_forward_hook(lambda *_: None)  # now module by module
        assert relative_error(block(x), want) < 1e-12
        handle.remove()
        optimized = rf.optimize_for_inference(block, x)
        assert relative_error(optimized(x), want) < 1e-12


def test_a_padded_shortcut_with_a_hook_runs_as_it_is() -> None:
    block = BLOCKS["basic, padded"]()
    seen = []
    block.downsample.register_forward_hook(lambda *a: seen.append(a))
    block(activation(2, 16, 6, 6, torch.float32))
    assert seen


def test_fuse_reports_a_padded_shortcut_as_fused() -> None:
    report = rf.fuse_(nn.Sequential(reference.BasicBlock(16, 32, 2, rf.PaddedShortcut(16, 32, 2))))
    assert [(row.fused, row.reason) for row in report.rows] == [(True, "")]


@pytest.mark.parametrize("kind", ["basic, padded", "scaled shortcut"])
def test_traffic_is_less_than_eagers(kind: str) -> None:
    row = rf.explain(BLOCKS[kind](), activation(2, 16, 8, 8, torch.float32)).rows[0]
    assert row.moved is not None
    assert row.moved_eager is not None
    assert row.moved < 1.3 * row.moved_eager


def test_blocks_compile() -> None:
    torch.compiler.reset()
    for kind in ("basic, padded", "scaled and padded"):
        block, x = BLOCKS[kind](), activation(2, 16, 6, 6, torch.float32).requires_grad_()
        want = observe_module(copy.deepcopy(block), x, torch.ones(2, 32, 3, 3))
        got = observe_module(torch.compile(block, fullgraph=True), x, torch.ones(2, 32, 3, 3))
        got = {name.replace("_orig_mod.", ""): t for name, t in got.items()}
        assert all(relative_error(got[name], t) < 1e-5 for name, t in want.items())
