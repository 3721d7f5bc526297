"""Nothing between a call and its kernels waits for the GPU, copies to the host, or allocates past torch's allocator.

That is what lets the host run ahead, and a training step be captured as a CUDA graph. Without a GPU it is shown twice:
by the source, and by the ops that a training step calls on the emulated kernels.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise
from device import Device
from op_cases import activation
from test_device import block
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import resnet_fused as rf
from resnet_fused.ops.residual_block import COMPOSITIONS

ROOT = Path(__file__).parents[1]
PATHS = [
    *sorted(ROOT.glob("csrc/*/*_op.cpp")),
    ROOT / "csrc/common/launch.cpp",
    *sorted(ROOT.glob("csrc/common/*.h")),
    ROOT / "csrc/gemm/checks.h",
    *sorted(ROOT.glob("resnet_fused/ops/*.py")),
    *sorted(ROOT.glob("resnet_fused/blocks/*.py")),
    *(ROOT / "resnet_fused" / name for name in ("functional.py", "modules.py", "plans.py")),
]
WAITS = {
    ".cpp": r"\bcu(?:da)?(?:Memcpy|Memset|Malloc|Free|HostAlloc|DeviceSynchronize|StreamSynchronize|EventSynchronize"
    r"|StreamWaitEvent|EventQuery|StreamQuery|Ctx\w*)\w*|\.item\b|aoti_torch_item|\bto_cpu\b",
    ".py": r"\.(?:item|tolist|cpu|numpy|nonzero|synchronize|unique|masked_select|argwhere|is_nonzero|any|all|equal"
    r"|allclose|pin_memory)\([^)]*\)|torch\.(?:nonzero|unique|masked_select|equal|allclose|any|all|is_nonzero|tensor"
    r"|as_tensor|from_numpy)\(|\.to\(['\"]cpu|\bbool\(|\bfloat\(|(?<![\w.])int\(",
}
# What is there and does not wait: the line, and why.
ALLOWED = {
    "return (var < _CANCELS * uncorrelated).nonzero().flatten()": "of the CPU alone: the line before returns elsewhere",
    "mask = _recompute_rows(torch.cat(found).unique(), sources, ends, y, mask, residual, spec)": "the same, of "
    "what was found",
}
PLAIN = (
    r"\b(?:bool|int)\((?:g\[|u\.|unit\.)",  # flags of a geometry or a plan
    r"\bbool\(_library\.",
    r"(?<![\w.])int\(v\)",  # a problem's sizes
)


def waits(path: Path, text: str) -> list[str]:
    """The calls of a file that wait for a device, or may, outside of comments and what is allowed."""
    pattern = WAITS[".py" if path.suffix == ".py" else ".cpp"]
    found = []
    if path.suffix == ".py":
        text = re.sub(r'"""(?:.|\n)*?"""', "", text)
    for line in text.splitlines():
        code = re.sub(r"(?:#|//).*", "", line).strip()
        if code in ALLOWED or any(re.search(plain, code) for plain in PLAIN):
            continue
        found += [f"{path.relative_to(ROOT)}: {code}" for _ in re.findall(pattern, code)]
    return found


def test_no_source_waits() -> None:
    assert len(PATHS) > 30
    assert [call for path in PATHS for call in waits(path, path.read_text())] == []


def test_what_is_allowed_is_there() -> None:
    lines = {line.strip() for path in PATHS for line in path.read_text().splitlines()}
    assert ALLOWED.keys() <= lines


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("resnet_fused/ops/kernel_block.py", "    if dgamma.abs().max().item() > 1:"),
        ("resnet_fused/ops/kernel_block.py", "    return float(dgamma.sum())"),
        ("resnet_fused/ops/block.py", "    if bool(var.min() > 0):"),
        ("resnet_fused/ops/gram_form.py", "    columns = torch.nonzero(var < 1)"),
        ("resnet_fused/functional.py", "    mean = mean.cpu()"),
        ("resnet_fused/functional.py", "    mean = mean.to('cpu')"),
        ("resnet_fused/blocks/fused.py", "    torch.cuda.synchronize()"),
        ("resnet_fused/ops/bn_stats.py", "    sizes = counts.tolist()"),
        ("csrc/common/launch.cpp", "  check(cudaDeviceSynchronize(), name);"),
        ("csrc/common/launch.cpp", "  cudaMalloc(&workspace, bytes);"),
        ("csrc/common/launch.cpp", "  cudaStreamSynchronize(stream);"),
        ("csrc/expand/expand_op.cpp", "  cudaMemcpyAsync(to, from, n, kind, stream);"),
    ],
)
def test_a_call_that_waits_is_found(name: str, line: str) -> None:
    path = ROOT / name
    assert path in PATHS
    assert len(waits(path, f"{path.read_text()}\n{line}\n")) == 1
    assert waits(path, f"{path.read_text()}\n{'#' if path.suffix == '.py' else '//'} {line}\n") == []


# ------------------------------------------------------------------------------------------------- ops that ran

WAITING_OPS = {
    "_local_scalar_dense", "item", "nonzero", "nonzero_numpy", "is_nonzero", "equal", "masked_select", "_unique2",
    "unique_dim", "unique_consecutive", "allclose", "argwhere", "repeat_interleave", "bincount", "pin_memory",
    "_pin_memory", "record_stream",
}  # fmt: skip
# Makes a tensor of host data, which would be copied to the device.
COPYING_OPS = {"lift_fresh", "lift_fresh_copy", "scalar_tensor"}


class Watch(TorchDispatchMode):
    """Raises at an op that would wait for a GPU, or copy to it or from it, if its tensors were there."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "resnet_fused" and func._opname in COMPOSITIONS:
            with self:
                return COMPOSITIONS[func._opname](*args)
        name, values = func._opname, tree_leaves((args, kwargs))
        self.ops.append(name)
        if name in WAITING_OPS | COPYING_OPS:
            raise AssertionError(f"{name} waits for the device, or copies to it")
        if name.startswith("index") and any(isinstance(v, Tensor) and v.dtype == torch.bool for v in values):
            raise AssertionError(f"{name} by booleans waits for the device")
        return func(*args, **(kwargs or {}))


def watched(f: Callable[..., Any], *arguments: Any) -> tuple[Any, list[str]]:
    with torch.autograd.set_multithreading_enabled(False), Watch() as watch:
        return f(*arguments), watch.ops


@pytest.mark.parametrize("memory", ["lean", "fast"])
@pytest.mark.parametrize("kind", ["identity", "projection", "stride 2"])
def test_a_training_step_calls_no_op_that_waits(kind: str, memory: str) -> None:
    """All of it: the module, autograd, running statistics and the kernels' ops."""
    torch.manual_seed(0)
    fused = randomise(block(rf, "Bottleneck", kind)).bfloat16()
    fused.memory = memory
    if kind == "projection":
        fused.bn1.momentum = None  # a cumulative average, whose factor depends on a counter of the device
    x = activation(2, 32, 7, 5, torch.bfloat16).requires_grad_()
    dy = torch.randn_like(fused(x).detach())
    ops = Device("emulated").run(lambda: watched(step, fused, x, dy))[1]
    assert {"conv1x1", "conv1x1_dgrad", "conv1x1_wgrad", "conv2d", "conv2d_dgrad", "conv2d_wgrad"} <= set(ops)
    assert "expand" in ops or memory == "fast"


def step(module: nn.Module, x: Tensor, dy: Tensor) -> None:
    torch.autograd.grad(module(x), [x, *module.parameters()], dy)


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t.sum().item(),
        lambda t: bool(t.sum() > 0),
        lambda t: float(t[0]),
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: torch.equal(t, t),
        lambda t: t + torch.tensor(2.0),
    ],
)
def test_an_op_that_waits_is_seen(wait: Callable[[Tensor], Any]) -> None:
    with pytest.raises(AssertionError):
        watched(wait, torch.randn(3))
