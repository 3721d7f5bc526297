"""The costs of a launch against what the emulator counts for it: bytes of memory and products of tensor cores."""

from __future__ import annotations

import pytest
import torch
from gemm_cases import GEMMS, Gemm
from test_gemm_traffic import FULL, SECTOR, VARIANTS, module, run
from torch import Tensor

from resnet_fused import plans
from resnet_fused.costs import LAYOUTS, MACHINES, Buffer, costs_of, flops_of

# Channels in multiples of 16, pixels of 8: every tensor is made of whole sectors. Ends of tiles are within tiles.
RAGGED = {"N": 1, "H": 16, "W": 12, "C": 48, "K": 208, "C2": 80}


@pytest.mark.parametrize(("gemm", "tile"), VARIANTS)
def test_matrix_kernels(gemm: Gemm, tile: str) -> None:
    done = run(gemm, {**RAGGED, "K": 256} if tile == "resident" else RAGGED, tile)
    present = done.tensors.keys() - {"workspace"}
    costs = costs_of(gemm.op, done.problem, present, gemm.plan(done.problem, 80, done.tensors))
    got = [(SECTOR * stats.sectors_read, SECTOR * stats.sectors_written) for _, stats in done.steps]
    assert [(cost.read, cost.written) for cost in costs] == got
    assert [cost.executed for cost in costs] == [stats.flops for _, stats in done.steps]


@pytest.mark.parametrize(("gemm", "tile"), VARIANTS)
def test_whole_tiles_multiply_nothing_in_vain(gemm: Gemm, tile: str) -> None:
    for sizes in (FULL, RAGGED):
        problem = gemm.problem(torch.bfloat16, tile=gemm.tile(tile), **{**sizes, "K": 256})
        present = f"{gemm.inputs} {gemm.outputs}".split()
        first = costs_of(gemm.op, problem, present, gemm.plan(problem))[0]
        sums = gemm.op == "gram" or "masked" in gemm.name
        assert (first.flops == first.executed) is (sizes is FULL and not sums)
        assert first.flops <= first.executed


def random(layout: str, pixels: dict[str, int], c: int, dtype: torch.dtype) -> Tensor:
    letters = layout.strip("#.!")
    c = {"K": c // 2, "Y": c + c // 2}.get(letters[-1], c)
    if len(letters) == 1:
        return torch.randn(c).abs()
    rows = pixels[letters[0]]
    if layout[0] == "#":
        return torch.zeros(-(-c // 32), rows, dtype=torch.int32)
    return torch.zeros(rows, c, dtype=torch.int8) if layout[0] == "!" else torch.randn(rows, c).to(dtype)


TAILS = [
    ("bn_stats", "x mean var"),
    ("bn_act", "x scale shift residual y mask"),
    ("bn_act", "x scale shift residual residual_scale residual_shift y"),
    ("bn_act", "x scale shift y"),
    ("relu_mask", "y mask"),
    ("bn_act_backward_reduce", "dy mask x mean dz sum_dz sum_dz_xc"),
    ("bn_act_backward_reduce", "dy scale shift x mean sum_dz sum_dz_xc"),
    ("bn_act_backward_reduce", "dy mask dz sum_dz"),
    ("bn_act_backward_apply", "dy mask x mean coef_dz coef_x coef_1 dx"),
    ("bn_act_backward_apply", "dy scale shift x mean coef_dz coef_x coef_1 dx"),
    ("concat_act", "x u scale shift y mask"),
    ("concat_act_backward", "dy mask u mean dz sum_dz sum_dz_xc"),
    ("bn_act_pool", "x scale shift y argmax"),
    ("bn_act_pool_backward", "dy argmax da"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("op", "names"), TAILS)
def test_tails(op: str, names: str, dtype: torch.dtype) -> None:
    n, h, w, c = 2, 12, 8, 64
    problem: dict[str, int | torch.dtype] = {"dtype": dtype, "M": n * h * w, "C": c}
    pixels = {"p": n * h * w}
    if "pool" in op:
        problem = {"dtype": dtype, "N": n, "H": h, "W": w, "C": c, "kernel": 3, "stride": 2, "padding": 1}
        pixels["o"] = n * (h // 2) * (w // 2)
    if op in ("bn_act", "concat_act"):
        problem["relu"] = 1
    if op.startswith("concat"):
        problem["K"] = c // 2
    layouts = {name: Buffer.of(op)[name].layout for name in names.split()}
    if op == "concat_act_backward":
        layouts["dy"] = "pY"  # of which a part is read
    tensors = {name: random(layout, pixels, c, dtype) for name, layout in layouts.items()}
    addresses = {name: t.data_ptr() for name, t in tensors.items()}
    workspace = torch.zeros(max(1, plans.plan(op, problem, 80, addresses).workspace))
    if workspace.numel() > 1:
        addresses["workspace"] = workspace.data_ptr()
    plan = plans.plan(op, problem, 80, addresses)
    assert plan.reason == ""
    for step, cost in zip(plan.steps, costs_of(op, problem, tensors, plan), strict=True):
        stats = module(step.source).launch(
            step.symbol, step.grid, step.block, [step.params], step.smem, buffers=[*tensors.values(), workspace]
        )
        assert (cost.read, cost.written) == (SECTOR * stats.sectors_read, SECTOR * stats.sectors_written)
        assert cost.executed == stats.flops == 0


def test_every_planned_op_has_a_layout_of_its_own_buffers() -> None:
    for op in plans.OPS:
        fields = {name for name, _ in plans._PROBLEMS[op]._fields_}
        assert Buffer.of(op).keys() <= fields - {"workspace", "tile"}
    assert LAYOUTS.keys() == set(plans.OPS)


def test_layouts_are_those_of_the_cases() -> None:
    for gemm in GEMMS:
        roles = Buffer.of(gemm.op)
        assert all(roles[name].role == "input" for name in gemm.inputs.split())
        assert all(roles[name].role != "input" for name in gemm.outputs.split())


def test_flops_of_a_convolution() -> None:
    sizes = {"N": 2, "H": 9, "W": 7, "C": 32, "K": 48, "R": 3, "S": 3, "groups": 4}
    geometry = {f"{name}_{d}": v for name, v in (("stride", 2), ("padding", 1), ("dilation", 1)) for d in "hw"}
    problem = {"dtype": torch.bfloat16, **sizes, **geometry}
    assert flops_of("conv2d", problem) == 2 * (2 * 5 * 4) * 48 * 9 * 8


def test_what_binds() -> None:
    a100 = MACHINES[80]
    assert a100.floor(2.04e9, 1e9, 1) == (pytest.approx(1e-3), "memory")
    assert a100.floor(1e6, 312e9, 1) == (pytest.approx(1e-3), "tensor cores")
    assert a100.floor(1e3, 1e6, 2) == (4e-6, "launches")
