"""What a kernel launch costs at the least, as a function of its problem: bytes, FLOPs, and the time that these take.

A kernel reads each operand once and writes each result once (`tests/test_costs.py` holds the kernels to it, on the
emulator). So its bytes follow from the operands that a problem comes with, and from where the plan puts partial sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from .plans import Plan, Step

# Buffers by op: "name:layout". One letter: a vector over channels, float32. Else a matrix or more of the problem's
# type, after "#" of bits in panels, after "." float32, after "!" bytes. C, K, D (C2) and Y (C + K) are channels, G
# those of a group; R and S a kernel's sides. Pixels: p all of x, s the strided ones, o of the output; P and Q all of x
# and x2, of which only the strided ones are accessed. Behind "->" are results, behind "=>" those that a second step
# combines from partial ones.
_DU = "u:{0}K mask:#{0}K scale:K shift:K mean:K coef_dz:K coef_x:K coef_1:K"
_DGRAD_END = (
    "addend:pC addend_mask:#pC gate_u:pC gate_scale:C gate_shift:C gate_mean:C -> dx:pC => sum_dz:C sum_dz_xc:C"
)
LAYOUTS = {
    "bn_stats": "x:pC => mean:C var:C",
    "bn_act": "x:pC scale:C shift:C residual:pC residual_scale:C residual_shift:C -> y:pC mask:#pC",
    "add_stats": "x:pC u:pC scale:C shift:C -> y:pC => mean:C var:C",
    "gate_act": "v:pC x:pC f:pC -> y:pC mask:#pC",
    "gate_act_backward": "dy:pC mask:#pC v:pC x:pC f:pC -> dv:pC dx:pC df:pC",
    "concat_act": "x:pC u:pK scale:K shift:K -> y:pY mask:#pK",
    "concat_act_backward": "dy:pK mask:#pK u:pK mean:K -> dz:pK => sum_dz:K sum_dz_xc:K",
    "relu_mask": "y:pC -> mask:#pC",
    "bn_act_backward_reduce": "dy:pC mask:#pC scale:C shift:C x:pC mean:C -> dz:pC => sum_dz:C sum_dz_xc:C",
    "bn_act_backward_apply": "dy:pC mask:#pC scale:C shift:C x:pC mean:C coef_dz:C coef_x:C coef_1:C addend:pC "
    "-> dx:pC",
    "gram_operand": "x:PC scale:C shift:C center:C -> a:sC => mean:C",
    "bn_act_pool": "x:pC scale:C shift:C -> y:oC argmax:!oC",
    "bn_act_pool_backward": "dy:oC argmax:!oC -> da:pC",
    "conv1x1": "x:PC scale:C shift:C weight:KC -> out:sK => mean:K var:K",
    "conv1x1_dgrad": f"dy:sK {_DU.format('s')} weight:KC {_DGRAD_END}",
    "conv1x1_wgrad": f"dy:sK {_DU.format('s')} x:PC x_scale:C x_shift:C => dw:KC sum_dz:K",
    "conv2d": "x:pC scale:C shift:C weight:KRSG -> out:oK => mean:K var:K",
    "conv2d_bn_act": "x:pC scale:C shift:C weight:KRSG out_scale:K out_shift:K residual:oK -> y:oK mask:#oK",
    "conv2d_dgrad": f"dy:oK {_DU.format('o')} weight:KRSG {_DGRAD_END}",
    "conv2d_wgrad": f"dy:oK {_DU.format('o')} x:pC x_scale:C x_shift:C => dw:KRSG",
    "gram": "x:PC scale:C shift:C center:C => cov:.CC mean:C",
    "expand": "x:pC scale:C shift:C weight:KC out_scale:K out_shift:K x2:QD weight2:KD out_scale2:K residual:pK "
    "-> y:pK mask:#pK",
    "expand_dgrad": "dy:sK mask:#sK weight:KC x:PC scale:C shift:C q:CC constant:C mean:C addend:pC addend_mask:#pC -> "
    "dx:pC => sum_dz:C sum_dz_xc:C",
}
Problem = Mapping[str, int | torch.dtype]


class Buffer(NamedTuple):
    """One of an op's buffers."""

    layout: str
    role: str  # "input", "output", or "combined": an output of the last step, from partial sums of the first

    @classmethod
    def of(cls, op: str) -> dict[str, Buffer]:
        found, role = {}, "input"
        for entry in LAYOUTS[op].split():
            if entry in ("->", "=>"):
                role = "output" if entry == "->" else "combined"
            else:
                name, layout = entry.split(":")
                found[name] = cls(layout, role)
        return found


class Cost(NamedTuple):
    """Of one launch."""

    read: int  # bytes that memory has to deliver
    written: int
    flops: int = 0  # 2 for each multiplication that the result needs
    executed: int = 0  # by tensor cores, whose tiles reach beyond the matrix

    @property
    def moved(self) -> int:
        return self.read + self.written


def sizes_of(problem: Problem) -> dict[str, int]:
    """What a layout's letters stand for in a problem."""
    given = {name: value for name, value in problem.items() if isinstance(value, int)}
    get = given.get
    if "M" in given:
        return {"p": given["M"], "C": given["C"], "K": get("K", 0), "Y": given["C"] + get("K", 0)}
    n, h, w, c = given["N"], given["H"], given["W"], given["C"]
    sizes = {"C": c, "K": get("K", 0), "D": get("C2", 0), "p": n * h * w, "P": n * h * w}
    if "kernel" in given:  # a pool
        pool = given["kernel"], given["stride"], given["padding"]
        return sizes | {"o": n * _outputs(h, *pool) * _outputs(w, *pool)}
    if "R" in given:
        sides = (
            _outputs(size, get("dilation_" + d, 1) * (given[taps] - 1) + 1, given["stride_" + d], given["padding_" + d])
            for size, taps, d in ((h, "R", "h"), (w, "S", "w"))
        )
        return sizes | {"R": given["R"], "S": given["S"], "G": c // given["groups"], "o": n * math.prod(sides)}
    stride = get("stride", 1)
    strided = n * math.ceil(h / stride) * math.ceil(w / stride)
    return sizes | {"s": strided, "Q": n * get("H2", 0) * get("W2", 0)}


def _outputs(size: int, extent: int, stride: int, padding: int) -> int:
    """Of a window along a dimension."""
    return (size + 2 * padding - extent) // stride + 1


def buffer_bytes(op: str, name: str, problem: Problem) -> int:
    """Of those elements of a buffer that are accessed."""
    layout, sizes = Buffer.of(op)[name].layout, sizes_of(problem)
    letters = layout.strip("#.!")
    if letters[0] in "PQ":  # the strided ones: as many as x of `expand` has
        sizes = {**sizes, letters[0]: sizes["p"] if op == "expand" else sizes["s"]}
    if layout[0] == "#":
        return 4 * math.ceil(sizes[letters[1]] / 32) * sizes[letters[0]]
    dtype = problem["dtype"]
    assert isinstance(dtype, torch.dtype)
    wide = max(4, dtype.itemsize)
    itemsize = 1 if layout[0] == "!" else wide if layout[0] == "." or len(letters) == 1 else dtype.itemsize
    if op == "conv1x1_wgrad" and name == "dw" and problem.get("wide"):
        itemsize = wide
    return itemsize * math.prod(sizes[letter] for letter in letters)


def flops_of(op: str, problem: Problem) -> int:
    """Of an op's matrix products; 0 for one without."""
    s = sizes_of(problem)
    if op.startswith("conv1x1"):
        return 2 * s["s"] * s["C"] * s["K"]
    if op.startswith("conv2d"):
        return 2 * s["o"] * s["K"] * s["R"] * s["S"] * s["G"]
    if op == "gram":
        return s["s"] * s["C"] * (s["C"] + 1)  # a triangle
    if op == "expand":
        return 2 * s["p"] * s["K"] * (s["C"] + s["D"])
    if op == "expand_dgrad":
        return 2 * s["s"] * s["C"] * (s["K"] + s["C"])
    return 0


def costs_of(op: str, problem: Problem, present: Iterable[str], plan: Plan) -> list[Cost]:
    """Of a plan's steps. present: the names of the buffers that the problem has, without the workspace."""
    if not plan.steps:
        return []
    buffers, names = Buffer.of(op), list(present)
    if op == "expand" and "x2" not in names:
        problem = {**problem, "C2": 0}

    def moved(role: str) -> int:
        return sum(buffer_bytes(op, name, problem) for name in names if buffers[name].role == role)

    if op == "concat_act":  # first the one part, then the other
        first = buffer_bytes(op, "x", problem)
        return [Cost(first, first), Cost(moved("input") - first, moved("output") - first)]
    partial = _workspace(op, problem, plan)
    flops, executed = flops_of(op, problem), executed_flops(op, problem, plan.steps[0])
    if len(plan.steps) == 1:
        return [Cost(moved("input"), moved("output"), flops, executed)]
    return [Cost(moved("input"), moved("output") + partial, flops, executed), Cost(partial, moved("combined"))]


def _workspace(op: str, problem: Problem, plan: Plan) -> int:
    """Bytes of partial sums."""
    size = 4 * plan.workspace
    if op == "gram":  # of the products only the tiles on and above the diagonal
        c, splits, side = sizes_of(problem)["C"], plan.steps[0].grid[1], _tile(plan.steps[0])[0]
        size -= 4 * splits * sum(row // side * side for row in range(c))
    return size


def _tile(step: Step) -> tuple[int, int, int]:
    """Of a matrix kernel's symbol."""
    end = step.symbol.split("_")[-1]
    if end == "resident":
        return 128, 128, 64
    m, n, k = map(int, end.split("x"))
    return m, n, k


def _up(size: int, unit: int) -> int:
    """The next multiple."""
    return math.ceil(size / unit) * unit


def executed_flops(op: str, problem: Problem, step: Step) -> int:
    """What the tensor cores multiply for a convolution's product: whole tiles."""
    if not flops_of(op, problem):
        return 0
    if op.startswith("conv2d"):
        return _executed_taps(op, problem, step)
    s, (m, n, k) = sizes_of(problem), _tile(step)
    if op in ("conv1x1_wgrad", "gram"):
        sums = "gram" in step.symbol or "masked" in step.symbol  # of rows: eight columns of ones for each of two warps
        return 2 * step.grid[0] * m * (n + 16 * sums) * _up(s["s"], k)
    pixels, columns, depths = {
        "conv1x1": (s["s"], s["K"], (s["C"],)),
        "conv1x1_dgrad": (s["s"], s["C"], (s["K"],)),
        "expand": (s["p"], s["K"], (s["C"], s["D"])),
        "expand_dgrad": (s["s"], s["C"], (s["K"], s["C"])),
    }[op]
    return 2 * _up(pixels, m) * _up(columns, n) * sum(_up(depth, k) for depth in depths)


def _executed_taps(op: str, problem: Problem, step: Step) -> int:
    """Of a k x k convolution: see csrc/gemm/taps.h and wgrad.h."""
    s, given = sizes_of(problem), {name: v for name, v in problem.items() if isinstance(v, int)}
    if s["C"] % 8:  # of few channels: a pixel padded to 4 or 8 of them; see csrc/conv2d/conv2d_few.h
        pad = 4 if s["C"] <= 4 else 8
        if op == "conv2d_wgrad":
            return 2 * _up(s["o"], 64) * _up(s["K"], 64) * (256 if pad == 4 else 448)
        return 2 * _up(s["o"], 128) * _up(s["K"], 64) * s["R"] * _up(s["S"] * pad, 16)
    m, n, k = _tile(step)
    groups = given["groups"]
    if op == "conv2d_wgrad":  # tiles of c and k over pixels; a tile of k may reach into several groups
        group_k, own = s["K"] // groups, range(0, s["K"], n)
        spans = [(min(at + n, s["K"]) - 1) // group_k - at // group_k + 1 for at in own]
        across = max(math.ceil(span * s["G"] / m) for span in spans)
        return 2 * _up(s["o"], k) * len(own) * n * across * m * s["R"] * s["S"]
    channels, outputs = (s["K"] // groups, s["G"]) if op == "conv2d_dgrad" else (s["G"], s["K"] // groups)
    total = 0
    for at in range(0, outputs * groups, n):
        span = (min(at + n, outputs * groups) - 1) // outputs - at // outputs + 1
        total += _up(span * channels, k)
    return 2 * n * total * sum(taps * _up(pixels, m) for pixels, taps in _phases(op, given, s["o"]))


def _phases(op: str, given: Mapping[str, int], outputs: int) -> list[tuple[int, int]]:
    """(pixels, taps) of each of a dgrad's phases: outputs of one residue modulo the stride."""
    if op != "conv2d_dgrad":
        return [(outputs, given["R"] * given["S"])]

    def along(size: str, taps: str, axis: str) -> list[tuple[int, int]]:
        stride, padding, dilation = (given[f"{name}_{axis}"] for name in ("stride", "padding", "dilation"))
        return [
            (
                math.ceil((given[size] - i) / stride),
                sum((i + padding - tap * dilation) % stride == 0 for tap in range(given[taps])),
            )
            for i in range(min(stride, given[size]))
        ]

    down, across = along("H", "R", "h"), along("W", "S", "w")
    return [(given["N"] * p * q, r * t) for p, r in down for q, t in across]


# ------------------------------------------------------------------------------------------------- time


class Machine(NamedTuple):
    """Published peaks of a GPU."""

    name: str
    bandwidth: float  # bytes a second
    peak: float  # FLOPs a second, dense bf16
    launch: float = 2e-6  # seconds from the end of a kernel to its successor's work

    def floor(self, moved: float, flops: float, launches: int) -> tuple[float, str]:
        """(seconds, what binds)"""
        by_memory, by_products = moved / self.bandwidth, flops / self.peak
        longest = max(by_memory, by_products)
        if longest < launches * self.launch:
            return launches * self.launch, "launches"
        return longest, "memory" if by_memory >= by_products else "tensor cores"


MACHINES = {80: Machine("A100", 2.04e12, 312e12), 90: Machine("H100", 3.35e12, 989e12)}
