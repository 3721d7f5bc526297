"""What the matrix kernels move, counted by the emulator as their plans launch them: memory, L2 and shared memory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from compiled import module
from gemm_cases import DTYPES, GEMMS, Gemm
from ptx import Stats
from torch import Tensor

from resnet_fused import kernels
from resnet_fused.plans import Step

SECTOR = 32
# Of the output. Whole tiles of every size; and, in pixels and both channels, ends of tiles within a tile, a warp, a
# fragment and a panel of the mask.
FULL = {"N": 2, "H": 16, "W": 16, "C": 128, "K": 256, "C2": 128}
RAGGED = (
    {"N": 1, "H": 17, "W": 19, "C": 136, "K": 72, "C2": 40},
    {"N": 3, "H": 5, "W": 7, "C": 40, "K": 200, "C2": 72},
    {"N": 1, "H": 1, "W": 3, "C": 8, "K": 8, "C2": 8},
)
RAGGED_RESIDENT = (
    {"N": 1, "H": 17, "W": 19, "C": 136, "K": 256},
    {"N": 1, "H": 1, "W": 3, "C": 8, "K": 128},
)
RUNS = [(0, "bf16"), (1, "f16")]  # seeds of the data and of the order of the warps
VARIANTS = [pytest.param(gemm, tile, id=f"{gemm}-{tile}") for gemm in GEMMS for tile in gemm.tiles]


@dataclass
class Run:
    problem: dict[str, Any]
    tensors: dict[str, Tensor]  # by name of the buffer, with the workspace
    steps: list[tuple[Step, Stats]]
    unique: dict[str, tuple[int, int]]  # sectors read and written by name, of all steps

    @property
    def product(self) -> tuple[Step, Stats]:
        return self.steps[0]


def run(gemm: Gemm, sizes: Mapping[str, int], tile: str, dtype: str = "bf16", seed: int = 0, walk: bool = False) -> Run:
    """walk: blocks of a resident kernel walk over all of n, as they do where there are more pixels than a test has."""
    torch.manual_seed(seed)
    problem = gemm.problem(DTYPES[dtype], tile=gemm.tile(tile), **sizes)
    tensors = gemm.tensors(problem)
    if workspace := gemm.plan(problem, 80, tensors).workspace:
        tensors["workspace"] = torch.full([workspace], torch.nan)
    plan = gemm.plan(problem, 80, tensors)
    assert plan.reason == ""
    assert plan.steps[0].symbol == f"{gemm.name}_{dtype}_{tile}"
    unique: Counter[tuple[str, int]] = Counter()
    steps = []
    for i, step in enumerate(plan.steps):
        if walk and tile == "resident":
            step = replace(step, grid=(step.grid[0], 1, 1))
        stats = module(step.source).launch(
            step.symbol, step.grid, step.block, [step.params], step.smem, seed + i, buffers=tensors.values()
        )
        for number, name in enumerate(tensors):
            for direction, sectors in enumerate(stats.buffers.get(f"buffer{number}", (0, 0))):
                unique[name, direction] += sectors
        steps.append((step, stats))
    return Run(problem, tensors, steps, {name: (unique[name, 0], unique[name, 1]) for name in tensors})


def sectors_of(t: Tensor, rows: Tensor | None = None) -> int:
    """How many a buffer, or some of its rows, touches."""
    rows = torch.arange(t.shape[0]) if rows is None else rows
    pitch = t[0].numel() * t.element_size()
    begin = t.data_ptr() + rows * pitch
    first, last = begin // SECTOR, (begin + pitch - 1) // SECTOR
    every = first[:, None] + torch.arange(int((last - first).max()) + 1)
    return len(every[every <= last[:, None]].unique())


def promised(gemm: Gemm, done: Run) -> Iterator[tuple[str, tuple[int, int]]]:
    """Every operand is read once, every result written once, and partial results both."""
    for name, t in done.tensors.items():
        if name != "workspace":
            count = sectors_of(t, gemm.accessed_rows(name, done.problem))
            yield name, ((0, count) if name in gemm.outputs.split() else (count, 0))
        else:
            count = t.numel() * 4 // SECTOR
            if gemm.op == "gram":  # of the products only the tiles on and above the diagonal
                c, splits = done.problem["C"], done.product[0].grid[1]
                side = int(done.product[0].symbol.split("_")[-1].split("x")[0])
                below = sum(row // side * side for row in range(c))
                count -= splits * below * 4 // SECTOR
            yield name, (count, count)


def shapes(gemm: Gemm, tile: str) -> Iterator[dict[str, int]]:
    yield FULL
    yield from RAGGED_RESIDENT if tile == "resident" else RAGGED


@pytest.mark.parametrize(("gemm", "tile"), VARIANTS)
def test_unique_sectors_and_conflicts(gemm: Gemm, tile: str) -> None:
    for sizes in shapes(gemm, tile):
        for seed, dtype in RUNS:
            done = run(gemm, sizes, tile, dtype, seed)
            assert dict(promised(gemm, done)) == done.unique, (sizes, seed)
            for step, stats in done.steps:
                assert stats.shared_conflicts == 0, (step.symbol, sizes, seed)
            for name in gemm.outputs.split():
                t = done.tensors[name]
                assert not (t.is_floating_point() and t.isnan().any()), f"a part of {name} was not written"


# --------------------------------------------------------------------------------------- sectors of a request

# Of a warp's request where tiles are whole. All 16 bytes of 32 lanes: 512 bytes in 16 sectors, none of them in part.
WORDS = "cp.async.ca.shared.global"
SECTORS = {
    "cp.async.cg.shared.global": 16,  # activations and weights
    WORDS: 4,  # of masks, 32 pixels
    "ld.global.nc.v4.u32": 16,  # what an epilogue reads beside the product
    "ld.global.nc.u32": 2,  # words of a mask in an epilogue: four pixels of two panels
    "ld.global.v2.f32": 1,  # scales between two phases: columns of an accumulator
    "st.global.v4.u32": 16,  # results
    "st.global.v4.f32": 16,  # partial products
    "st.global.u32": 2,  # words of a mask
}
VECTORS = "ld.global.nc.v4.f32"
_ACCESS = re.compile(r"\b(?:cp\.async\.c[ag]|[ls][dt]\.global)\S*")


def expected(step: Step, stats: Stats) -> Counter[tuple[str, str]]:
    """Requests and sectors, of loads and stores, by the PTX lines that ran."""
    counts: Counter[tuple[str, str]] = Counter()
    tile = step.symbol.split("_")[-1]
    columns = 64 if tile == "resident" else int(tile.split("x")[-1])
    sums = 4  # leave as a float from each thread
    if "wgrad" in step.symbol or "gram" in step.symbol:
        columns = int(tile.split("x")[0])
        sums = 1  # from every fourth lane
    lines = kernels.ptx(step.source, "sm_80").splitlines()
    last_product = max(line for line in stats.lines if "mma.sync" in lines[line - 1])
    for line, count in stats.lines.items():
        if found := _ACCESS.search(lines[line - 1]):
            access = found[0]
            if access == VECTORS:  # half a sector for each of the chunks side by side: a row of the tile's, ...
                sectors = 8 if line > last_product else columns // 8  # ... or of the warp's part of the output
            else:
                sectors = sums if access == "st.global.f32" else SECTORS[access]
            kind = "stores" if access.startswith("st.") else "loads"
            counts[kind, "requests"] += count
            counts[kind, "sectors"] += count * sectors
            counts[access, "requests"] += count
            counts[access, "sectors"] += count * sectors
    return counts


@pytest.mark.parametrize(("gemm", "tile"), VARIANTS)
def test_requests_are_full_sectors(gemm: Gemm, tile: str) -> None:
    step, stats = run(gemm, FULL, tile).product
    counts = expected(step, stats)
    # Words of the mask are copied a tile ahead: of the tile after the last there is nothing to copy, nor a request.
    empty = counts["loads", "requests"] - stats.global_load_requests
    assert 0 <= empty <= counts[WORDS, "requests"] // 2
    assert stats.global_load_sectors == counts["loads", "sectors"] - empty * SECTORS[WORDS]
    assert stats.global_store_requests == counts["stores", "requests"]
    assert stats.global_store_sectors == counts["stores", "sectors"]
    # And each is written once, but for those of a mask: two requests write four of their eight words each.
    assert stats.global_store_sectors - counts["st.global.u32", "sectors"] // 2 == stats.sectors_written


# ------------------------------------------------------------------------------------------------ reads from L2

PIXELS = {"N": 4, "H": 32, "W": 32}  # tiles of all sizes are whole, and weights pass through many blocks
STAGE_1 = {**PIXELS, "C": 64, "K": 256, "C2": 64}  # of ResNet-50
STAGE_3 = {**PIXELS, "C": 256, "K": 1024, "C2": 512}


def amplification(name: str, sizes: Mapping[str, int], tile: str) -> float:
    """Sectors that requests read from L2 for each that memory delivers."""
    gemm = next(gemm for gemm in GEMMS if gemm.name == name)
    step, stats = run(gemm, sizes, tile, walk=True).product
    vectors = expected(step, stats)[VECTORS, "sectors"]  # a few KB, again and again: these L1 has
    return (stats.global_load_sectors - vectors) / stats.sectors_read


@pytest.mark.parametrize(
    ("name", "sizes", "tile", "most"),
    [
        ("expand_affine", STAGE_1, "resident", 1.4),
        ("expand_affine", STAGE_1, "256x128x64", 1.4),
        ("expand_dgrad", STAGE_1, "128x64x32", 1.7),
        ("expand_dgrad", STAGE_1, "256x128x64", 1.4),
        ("expand_affine", STAGE_3, "resident", 2.5),
        ("expand_affine", STAGE_3, "256x128x64", 3.1),
        ("expand_dgrad", STAGE_3, "256x128x64", 3.0),
        ("expand_dgrad_projection", STAGE_3, "256x128x64", 2.1),
        # Both operands once for each of eight tiles of n, 1.5 KB a pixel, and no residual that is read but once.
        ("expand_dual", STAGE_3, "256x128x64", 9.7),
    ],
)
def test_l2_amplification(name: str, sizes: dict[str, int], tile: str, most: float) -> None:
    """Not above what there is, rounded up."""
    assert amplification(name, sizes, tile) <= most


def test_resident_blocks_walk() -> None:
    """With the pixels of a real batch every block of a resident kernel has all tiles of n: what `walk` makes."""
    gemm = next(gemm for gemm in GEMMS if gemm.name == "expand_affine")
    for sizes in (STAGE_1, STAGE_3):
        problem = gemm.problem(torch.bfloat16, tile=gemm.tile("resident"), **{**sizes, "N": 32})
        assert gemm.plan(problem).steps[0].grid == (256, 1, 1)
