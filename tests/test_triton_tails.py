"""The Triton kernels of the tails: interpreted, as PTX on the emulator, as machine code, and as ops of torch."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import test_add_stats
import test_concat_act
import test_device
import test_gate_act
import torch
import torch.nn.functional as F
from device import COMPILED_TRITON, Device
from op_cases import activation, bits, nhwc, ops, same_bits, vector
from test_device import SHAPES, Op, check_op, like, named, packed, v, with_bits
from test_large_tensors import reserve
from test_ops_registration import STEPS, samples
from torch import Tensor
from triton_launchers import Assembler, ByTriton, TritonEmulator, interpreted

from resnet_fused import triton
from resnet_fused.ops.layout import Padded
from resnet_fused.triton import bn_act, launch, tile

TRITON = torch.ops.resnet_fused_triton
ARCHES = (80, 90, 100, 120)


def padded(x: Tensor) -> Tensor:
    """A residual that a padded shortcut of stride 2 and offset 1 brings to x's shape."""
    n, c, h, w = x.shape
    return activation(n, c - 2, 2 * h - 1, 2 * w, x.dtype)


def bn_act_padded(x, scale, shift, residual, relu) -> tuple[Tensor, ...]:
    wide = Padded(2, 1)(residual, x.shape[1])
    return test_device.bn_act(x, scale, shift, wide, None, None, relu, False)


def pooling(*window: int) -> Op:
    def arguments(x: Tensor) -> tuple[Any, ...]:
        return x, v(x), v(x), like(F.max_pool2d(x, *window)), window

    return Op(test_device.fused_pool, test_device.pool, arguments)


def gate_forward(x: Tensor) -> tuple[Any, ...]:
    return like(x), x, like(x), True, True


def gate_plain(v: Tensor, x: Tensor, f: Tensor, relu: bool, save_mask: bool) -> tuple[Tensor, Tensor]:
    (y,) = test_gate_act.forward(v, x, f, relu, save_mask)
    return y, (y > 0).float()


def other(x: Tensor) -> Tensor:
    """What stands in front of x: of more channels, by a number that keeps accesses what they are."""
    n, c, h, w = x.shape
    return activation(n, c + 8, h, w, x.dtype)


def wider(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return activation(n, 2 * c + 8, h, w, x.dtype)


def concat_with_bits(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y, mask = ops.concat_act(x, *rest)
    return y, bits(mask.cpu(), y.cpu()[:, x.shape[1] :]).float()


def concat_plain(*args: Any) -> tuple[Tensor, Tensor]:
    (y,) = test_concat_act.forward(*args)
    return y, (y[:, args[0].shape[1] :] > 0).float()


OPS = test_device.OPS | {
    "pool, overlapping": pooling(5, 2, 2),
    "pool, with gaps": pooling(2, 3, 0),
    "gate_act": Op(with_bits(ops.gate_act), gate_plain, gate_forward),
    "gate_act_backward": Op(
        ops.gate_act_backward, test_gate_act.backward, lambda x: (like(x), packed(x), x, like(x), like(x))
    ),
    "concat_act": Op(concat_with_bits, concat_plain, lambda x: (other(x), x, v(x), v(x), True, True)),
    "concat_act_backward": Op(
        ops.concat_act_backward,
        test_concat_act.backward,
        lambda x: (wider(x), packed(x), x, v(x), other(x).shape[1]),
    ),
    "concat_act_backward, plain": Op(
        ops.concat_act_backward, test_concat_act.backward, lambda x: (wider(x), None, None, None, other(x).shape[1])
    ),
    "add_stats": Op(ops.add_stats, test_add_stats.plain, lambda x: (x, like(x), None, None)),
    "add_stats, affine": Op(ops.add_stats, test_add_stats.plain, lambda x: (x, like(x), v(x), v(x))),
    "bn_act, padded": Op(
        lambda x, s, t, r, relu: ops.bn_act(x, s, t, r, None, None, relu, False, 2, 1),
        bn_act_padded,
        lambda x: (x, v(x), v(x), padded(x), True),
    ),
}


# ----------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # it truncates bfloat16
def test_interpreted(op: Op, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_op(op, shape, dtype, Device("interpreted"))


FIRST = [(SHAPES[0], torch.bfloat16), (SHAPES[2], torch.float32)]
OTHERS = [(s, d) for s in SHAPES for d in test_device.DTYPES if (s, d) not in FIRST]


@pytest.mark.parametrize("name", COMPILED_TRITON)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize(
    ("shape", "dtype"), [*FIRST, *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)], ids=str
)
def test_compiled(op: Op, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> None:
    check_op(op, shape, dtype, Device(name))


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_agrees_with_the_other_kernels(op: Op) -> None:
    """Masks and winners are equal; what is rounded once differs by a rounding, and sums by their order."""
    arguments = op.arguments(activation(2, 33, 5, 9, torch.float32))
    got, *others = (
        named(Device(name).run(op.fused, *arguments)) for name in ("triton-sm_80", "emulated", "cpu", "interpreted")
    )
    for other in others:
        for key, want in other.items():
            assert (got[key].dtype, got[key].stride()) == (want.dtype, want.stride())
            torch.testing.assert_close(got[key], want, rtol=1e-5, atol=1e-5)
            assert want.dtype.is_floating_point or torch.equal(got[key], want)


WITH_SUMS = [name for name in OPS if name.startswith(("bn_stats", "add_stats", "reduce", "gram_operand"))]
INTERPRETED_AND_COMPILED = ["interpreted", *COMPILED_TRITON[::2]]


@pytest.mark.parametrize("name", INTERPRETED_AND_COMPILED)
@pytest.mark.parametrize("op", WITH_SUMS)
def test_several_tiles_a_program(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with many more pixels: chunks of two tiles of 64 rows, and of the last one less."""
    monkeypatch.setattr(tile, "PROGRAMS", 2)
    check_op(OPS[op], (3, 40, 7, 11), torch.float32, Device(name))


@pytest.mark.parametrize("op", WITH_SUMS)
def test_order_of_the_warps_changes_nothing(op: str) -> None:
    arguments = OPS[op].arguments(activation(3, 40, 7, 9, torch.float16))
    runs = [Device("triton-sm_80").run(OPS[op].fused, *arguments, seed=seed) for seed in (1, 2)]
    assert all(same_bits(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("name", INTERPRETED_AND_COMPILED)
@pytest.mark.parametrize("channels", [16, 33])
def test_statistics_far_from_zero(channels: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At mean / std = 1000 a difference of raw second moments would have no digit left in float32."""
    monkeypatch.setattr(tile, "PROGRAMS", 3)
    x, device = nhwc(1000 + torch.randn(4, channels, 20, 21)), Device(name)
    summed = device.run(ops.add_stats, x, torch.randn_like(x), None, None)
    for values, mean, var in ((x, *device.run(ops.bn_stats, x)), summed):
        exact_var, exact_mean = torch.var_mean(values.double(), (0, 2, 3), correction=0)
        assert ((mean - exact_mean).abs() <= 5e-7 * exact_mean).all()
        assert ((var - exact_var).abs() <= 1e-5 * exact_var).all()  # the chunks' means are rounded as x is


@pytest.mark.parametrize("name", INTERPRETED_AND_COMPILED)
def test_special_values_as_on_the_cpu(name: str) -> None:
    """NaN, infinities and zeros of both signs: what they become, which gradients pass and which taps win."""
    x = nhwc(torch.randint(-2, 3, (2, 20, 12, 12)).float())
    for value, at in ((float("nan"), 3), (float("inf"), 5), (float("-inf"), 7), (-0.0, 11)):
        x.permute(0, 2, 3, 1).view(-1)[::at] = value  # in the order of memory
    one, zero, nan = torch.ones(20), torch.zeros(20), torch.full_like(x, float("nan"))
    bits_of = ops.relu_mask(x)
    for op, arguments in (
        (ops.bn_act, (x, one, zero, None, None, None, True, True)),
        (ops.bn_act_pool, (x, one, zero, 3, 2, 1)),
        (lambda *a: ops.bn_act_backward_reduce(*a)[:1], (nan, bits_of, None, None, None, None, True)),
        (lambda *a: ops.bn_act_backward_reduce(*a)[:1], (nan, None, x, one, zero, None, True)),
        (ops.gate_act, (x, one.view(1, -1, 1, 1) * torch.ones_like(x), 2 * torch.ones_like(x), True, True)),
    ):
        for got, want in zip(Device(name).run(op, *arguments), op(*arguments), strict=True):
            torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("op", ["bn_act", "reduce", "apply", "gram_operand", "add_stats"])
def test_more_than_2_to_the_31_elements(op: str) -> None:
    """The last program of the grid alone, against the same pixels as a tensor of their own."""
    last = 13  # pixels in the last tile
    pixels, c = 2**25 + last, 64
    small = activation(1, c, 1, last, torch.bfloat16)
    large = reserve([1, 1, pixels, c], torch.bfloat16).permute(0, 3, 1, 2)
    large[..., -last:] = small
    one = vector(c, torch.bfloat16)

    def results(x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return {
            "bn_act": lambda: ops.bn_act(x, one, one, x, None, None, True, True),
            "reduce": lambda: ops.bn_act_backward_reduce(x, mask, x, None, None, one, True)[:1],
            "apply": lambda: (ops.bn_act_backward_apply(x, mask, x, None, None, one, one, one, one),),
            "gram_operand": lambda: ops.gram_operand(x, one, one, True, one, 1)[:1],
            "add_stats": lambda: ops.add_stats(x, x, None, None)[:1],
        }[op]()

    mask = ops.relu_mask(small)
    wide = reserve([2, pixels], torch.int32)
    wide[:, -last:] = mask

    class LastProgram(TritonEmulator):
        def __call__(self, kernel: Any, grid: tuple[int, ...], *rest: Any) -> None:
            self.options = {"ctas": [grid[0] - 1], "race_check": False, "threads": 1, "max_instructions": 1 << 40}
            super().__call__(kernel, grid, *rest)

    with ByTriton(), launch.launcher(LastProgram(80)):
        got = results(large, wide)
    for a, b in zip(got, Device("triton-sm_80").run(results, small, mask), strict=True):
        assert b.any()
        assert torch.equal(a[..., -last:], b)


# ------------------------------------------------------------------------------------------------ the machine code


@pytest.mark.parametrize("cc", [pytest.param(cc, marks=[pytest.mark.slow] * (cc in (90, 120))) for cc in ARCHES])
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize(
    ("shape", "dtype"), [FIRST[0], *(pytest.param(*o, marks=pytest.mark.slow) for o in [FIRST[1], *OTHERS])], ids=str
)
def test_machine_code(op: Op, shape: tuple[int, ...], dtype: torch.dtype, cc: int) -> None:
    assembler = Assembler(cc)
    with launch.launcher(assembler), ByTriton():
        op.fused(*op.arguments(activation(*shape, dtype)))
    assert assembler.kernels
    assert assembler.advice == ""
    for kernel in assembler.kernels:
        assert kernel.faults == [], kernel.symbol


# ----------------------------------------------------------------------------------------------------- as torch ops

NAMES = sorted(triton.TAILS)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    with interpreted():
        for dtype in (torch.float32, torch.bfloat16):
            for args in samples(name, dtype):
                torch.library.opcheck(getattr(TRITON, name).default, args)


@pytest.mark.parametrize("name", NAMES)
def test_schemas_are_the_twins(name: str) -> None:
    own, twin = (str(getattr(space, name).default._schema) for space in (TRITON, ops))
    assert own == twin.replace("resnet_fused::", "resnet_fused_triton::")


@pytest.mark.parametrize("name", NAMES)
def test_compiles_and_exports(name: str) -> None:
    """Whole graphs, with the op in them, whose results have the strides that its fake says."""
    op, args = (
        getattr(TRITON, name),
        [a.detach() if isinstance(a, Tensor) else a for a in samples(name, torch.float32)[0]],
    )
    tensors = [a for a in args if isinstance(a, Tensor)]

    class Call(torch.nn.Module):
        def forward(self, *given: Tensor) -> Any:
            rest = iter(given)
            return op(*(next(rest) if isinstance(a, Tensor) else a for a in args))

    torch.compiler.reset()
    with interpreted():
        want = Call()(*tensors)
        exported = torch.export.export(Call(), tuple(tensors))
        assert any(node.target == op.default for node in exported.graph.nodes)
        for call in (torch.compile(Call(), fullgraph=True), exported.module()):
            got = call(*tensors)
            for a, b in zip(*((r,) if isinstance(r, Tensor) else r for r in (got, want)), strict=True):
                assert same_bits(a, b)
                assert a.stride() == b.stride()


@pytest.mark.parametrize("name", sorted(set(NAMES) & set(STEPS)))
def test_steps_refuse_gradients(name: str) -> None:
    args = [
        a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in samples(name, torch.float32)[0]
    ]
    with interpreted():
        results = getattr(TRITON, name)(*args)
    asked = [r for r in ((results,) if isinstance(results, Tensor) else results) if r.requires_grad]
    assert bool(asked) == (name != "relu_mask")  # integers carry no gradient
    for result in asked[:1]:
        with pytest.raises(RuntimeError, match=f"resnet_fused_triton::{name} has no derivative"):
            result.sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_every_build_has_a_kernel_for_gpus(name: str) -> None:
    """An extension that was built without a CUDA compiler takes Triton's."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"resnet_fused::{name}", "CUDA")


def test_errors() -> None:
    x, one = nhwc(torch.zeros(2, 8, 4, 5)), torch.ones(8)
    rest = (None, None, None, True, True)
    with pytest.raises(RuntimeError, match=r"resnet_fused_triton::bn_act: its kernels run on GPUs"):
        TRITON.bn_act(x, one, one, *rest)
    with interpreted():
        for args, message in (
            ((x.double(), one, one, *rest), "bn_act: x has dtype float64, expected float32, bfloat16 or float16"),
            ((x.contiguous(), one, one, *rest), "bn_act: x has shape .* expected a dense channels_last tensor"),
            ((x, one[:7], one, *rest), r"bn_act: scale has shape \[7\], expected \[8\]"),
            ((x, one, one, None, None, None, False, True), "save_mask is True and relu is False"),
            ((x, one, one, x, one, None, True, True), "residual_scale is given without residual_shift"),
            ((x, one, one, x, None, None, True, True, 2, 0), "of which stride 2 does not make x's pixels"),
        ):
            with pytest.raises(RuntimeError, match=message):
                TRITON.bn_act(*args)
    with pytest.raises(RuntimeError, match=r"bn_act: shift is on meta, expected cpu \(that of x\)"):
        bn_act.bn_act(x, one, one.to("meta"), *rest)  # as of another GPU


def run_python(code: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, check=True, capture_output=True, text=True
    ).stdout


def test_import_leaves_triton_alone() -> None:
    assert run_python("import sys, resnet_fused; print('triton' in sys.modules)") == "False\n"


def test_by_tritons_own_interpreter() -> None:
    code = """
import torch, resnet_fused
x = torch.randn(2, 40, 5, 4).to(memory_format=torch.channels_last)
for a, b in zip(torch.ops.resnet_fused_triton.bn_stats(x), torch.ops.resnet_fused.bn_stats(x)):
    torch.testing.assert_close(a, b)
print("agrees")"""
    assert run_python(code, TRITON_INTERPRET="1") == "agrees\n"


def test_without_triton_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "unavailable", lambda: "Triton is not installed")
    triton._function.cache_clear()
    with pytest.raises(RuntimeError, match="resnet_fused_triton::relu_mask: Triton is not installed"):
        TRITON.relu_mask(nhwc(torch.zeros(1, 3, 2, 2)))
