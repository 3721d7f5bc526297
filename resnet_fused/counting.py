"""Bytes that a run moves, counted op by op, and a table of blocks that sets them beside those `traffic.py` predicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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

_COMPOSITIONS = {**residual_block.COMPOSITIONS, **stem.COMPOSITIONS}


class _Counter(TorchDispatchMode):
    """Adds up the bytes of every op's tensor inputs, each once, and of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "resnet_fused" and func._opname in _COMPOSITIONS:
            with self:  # the ops that it is composed of are what moves bytes
                return _COMPOSITIONS[func._opname](*args)
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func._opname not in _MOVE_NOTHING:
            self.bytes += _bytes(out) + (0 if func._opname in _READ_NOTHING else _bytes((args, kwargs)))
        return out


_READ_NOTHING = ("new_full", "new_zeros", "new_ones", "full_like", "zeros_like", "ones_like")
_MOVE_NOTHING = ("empty", "empty_like", "new_empty", "detach", "_unsafe_view", "_reshape_alias")


def _bytes(tree: Any) -> int:
    tensors = {t.data_ptr(): t for t in tree_leaves(tree) if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def counted(run: Callable[[], Any]) -> int:
    """Bytes of the inputs and outputs of all ops that `run` calls, forward or backward."""
    with torch.autograd.set_multithreading_enabled(False), _Counter() as counter:
        run()
    return counter.bytes


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
    """Counted bytes of (forward, backward)."""
    x = x.detach().requires_grad_()
    outputs: list[Tensor] = []
    forward = counted(lambda: outputs.append(block(x)))
    dy = torch.ones_like(outputs[0])
    return forward, counted(lambda: outputs[0].backward(dy))
