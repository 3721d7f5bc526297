"""Every tile of every matrix kernel gives what the smallest one gives, which the ops' own tests hold against float64.

A `rows` kernel adds up in the same order whatever its tile: its 16-bit outputs and its bits must be equal to the last
bit. Sums over pixels are cut otherwise: float32 outputs agree to their rounding.
"""

from __future__ import annotations

import gemm_cases
import pytest
import torch
from compiled import module
from gemm_cases import GEMMS, PIXELS_TILES, Gemm
from torch import Tensor

# Ragged pixels and channels, more than one tile of each; the resident kernels take whole tiles of output channels.
SIZES = {"N": 1, "H": 17, "W": 19, "C": 136, "K": 264, "C2": 72}


def outputs(gemm: Gemm, tile: str, dtype: torch.dtype, sizes: dict[str, int], seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    problem = gemm.problem(dtype, tile=gemm.tile(tile), **sizes)
    tensors = gemm.tensors(problem)
    plan = gemm.plan(problem, 80, tensors)
    assert plan.reason == ""
    if plan.workspace:
        tensors["workspace"] = torch.full((plan.workspace,), torch.nan)
    steps = gemm.plan(problem, 80, tensors).steps
    assert steps[0].symbol.endswith(tile)
    for i, step in enumerate(steps):
        module(step.source).launch(
            step.symbol, step.grid, step.block, [step.params], step.smem, seed=seed + i, buffers=tensors.values()
        )
    return {name: tensors[name] for name in gemm.outputs.split()}


@pytest.mark.parametrize("dtype", gemm_cases.DTYPES.values(), ids=gemm_cases.DTYPES)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("gemm", GEMMS, ids=str)
def test_tiles_agree(gemm: Gemm, dtype: torch.dtype, seed: int) -> None:
    *others, smallest = (tile for tile in gemm.tiles if tile != "resident")
    compare(gemm, others, smallest, dtype, SIZES, seed)
    if "resident" in gemm.tiles:
        compare(gemm, ["resident"], smallest, dtype, {**SIZES, "K": 384}, seed)


def compare(gemm: Gemm, tiles: list[str], smallest: str, dtype: torch.dtype, sizes: dict[str, int], seed: int) -> None:
    expected = outputs(gemm, smallest, dtype, sizes, seed)
    for tile in tiles:
        for name, got in outputs(gemm, tile, dtype, sizes, seed).items():
            want = expected[name]
            if want.dtype == torch.float32 or gemm.tiles == PIXELS_TILES:
                eps = torch.finfo(got.dtype).eps if want.dtype != torch.float32 else 1e-5
                error = (got.double() - want.double()).norm() / want.double().norm()
                assert error <= eps, (tile, name, error)
            else:
                assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), (tile, name)
