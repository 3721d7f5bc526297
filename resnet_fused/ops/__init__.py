"""The ops: torch.ops.resnet_fused.*, their fakes and their autograd."""

from __future__ import annotations

import importlib

importlib.import_module("resnet_fused._C")  # registers the schemas and kernels that the imports below build on
importlib.import_module("resnet_fused.triton")  # and those of the Triton kernels, without importing Triton

from . import (  # noqa: E402
    add_stats,
    bn_act,
    bn_act_pool,
    bn_stats,
    concat_act,
    conv1x1,
    conv2d,
    expand,
    gate_act,
    gram,
    gram_operand,
    preact_block,
    residual_block,
    stem,
)

__all__ = [
    "add_stats",
    "bn_act",
    "bn_act_pool",
    "bn_stats",
    "concat_act",
    "conv1x1",
    "conv2d",
    "expand",
    "gate_act",
    "gram",
    "gram_operand",
    "preact_block",
    "residual_block",
    "stem",
]
