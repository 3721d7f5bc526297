"""The matrix kernels, and problems that lead to each: what the tests of plans, machine code and traffic share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resnet_fused import costs, plans
from resnet_fused.plans import Plan

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
# csrc/gemm/gemm.h: the ends of symbols, in the order in which a problem's `tile` counts them from 1.
ROWS_TILES = ("256x128x64", "256x128x32", "128x128x32", "128x64x32", "resident")
PIXELS_TILES = ("128x128x32", "64x64x32")


@dataclass(frozen=True)
class Gemm:
    """A kernel (all element types and tiles), and the op's operands that lead to it."""

    name: str  # symbols are <name>_<bf16 | f16>_<tile>
    op: str
    inputs: str
    outputs: str
    stride: int = 1
    tiles: tuple[str, ...] = ROWS_TILES[:4]

    def __str__(self) -> str:
        return self.name + ("_by_sign" if self.gated_by_sign else "") + (f"/{self.stride}" if self.stride > 1 else "")

    @property
    def gated_by_sign(self) -> bool:
        """Whether a batch norm's backward recomputes its ReLU instead of reading bits: the same kernel."""
        return "coef_dz" in self.inputs and "mask" not in self.inputs

    @property
    def menu(self) -> tuple[str, ...]:
        """All tiles of its family, in the order of `tile`."""
        return PIXELS_TILES if self.tiles == PIXELS_TILES else ROWS_TILES

    def tile(self, suffix: str) -> int:
        """The number of a tile in a problem."""
        return self.menu.index(suffix) + 1

    def problem(self, dtype: torch.dtype, **sizes: int) -> dict[str, Any]:
        """Of an output of N*H*W pixels. With a stride x has as many rows and columns as give an even number of them,
        and as few as give an odd one: pixels behind the last that is read, or none.
        """
        n, h, w = sizes.get("N", 1), sizes.get("H", 1), sizes.get("W", 1)
        of_x = {name: self.stride * size - size % 2 * (self.stride - 1) for name, size in (("H", h), ("W", w))}
        of_x2 = {"H": h, "W": w, "H2": of_x["H"], "W2": of_x["W"]}
        every = {"dtype": dtype, **sizes, "N": n, **(of_x2 if self.op == "expand" else of_x)}
        every |= {"stride": self.stride, "relu": 1}
        fields = {name for name, _ in plans._PROBLEMS[self.op]._fields_}
        return {name: value for name, value in every.items() if name in fields}

    def plan(self, problem: Mapping[str, Any], arch: int = 80, buffers: Mapping[str, Tensor] | None = None) -> Plan:
        """Without buffers: of tensors that are anywhere."""
        names = f"{self.inputs} {self.outputs}".split()
        addresses = {name: t.data_ptr() for name, t in buffers.items()} if buffers else dict.fromkeys(names, 4096)
        return plans.plan(self.op, problem, arch, addresses)

    def tensors(self, problem: Mapping[str, Any]) -> dict[str, Tensor]:
        """Random inputs, and outputs full of ones: NaN."""
        made = {name: self._tensor(name, problem) for name in f"{self.inputs} {self.outputs}".split()}
        for name in self.outputs.split():
            made[name].untyped_storage().fill_(255)
        return made

    def accessed_rows(self, name: str, problem: Mapping[str, Any]) -> Tensor | None:
        """Numbers of the pixels of a buffer that are accessed; None: all that it has."""
        letter = self._layout(name)[0]
        if letter not in ("P", "Q"):
            return None
        h, w = ("H", "W") if letter == "P" else ("H2", "W2")
        pixels = torch.arange(problem["N"] * problem[h] * problem[w]).view(-1, problem[h], problem[w])
        return pixels[:, :: self.stride, :: self.stride].flatten()

    def _layout(self, name: str) -> str:
        return costs.Buffer.of(self.op)[name].layout

    def shape(self, name: str, problem: Mapping[str, Any]) -> list[int]:
        """Of a buffer; of a mask, that of the matrix whose bits it has."""
        n, h, w = problem["N"], problem["H"], problem["W"]
        sizes = {"C": problem["C"], "K": problem.get("K", 0), "D": problem.get("C2", 0), "p": n * h * w}
        sizes |= {"P": n * h * w, "Q": n * problem.get("H2", 0) * problem.get("W2", 0)}
        sizes["s"] = n * -(-h // self.stride) * -(-w // self.stride)
        return [sizes[letter] for letter in self._layout(name).strip("#.")]

    def _tensor(self, name: str, problem: Mapping[str, Any]) -> Tensor:
        layout, shape = self._layout(name), self.shape(name, problem)
        if layout[0] == "#":
            return torch.randint(-(2**31), 2**31, (-(-shape[1] // 32), shape[0]), dtype=torch.int32)
        wide = len(shape) == 1 or layout[0] == "."
        return torch.randn(shape).to(torch.float32 if wide else problem["dtype"])


def _wgrads() -> list[Gemm]:
    backward = "u mean coef_dz coef_x coef_1"
    kinds = {"": "", "_masked": "mask", "_backward": f"mask {backward}"}
    found = []
    for kind, dy in kinds.items():
        outputs = "dw sum_dz" if kind == "_masked" else "dw"
        for operand, x, stride in (("", "x", 1), ("_strided", "x", 2), ("_affine", "x x_scale x_shift", 1)):
            name = f"conv1x1_wgrad{kind}{operand}"
            found.append(Gemm(name, "conv1x1_wgrad", f"dy {dy} {x}", outputs, stride, PIXELS_TILES))
    by_sign = f"dy scale shift {backward} x x_scale x_shift"
    return [*found, Gemm("conv1x1_wgrad_backward_affine", "conv1x1_wgrad", by_sign, "dw", 1, PIXELS_TILES)]


_DU = "u mean coef_dz coef_x coef_1"
_GATE = "gate_u gate_scale gate_shift gate_mean"
_SUMS = "dx sum_dz sum_dz_xc"
_TWO = ROWS_TILES[1:4]  # of kernels with two tensors a stage, for which the largest tile has no kernel
GEMMS = (
    Gemm("conv1x1_fprop", "conv1x1", "x weight", "out mean var"),
    Gemm("conv1x1_fprop", "conv1x1", "x weight", "out", 2),
    Gemm("conv1x1_fprop_affine", "conv1x1", "x scale shift weight", "out mean var"),
    Gemm("conv1x1_dgrad_add", "conv1x1_dgrad", "dy weight addend addend_mask", "dx"),
    Gemm("conv1x1_dgrad_add", "conv1x1_dgrad", "dy weight addend addend_mask", "dx", 2),
    Gemm("conv1x1_dgrad_gate", "conv1x1_dgrad", f"dy weight {_GATE}", _SUMS),
    Gemm("conv1x1_dgrad_backward_add", "conv1x1_dgrad", f"dy mask {_DU} weight addend", "dx", 1, _TWO),
    Gemm("conv1x1_dgrad_backward_add", "conv1x1_dgrad", f"dy scale shift {_DU} weight", "dx", 2, _TWO),
    Gemm("conv1x1_dgrad_backward_gate", "conv1x1_dgrad", f"dy mask {_DU} weight {_GATE}", _SUMS, 1, _TWO),
    *_wgrads(),
    Gemm("gram", "gram", "x scale shift center", "cov mean", 1, PIXELS_TILES),
    Gemm("gram_strided", "gram", "x center", "cov mean", 2, PIXELS_TILES),
    Gemm("expand", "expand", "x weight out_scale out_shift residual", "y mask", 1, ROWS_TILES),
    Gemm("expand_affine", "expand", "x scale shift weight out_scale out_shift residual", "y mask", 1, ROWS_TILES),
    Gemm("expand_dual", "expand", "x scale shift weight out_scale out_shift x2 weight2 out_scale2", "y mask", 2),
    Gemm("expand_dgrad", "expand_dgrad", "dy mask weight x scale shift q constant mean", _SUMS),
    Gemm("expand_dgrad_projection", "expand_dgrad", "dy mask weight x q constant addend addend_mask", "dx", 2),
)
OPS = {gemm.op for gemm in GEMMS}
