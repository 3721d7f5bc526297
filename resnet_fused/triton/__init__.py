"""The ops once more as Triton kernels: torch.ops.resnet_fused_triton.*, with the schemas of torch.ops.resnet_fused.*.

They take float32, bfloat16 and float16. Triton itself is imported when an op first runs. Tensors are on a GPU; on the
CPU they are taken where Triton interprets its kernels (TRITON_INTERPRET=1 in the environment, before the first call):
slow, and bfloat16 truncates there. RuntimeError elsewhere, and for arguments that the twin refuses too.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from .. import plans
from .launch import launcher_replaced

NAMESPACE = "resnet_fused_triton"
# The ops by the module of this package that has them, as functions of the same names.
_TAILS = {
    "bn_stats": ("bn_stats",),
    "bn_act": ("bn_act", "relu_mask", "bn_act_backward_reduce", "bn_act_backward_apply"),
    "add_stats": ("add_stats",),
    "concat_act": ("concat_act", "concat_act_backward"),
    "gate_act": ("gate_act", "gate_act_backward"),
    "gram_operand": ("gram_operand",),
    "bn_act_pool": ("bn_act_pool", "bn_act_pool_backward"),
}
_PRODUCTS = {
    "conv1x1": ("conv1x1", "conv1x1_dgrad", "conv1x1_wgrad"),
    "conv2d": ("conv2d", "conv2d_bn_act", "conv2d_dgrad", "conv2d_wgrad"),
    "expand": ("expand", "expand_dgrad"),
    "gram": ("gram",),
}
TAILS = tuple(name for names in _TAILS.values() for name in names)
PRODUCTS = tuple(name for names in _PRODUCTS.values() for name in names)  # bfloat16 and float16 only

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_TAILS_WITHOUT_CUDA = torch.library.Library("resnet_fused", "IMPL")


def unavailable() -> str | None:
    """Why the ops cannot run, or None."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed: pip install triton"


def interpreted() -> bool:
    """Whether Triton interprets the kernels that are imported from now on."""
    return importlib.import_module("triton").knobs.runtime.interpret


@functools.cache
def _function(stem: str, name: str) -> Callable[..., Any]:
    if (reason := unavailable()) is not None:
        raise RuntimeError(f"{NAMESPACE}::{name}: {reason}")
    return getattr(importlib.import_module(f".{stem}", __name__), name)


def _define(stem: str, name: str) -> None:
    schema = getattr(torch.ops.resnet_fused, name).default._schema
    _LIBRARY.define(str(schema).removeprefix("resnet_fused::"))

    def on_gpu(*args: Any) -> Any:
        return _function(stem, name)(*args)

    def on_cpu(*args: Any) -> Any:
        call = _function(stem, name)
        if not (launcher_replaced() or interpreted()):
            raise RuntimeError(
                f"{NAMESPACE}::{name}: its kernels run on GPUs, and on CPU tensors where TRITON_INTERPRET=1 is set"
            )
        return call(*args)

    _LIBRARY.impl(name, on_gpu, "CUDA")
    _LIBRARY.impl(name, on_cpu, "CPU")
    if name in TAILS and not plans.has_cuda():  # an extension built without a CUDA compiler
        _TAILS_WITHOUT_CUDA.impl(name, on_gpu, "CUDA")


for _stem, _names in (_TAILS | _PRODUCTS).items():
    for _name in _names:
        _define(_stem, _name)
