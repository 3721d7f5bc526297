"""The Triton kernels of the matrix family: their machine code, as ops of torch, and beside the other kernels."""

from __future__ import annotations

import re
from typing import Any

import conv2d_cases
import pytest
import test_conv1x1
import test_conv2d_wgrad
import test_expand
import test_gram
import torch
from conv2d_cases import Geometry, Problem
from device import Device
from op_cases import ops
from pointwise_cases import Arguments, assert_elements
from test_ops_registration import samples
from torch import Tensor
from triton_cases import cases
from triton_launchers import Assembler, ByTriton, interpreted

from resnet_fused import triton
from resnet_fused.kernels import Kernel
from resnet_fused.triton import launch
from resnet_fused.triton.configs import Config, Product, configs

TRITON = torch.ops.resnet_fused_triton
ARCHES = (80, 90, 100, 120)
TENSOR_CORES = {80: r"HMMA", 90: r"HGMMA", 100: r"UTC\w*MMA", 120: r"HMMA"}


def arguments(name: str, side: int, c: int, k: int, dtype: torch.dtype) -> Arguments:
    """Of op `name`, with all that may come before and after a product; images of side x side, c and k channels."""
    shape = (2, c, side, side)
    problem = Problem(*shape, k, Geometry())
    make: dict[str, Any] = {
        "conv1x1": lambda: test_conv1x1.forward_arguments(shape, k, dtype),
        "conv1x1_dgrad": lambda: test_conv1x1.dgrad_arguments(shape, k, dtype, "bn mask", 1, "gate"),
        "conv1x1_wgrad": lambda: test_conv1x1.wgrad_arguments(shape, k, dtype, "bn gate", affine=True),
        "gram": lambda: test_gram.arguments(shape, dtype),
        "expand": lambda: test_expand.expand_arguments(shape, k, k, dtype, True, "projection"),
        "expand_dgrad": lambda: test_expand.dgrad_arguments(shape, k, dtype),
        "conv2d": lambda: conv2d_cases.forward_arguments(problem, dtype),
        "conv2d_bn_act": lambda: conv2d_cases.bn_act_arguments(problem, dtype),
        "conv2d_dgrad": lambda: conv2d_cases.dgrad_arguments(problem, dtype, "bn mask", "gate"),
        "conv2d_wgrad": lambda: test_conv2d_wgrad.arguments((shape, k, (3, 3), [1] * 7), dtype),
    }
    return make[name]()


def results(returned: Any) -> dict[str, Tensor]:
    return {str(i): t for i, t in enumerate(returned if isinstance(returned, tuple) else (returned,))}


# ----------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("name", triton.PRODUCTS)
def test_agrees_with_the_other_kernels(name: str) -> None:
    """Every element to a few roundings of the largest; but for bits, which rounding may turn."""
    given = arguments(name, 7, 24, 40, torch.float16)
    runs = {
        where: results(Device(where).run(lambda a: getattr(ops, name)(**a), given))
        for where in ("triton-sm_80", "emulated", "cpu", "interpreted")
    }
    got = runs.pop("triton-sm_80")
    for other in runs.values():
        assert [(t.shape, t.dtype) for t in got.values()] == [(t.shape, t.dtype) for t in other.values()]
        assert_elements(got, {i: t.double() for i, t in other.items() if t.is_floating_point()}, torch.float16)


# ------------------------------------------------------------------------------------------------ the machine code


def faults(kernel: Kernel) -> list[str]:
    """Without the atomics on shared memory with which a program of Blackwell gets its tensor memory."""
    on_global = any(re.match(r"(ATOM|RED)G?(\.|$)", opcode) for opcode in kernel.opcodes)
    return [fault for fault in kernel.faults if fault != "atomics" or on_global or kernel.arch != "sm_100"]


@pytest.mark.parametrize("cc", ARCHES)
@pytest.mark.parametrize(
    ("name", "c", "k"),
    cases(
        [("conv1x1_dgrad", 256, 256), ("conv2d_wgrad", 128, 128), ("expand", 64, 256)],
        [(name, *channels) for name in triton.PRODUCTS for channels in ((256, 256), (72, 136), (64, 64))],
    ),
)
def test_machine_code(name: str, c: int, k: int, cc: int) -> None:
    assembler = Assembler(cc)
    given = arguments(name, 56, c, k, torch.bfloat16)
    with launch.launcher(assembler), ByTriton():
        getattr(ops, name)(**given)
    assert assembler.advice == ""  # C7515: tensor-core instructions that wait for each other
    for kernel in assembler.kernels:
        assert faults(kernel) == [], kernel.symbol
    assert any(re.match(TENSOR_CORES[cc], opcode) for kernel in assembler.kernels for opcode in kernel.opcodes)


# --------------------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("n", [8, 64, 2048])
@pytest.mark.parametrize("k", [8, 64, 2048])
def test_every_product_has_tiles(n: int, k: int, arch: int) -> None:
    for m in (1, 1568, 800_000):
        for left in (1, 2):
            found = configs(Product(m, n, k, arch, left, transforms=2 * left - 2))
            assert found == list(dict.fromkeys(found))
            assert all(isinstance(c, Config) and min(c.m, c.n, c.k) >= 16 for c in found)


def test_few_pixels_take_small_tiles() -> None:
    few, many = (configs(Product(m, 512, 512, 90))[0] for m in (1568, 800_000))
    assert few.m * few.n < many.m * many.n


# ----------------------------------------------------------------------------------------------------- as torch ops


def taken(args: tuple) -> bool:
    """Whether the kernels take these arguments: channels in multiples of 8."""
    return all(t.shape[1] % 8 == 0 and t.shape[0] > 0 for t in args if isinstance(t, Tensor) and t.dim() == 4)


@pytest.mark.parametrize("name", triton.PRODUCTS)
def test_opcheck(name: str) -> None:
    given = [args for args in samples(name, torch.float16) if taken(args)]
    assert given
    with interpreted():
        for args in given:
            torch.library.opcheck(getattr(TRITON, name).default, args)


@pytest.mark.parametrize("name", triton.PRODUCTS)
def test_schemas_are_the_twins(name: str) -> None:
    own, twin = (str(getattr(space, name).default._schema) for space in (TRITON, ops))
    assert own == twin.replace("resnet_fused::", "resnet_fused_triton::")


class Chain(torch.nn.Module):
    """conv1x1 -> conv2d on what it gives."""

    def forward(self, x: Tensor, w: Tensor, w3: Tensor) -> tuple[Tensor, ...]:
        u, mean, var = TRITON.conv1x1(x, w, None, None, 1, True)
        return TRITON.conv2d(u, w3, var.rsqrt(), -mean * var.rsqrt(), [1] * 7, True)


def test_compiles_and_exports() -> None:
    x = conv2d_cases.activation(2, 16, 5, 6, torch.float16)
    w, w3 = test_conv1x1.weight(8, 16, torch.float16), conv2d_cases.kernel(8, 8, (3, 3), 1, torch.float16)
    exported = torch.export.export(Chain(), (x, w, w3))  # of fakes: nothing is launched
    assert {str(node.target) for node in exported.graph.nodes} >= {
        "resnet_fused_triton.conv1x1.default",
        "resnet_fused_triton.conv2d.default",
    }
    with interpreted():
        wanted = Chain()(x, w, w3)
        for chain in (torch.compile(Chain(), fullgraph=True, backend="aot_eager"), exported.module()):
            for got, want in zip(chain(x, w, w3), wanted, strict=True):
                assert torch.equal(got, want)
