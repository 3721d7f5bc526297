"""The kernels of few channels, and a problem that leads to each: what the tests of plans and machine code share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from resnet_fused import plans
from resnet_fused.plans import Plan, Step

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
BACKWARD = ("u", "mask", "mean", "coef_dz", "coef_x", "coef_1")


@dataclass(frozen=True)
class Few:
    """A kernel (both element types), and a convolution of a 224x224 image that leads to it."""

    name: str  # symbols are <name>_<bf16 | f16>
    channels: int
    taps: int
    stride: int
    op: str = "conv2d"
    backward: bool = False

    def __str__(self) -> str:
        return self.name

    def plan(self, dtype: torch.dtype, arch: int = 80, batch: int = 32) -> Plan:
        sizes = {"N": batch, "C": self.channels, "H": 224, "W": 224, "K": 64, "R": self.taps, "S": self.taps}
        for name, value in (("stride", self.stride), ("padding", self.taps // 2), ("dilation", 1)):
            sizes |= {f"{name}_h": value, f"{name}_w": value}
        inputs = ("x", "weight", "out", "mean", "var") if self.op == "conv2d" else ("dy", "x", "dw")
        buffers = dict.fromkeys(inputs + (BACKWARD if self.backward else ()), 4096)
        problem: dict[str, int | torch.dtype] = {"dtype": dtype, "groups": 1, **sizes}
        return plans.plan(self.op, problem, arch, buffers)


KERNELS = (
    Few("conv2d_few_fprop_4x1", 3, 3, 1),
    Few("conv2d_few_fprop_4x2", 3, 7, 2),
    Few("conv2d_few_fprop_8", 5, 7, 2),
    Few("conv2d_few_wgrad_4", 3, 7, 2, "conv2d_wgrad"),
    Few("conv2d_few_wgrad_8", 5, 7, 2, "conv2d_wgrad"),
    Few("conv2d_few_wgrad_backward_4", 3, 7, 2, "conv2d_wgrad", True),
    Few("conv2d_few_wgrad_backward_8", 5, 7, 2, "conv2d_wgrad", True),
)


def all_steps() -> Iterator[Step]:
    for kernel in KERNELS:
        for dtype in DTYPES.values():
            yield from kernel.plan(dtype).steps
