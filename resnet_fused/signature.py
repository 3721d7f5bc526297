"""What an op is called with, but for its tensors' values: by this `tune` remembers it, and makes it up again."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ops.layout import nhwc_strides

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64",
          torch.int32: "i32", torch.int8: "i8"}  # fmt: skip


class Like(NamedTuple):
    """A tensor without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{_NAMES.get(self.dtype, self.dtype)}[{','.join(map(str, self.shape))}]"

    def made_up(self, device: torch.device) -> Tensor:
        """Random values: of vectors from 0.5 to 1, as scales and variances have them; of bits any."""
        if not self.dtype.is_floating_point:
            limits = torch.iinfo(self.dtype)
            least, most = (0, 1) if self.dtype == torch.int8 else (limits.min, limits.max)
            return torch.randint(least, most, self.shape, dtype=self.dtype, device=device)
        if len(self.shape) != 4:
            return torch.rand(self.shape, dtype=torch.float32, device=device).mul_(0.5).add_(0.5).to(self.dtype)
        t = torch.empty_strided(self.shape, nhwc_strides(self.shape), dtype=self.dtype, device=device)
        return t.normal_()


class Signature(NamedTuple):
    """`op`, and its arguments with `Like`s for tensors and tuples for lists: hashable."""

    op: str
    args: tuple[Any, ...]

    @classmethod
    def of(cls, op: str, args: tuple[Any, ...]) -> Signature:
        return cls(op, tuple(map(_outline, args)))

    def __str__(self) -> str:
        return " ".join([self.op, *map(_text, self.args)])

    def arguments(self, device: torch.device) -> tuple[Any, ...]:
        """Such arguments, on a device."""
        return tuple(
            a.made_up(device) if isinstance(a, Like) else list(a) if isinstance(a, tuple) else a for a in self.args
        )


def _outline(a: Any) -> Any:
    if isinstance(a, Tensor):
        return Like(a.dtype, tuple(a.shape))
    return tuple(a) if isinstance(a, (list, torch.Size)) else a


def _text(a: Any) -> str:
    if isinstance(a, tuple) and not isinstance(a, Like):
        return f"({','.join(map(str, a))})"
    return "-" if a is None else str(a)
