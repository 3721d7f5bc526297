"""Bytes that a run moves, counted op by op, and a table of blocks that sets them beside those `traffic.py` predicts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .convert import fuse_
from .data import require
from .ops import residual_block, stem
from .ops.pointwise import as_on_a_gpu
from .recorder import recording
from .traffic import block_bytes, compile_bytes, sizes_of

COMPOSITIONS = {**residual_block.COMPOSITIONS, **stem.COMPOSITIONS}  # of ops: what runs for each


class Moved(NamedTuple):
    """Bytes that a run moves, by both counts."""

    passes: int  # each op's tensors as often as `traffic.py` says that it goes over them
    unique: int  # each op's tensors once

    def __add__(self, other: Moved) -> Moved:  # type: ignore[override]
        return Moved(self.passes + other.passes, self.unique + other.unique)


class Counter(TorchDispatchMode):
    """Adds up the bytes of every op's tensor inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = Moved(0, 0)
        self.convolutions = 0  # bytes of ATen's, each op's tensors once

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "resnet_fused" and func._opname in COMPOSITIONS:
            with self:  # the ops that it is composed of are what moves bytes
                return COMPOSITIONS[func._opname](*args)
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default and out.is_meta:  # which forgets the layout
            out = out.contiguous(memory_format=torch.channels_last)
        if _moves(func, args, out):
            once = _bytes(out) + (0 if func._opname in _READ_NOTHING else _bytes((args, kwargs)))
            once -= _left_unread(func, args)
            again = sum((times - 1) * _bytes(args[i]) for i, times in _reads(func._opname, args).items())
            self.moved += Moved(once + again, once)
            self.convolutions += once if func._opname.startswith("convolution") else 0
        return out


_READ_NOTHING = ("new_full", "new_zeros", "new_ones", "full_like", "zeros_like", "ones_like")
_MOVE_NOTHING = ("empty", "empty_like", "new_empty", "new_empty_strided", "detach", "_unsafe_view", "_reshape_alias")
# How often an op goes over an argument, by its number, where that is not once.
_READS = {
    "native_batch_norm_backward": {0: 2, 1: 2},
    "max_pool2d_with_indices_backward": {1: 0},
}


def _moves(func: Any, args: Any, out: Any) -> bool:
    if func._opname == "contiguous":  # a view or a copy
        return where(out) != where(args[0])
    return not func.is_view and func._opname not in _MOVE_NOTHING


def _reads(op: str, args: Any) -> dict[int, int]:
    if op == "convolution_backward":
        need_dx, need_dw, _ = args[-1]
        return {0: int(need_dx) + int(need_dw), 1: int(need_dw), 2: int(need_dx)}
    if op == "native_batch_norm":  # given statistics are not taken first
        return {0: 1 + bool(args[5])}
    return _READS.get(op, {})


def _left_unread(func: Any, args: Any) -> int:
    """Bytes of channels that an op does not read of its operands."""
    given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)}
    if func._opname == "concat_act_backward":
        dy, read = given["dy"], given["dy"].shape[1] - given["before"]
    elif func._opname in ("conv1x1_dgrad", "conv2d_dgrad") and given.get("addend_stride"):
        groups = given["geometry"][6] if "geometry" in given else 1
        dy, read = given["addend"], given["weight"].shape[1] * groups
    else:
        return 0
    return _bytes(dy) // dy.shape[1] * (dy.shape[1] - read)


def _bytes(tree: Any) -> int:
    tensors = {where(t): t for t in tree_leaves(tree) if isinstance(t, Tensor)}
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors.values())  # expanded


def where(t: Tensor) -> tuple[int, int]:
    """Where a tensor begins, also one on the meta device, which has no addresses."""
    return t.untyped_storage()._cdata, int(t.storage_offset())


@contextmanager
def counting() -> Iterator[Counter]:
    """Counts what runs within it, forward or backward."""
    with torch.autograd.set_multithreading_enabled(False), Counter() as counter:
        yield counter


COLUMNS = ("block", "count", "eager", "torch.compile", "ours, ATen", "ours, kernels")


def comparison() -> list[tuple[str, ...]]:
    """Rows of COLUMNS: what a block's training step moves, forward + backward, in bf16, by both counts.

    In units of one activation of the narrow width. torch.compile's fused kernels are no ops: they cannot be counted.
    """

    def projection(c: int, k: int, stride: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=False), nn.BatchNorm2d(k))

    blocks = require("torchvision.models.resnet", "the comparison with eager")
    rows: list[tuple[str, ...]] = []
    for name, block, stride in (
        ("Bottleneck(256, 64)", blocks.Bottleneck(256, 64), 1),
        ("Bottleneck(64, 64), projection", blocks.Bottleneck(64, 64, 1, projection(64, 256, 1)), 1),
        ("Bottleneck(256, 128), stride 2", blocks.Bottleneck(256, 128, 2, projection(256, 512, 2)), 2),
        ("BasicBlock(64)", blocks.BasicBlock(64, 64), 1),
    ):
        side = 56 * stride
        x = torch.randn(2, block.conv1.in_channels, side, side).bfloat16().contiguous(memory_format=torch.channels_last)
        rows += _compare(name, block.bfloat16().to(memory_format=torch.channels_last), x, stride)
    return rows


def _compare(name: str, block: nn.Module, x: Tensor, stride: int) -> list[tuple[str, ...]]:
    unit = 2 * block.conv1.out_channels * x[:, 0, ::stride, ::stride].numel()  # type: ignore[operator, union-attr]

    def show(moved: tuple[float, float]) -> str:
        return f"{moved[0] / unit:.1f} + {moved[1] / unit:.1f}"

    eager = _step(block, x)
    fuse_(block)
    with recording() as calls:
        plain = _step(block, x)
    with as_on_a_gpu(), recording() as kernel_calls:
        kernels = _step(block, x)
    call: Any = calls[0]
    compiled = compile_bytes(sizes_of(call.x_shape, 2, call.units, call.spec), call.spec)
    (before, ours), (_, on_kernels) = block_bytes(call), block_bytes(kernel_calls[0])
    passes = [show((b.forward, b.backward)) for b in (before, compiled, ours, on_kernels)]
    return [(name, "passes", *passes), (name, "ops' inputs, outputs", show(eager), "", show(plain), show(kernels))]


def _step(block: nn.Module, x: Tensor) -> tuple[float, float]:
    """Counted bytes of (forward, backward), each op's inputs and outputs once."""
    x = x.detach().requires_grad_()
    with counting() as forward:
        y = block(x)
    dy = torch.ones_like(y)
    with counting() as backward:
        y.backward(dy)
    return forward.moved.unique, backward.moved.unique
