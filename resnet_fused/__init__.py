"""Fused ResNet residual blocks: conv + BatchNorm + ReLU + residual-add, forward and backward."""

from __future__ import annotations

__version__ = "0.1.0"  # the only place: pyproject.toml reads it here

from . import functional, models, reference
from .blocks import (
    BasicBlock,
    BNReLUMaxPool,
    Bottleneck,
    ConcatBasicBlock,
    ConcatBottleneck,
    ConvBNAct,
    ScaledBasicBlock,
    ScaledBottleneck,
)
from .convert import fuse_, unfuse_
from .explain import explain
from .gated import GateAct, GatedBlock
from .inference import optimize_for_inference
from .preact import PreActBasicBlock, PreActBottleneck, PreActSequential
from .reference import PaddedShortcut
from .tune import tune

__all__ = [
    "BNReLUMaxPool",
    "BasicBlock",
    "Bottleneck",
    "ConcatBasicBlock",
    "ConcatBottleneck",
    "ConvBNAct",
    "GateAct",
    "GatedBlock",
    "PaddedShortcut",
    "PreActBasicBlock",
    "PreActBottleneck",
    "PreActSequential",
    "ScaledBasicBlock",
    "ScaledBottleneck",
    "explain",
    "functional",
    "fuse_",
    "models",
    "optimize_for_inference",
    "reference",
    "tune",
    "unfuse_",
]
