"""The ops: torch.ops.resnet_fused.*, their fakes and their autograd."""

from __future__ import annotations

import importlib

importlib.import_module("resnet_fused._C")  # registers the schemas and kernels that the imports below build on

from . import bn_act, bn_act_pool, bn_stats, conv1x1, conv2d, expand, gram, gram_operand, residual_block, stem  # noqa: E402

__all__ = [
    "bn_act",
    "bn_act_pool",
    "bn_stats",
    "conv1x1",
    "conv2d",
    "expand",
    "gram",
    "gram_operand",
    "residual_block",
    "stem",
]
