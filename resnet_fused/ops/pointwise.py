"""What the ops of convolutions share: where they run, and the checks of those who do not reach the kernels.

Their kernels take bfloat16 and float16 and channels in multiples of 8, on a GPU. On the CPU each op is a composition
of ATen's convolutions and of the ops of a batch norm's tail, for every dtype and any channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import backend, plans
from ..triton import launch as triton_launch
from .aten import POINTWISE, Geometry
from .dispatch import COMPOSED
from .dispatch import ops as _ops
from .layout import Padded, acc_dtype, empty_nhwc, mask_shape, nhwc_strides

_kernels = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
_LIB = torch.library.Library("resnet_fused", "IMPL")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


_as_on_a_gpu = False


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within it, 16-bit activations on a CPU are planned for as on a GPU; what composes the kernels there computes."""
    global _as_on_a_gpu
    before, _as_on_a_gpu = _as_on_a_gpu, True
    try:
        yield
    finally:
        _as_on_a_gpu = before


def matrix_kernels_take(x: Tensor) -> bool:
    """Whether activations like x go through the matrix kernels: 16-bit types, on compute capability 8.0 and newer."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return False
    if backend.current() == "aten":
        return False
    if not x.is_cuda:
        return _as_on_a_gpu or plans.launcher_replaced() or triton_launch.launcher_replaced()
    return torch.version.cuda is not None and torch.cuda.get_device_capability(x.device) >= (8, 0)


def on_cpu(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: op `name` on CPU tensors. While a test runs the kernels elsewhere than on a GPU, they are taken."""
    op = getattr(torch.ops.resnet_fused, name).default

    def register(composed: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Tensor, *rest: Any) -> Any:
            if first.dtype in (torch.bfloat16, torch.float16) and plans.launcher_replaced():
                return op.redispatch(_kernels, first, *rest)
            return composed(first, *rest)

        _LIB.impl(name, call, "CPU")
        COMPOSED[name] = composed
        return composed

    return register


def vector_like(like: Tensor, channels: int, wanted: bool = True) -> Tensor:
    """An uninitialised vector [channels] in the accumulation type; [0] where it is not wanted."""
    return like.new_empty((channels if wanted else 0,), dtype=acc_dtype(like.dtype))


def geometry(stride: int) -> Geometry:
    return POINTWISE._replace(stride=(stride, stride))


def strided(size: int, stride: int) -> int:
    """Pixels along a dimension that a strided 1x1 convolution reads."""
    return (size + stride - 1) // stride


def activated(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """relu(scale*x + shift), or x."""
    return x if scale is None else _ops.bn_act(x, scale, shift, None, None, None, True, False)[0]


def masked(dy: Tensor, mask: Tensor | None) -> Tensor:
    """dy * mask, or dy."""
    return dy if mask is None else _ops.bn_act_backward_reduce(dy, mask, None, None, None, None, True)[0]


def added(x: Tensor, y: Tensor, constant: Tensor | None = None, by: float = 1.0) -> Tensor:
    """x + by*y + constant, rounded once."""
    one = x.new_ones(x.shape[1], dtype=acc_dtype(x.dtype))
    constant = torch.zeros_like(one) if constant is None else constant
    affine = (None, None) if by == 1 else (by * one, torch.zeros_like(one))
    return _ops.bn_act(x, one, constant, y, *affine, False, False)[0]


def dgrad_added(dx: Tensor, addend: Tensor, by: float, stride: int, offset: int) -> Tensor:
    """dx + by*addend; with a stride, the addend is the gradient of what a padded shortcut makes of x."""
    if stride:
        addend = Padded(stride, offset).adjoint(addend, torch.zeros_like(dx))
    return added(dx, addend, by=by)


def transposed(weight: Tensor) -> Tensor:
    """[K, C, 1, 1] -> [C, K, 1, 1]: a 1x1 dgrad is a fprop with these weights."""
    return weight.transpose(0, 1).contiguous()


def scattered(dx: Tensor, height: int, width: int, stride: int) -> Tensor:
    """[N, C, height, width] with dx at every stride-th pixel, else 0."""
    if stride == 1:
        return dx
    out = empty_nhwc(dx, (*dx.shape[:2], height, width)).zero_()
    out[:, :, ::stride, ::stride] = dx
    return out


class Checks:
    """The checks of a call, as the C++ functions make them: see csrc/common/checks.h."""

    def __init__(self, op: str, name: str, x: Tensor, dtypes: tuple[torch.dtype, ...] = _DTYPES) -> None:
        """x is an activation of one of `dtypes`; its dtype and device are those of the others."""
        self._op, self._dtype, self._device, self._main = op, x.dtype, x.device, name
        self._origin = f"({name} is {_name(x.dtype)})"
        *most, last = map(_name, dtypes)
        self.require(x.dtype in dtypes, f"{name} has dtype {_name(x.dtype)}, expected {', '.join(most)} or {last}")
        self.activation(name, x)

    def require(self, ok: bool, message: str) -> None:
        if not ok:
            raise RuntimeError(f"{self._op}: {message}")

    def _tensor(self, name: str, t: Tensor, dtype: torch.dtype, shape: tuple[int | str, ...]) -> None:
        """Its dtype and shape; a letter stands for any size from 1."""
        self.require(t.dtype == dtype, f"{name} has dtype {_name(t.dtype)}, expected {_name(dtype)} {self._origin}")
        fits = t.dim() == len(shape) and all(
            n >= 1 if isinstance(s, str) else n == s for n, s in zip(t.shape, shape, strict=True)
        )
        expected = ", ".join(map(str, shape))
        self.require(fits, f"{name} has shape {list(t.shape)}, expected [{expected}]")
        self.require(
            t.device == self._device, f"{name} is on {t.device}, expected {self._device} (that of {self._main})"
        )

    def tensor(self, name: str, t: Tensor, *shape: int | str) -> None:
        """Of the call's dtype and a shape, in which a letter stands for any size from 1."""
        self._tensor(name, t, self._dtype, shape)

    def activation(self, name: str, t: Tensor | None, shape: tuple[int | str, ...] | None = None) -> None:
        """Dense NHWC, of that shape or of any."""
        if t is None:
            return
        self.require(
            t.dim() == 4 and t.shape[1] > 0, f"{name} has shape {list(t.shape)}, expected 4 dimensions [N, C, H, W]"
        )
        self._tensor(name, t, self._dtype, tuple(t.shape) if shape is None else tuple(shape))
        self.dense(name, t)

    def dense(self, name: str, t: Tensor) -> None:
        """[N, C, H, W] with memory [N, H, W, C]."""
        dense = all(a == b or n == 1 for a, b, n in zip(t.stride(), nhwc_strides(t.shape), t.shape, strict=True))
        self.require(
            dense or t.numel() == 0,
            f"{name} has shape {list(t.shape)} and strides {list(t.stride())}, expected a dense channels_last tensor "
            f"({name}.contiguous(memory_format=torch.channels_last))",
        )

    def weight(self, name: str, t: Tensor, k: int | str, c: int | str) -> None:
        """[K, C, 1, 1] with memory [K][C]."""
        self._tensor(name, t, self._dtype, (k, c, 1, 1))
        self.require(
            t.flatten(1).is_contiguous(),
            f"{name} has strides {list(t.stride())} for shape {list(t.shape)}, expected a dense tensor",
        )

    def vectors(self, channels: int, **vectors: Tensor | None) -> None:
        """Contiguous vectors in the accumulation type."""
        for name, t in vectors.items():
            if t is not None:
                self._tensor(name, t, acc_dtype(self._dtype), (channels,))
                self.contiguous(name, t)

    def matrix(self, name: str, t: Tensor, shape: tuple[int, int]) -> None:
        self._tensor(name, t, self._dtype, shape)
        self.contiguous(name, t)

    def mask(self, name: str, t: Tensor | None, shape: tuple[int, ...]) -> None:
        """The bit panels of an activation [N, C, H, W]."""
        if t is not None:
            n, c, h, w = shape
            self._tensor(name, t, torch.int32, mask_shape(c, n * h * w))
            self.contiguous(name, t)

    def winners(self, name: str, t: Tensor, shape: tuple[int, ...]) -> None:
        """The argmax of a pool, laid out like its output [N, C, H, W]."""
        self._tensor(name, t, torch.int8, tuple(shape))
        self.dense(name, t)

    def dgrad_end(
        self, shape: tuple[int, ...], addend, addend_mask, gate_u, gate_scale, gate_shift, gate_mean, stride=0, offset=0
    ) -> None:
        """What a dgrad adds to dx [shape], or gates it with; `stride` and `offset` of a padded shortcut's addend."""
        of = self._padded_addend(shape, addend, stride, offset)
        self.activation("addend", addend, of)
        self.mask("addend_mask", addend_mask, of)
        self.needs("addend", addend, addend_mask=addend_mask)
        self.activation("gate_u", gate_u, shape)
        self.together(gate_u=gate_u, gate_scale=gate_scale, gate_shift=gate_shift, gate_mean=gate_mean)
        self.vectors(shape[1], gate_scale=gate_scale, gate_shift=gate_shift, gate_mean=gate_mean)
        self.excludes("gate_u", gate_u, addend=addend)

    def _padded_addend(self, shape: tuple[int, ...], addend: Tensor | None, stride: int, offset: int):
        """The shape of an addend that is the gradient of what a padded shortcut makes of dx [shape]."""
        self.require(stride >= 0, f"addend_stride is {stride}, expected 0 or more")
        self.require(stride > 0 or offset == 0, "addend_offset is given without addend_stride")
        if stride == 0:
            return shape
        if addend is None:
            raise RuntimeError(f"{self._op}: addend_stride is given without addend")
        n, c, h, w = shape
        got = tuple(addend.shape)
        self.require(
            len(got) == 4 and (got[0], *got[2:]) == (n, strided(h, stride), strided(w, stride)),
            f"addend has shape {list(got)}, whose pixels are not those that stride {stride} makes of dx, which is "
            f"{list(shape)}",
        )
        self.require(
            0 <= offset <= got[1] - c,
            f"addend_offset is {offset}, expected 0 to {got[1] - c} (dx has {c} channels, addend {got[1]})",
        )
        return got

    def contiguous(self, name: str, t: Tensor) -> None:
        self.require(
            t.is_contiguous(),
            f"{name} has strides {list(t.stride())} for shape {list(t.shape)}, expected a contiguous tensor",
        )

    def stride(self, stride: int) -> None:
        self.require(stride >= 1, f"stride is {stride}, expected at least 1")

    def together(self, **tensors: Tensor | None) -> None:
        """All or none."""
        given = [name for name, t in tensors.items() if t is not None]
        missing = [name for name, t in tensors.items() if t is None]
        if given and missing:
            self.require(False, f"{given[0]} is given without {missing[0]}")

    def needs(self, with_: str, other: Tensor | None, **tensors: Tensor | None) -> None:
        for name, t in tensors.items():
            self.require(t is None or other is not None, f"{name} is given without {with_}")

    def excludes(self, with_: str, other: Tensor | None, **tensors: Tensor | None) -> None:
        for name, t in tensors.items():
            self.require(t is None or other is None, f"{name} is given with {with_}")


def check_backward(check: Checks, dy: Tensor, mask, u, scale, shift, mean, coef_dz, coef_x, coef_1) -> None:
    """The gradient dy of a convolution's output, and what it is before the batch norm after that."""
    check.mask("mask", mask, dy.shape)
    check.activation("u", u, dy.shape)
    check.together(u=u, mean=mean, coef_dz=coef_dz, coef_x=coef_x, coef_1=coef_1)
    check.together(scale=scale, shift=shift)
    check.needs("u", u, scale=scale)
    check.excludes("scale", scale, mask=mask)
    check.vectors(
        dy.shape[1], scale=scale, shift=shift, mean=mean, coef_dz=coef_dz, coef_x=coef_x, coef_1=coef_1
    )  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
