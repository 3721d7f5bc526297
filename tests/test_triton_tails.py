"""The Triton kernels of the tails: interpreted, as PTX on the emulator, as machine code, and as ops of torch."""

from __future__ import annotations

from typing import Any

import pytest
import test_add_stats
import test_device
import test_gate_act
import torch
import torch.nn.functional as F
from device import COMPILED_TRITON, Device
from op_cases import activation, ops
from test_device import SHAPES, Op, check_op, like, named, packed, v, with_bits
from test_ops_registration import samples
from torch import Tensor
from triton_launchers import Assembler, ByTriton, interpreted

from resnet_fused import triton
from resnet_fused.ops.layout import Padded
from resnet_fused.triton import launch

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


OPS = test_device.OPS | {
    "pool, overlapping": pooling(5, 2, 2),
    "pool, with gaps": pooling(2, 3, 0),
    "gate_act": Op(with_bits(ops.gate_act), gate_plain, gate_forward),
    "gate_act_backward": Op(
        ops.gate_act_backward, test_gate_act.backward, lambda x: (like(x), packed(x), x, like(x), like(x))
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


# ------------------------------------------------------------------------------------------------ the machine code


@pytest.mark.parametrize("cc", ARCHES)
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
