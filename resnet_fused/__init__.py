"""Fused ResNet residual blocks: conv + BatchNorm + ReLU + residual-add, forward and backward."""

from __future__ import annotations

__version__ = "0.1.0"  # the only place: pyproject.toml reads it here

from . import blocks, functional, models, reference
from .blocks import (
    BasicBlock,
    BNReLU,
    BNReLUMaxPool,
    Bottleneck,
    ConcatBasicBlock,
    ConcatBottleneck,
    Connect,
    ConvBNAct,
    GateAct,
    GatedBlock,
    PreActBasicBlock,
    PreActBottleneck,
    PreActSequential,
    ScaledBasicBlock,
    ScaledBottleneck,
    Shared,
)
from .convert import fuse_, unfuse_
from .explain import explain
from .inference import optimize_for_inference
from .reference import PaddedShortcut
from .tune import tune

__all__ = [
    "BNReLU",
    "BNReLUMaxPool",
    "BasicBlock",
    "Bottleneck",
    "ConcatBasicBlock",
    "ConcatBottleneck",
    "Connect",
    "ConvBNAct",
    "GateAct",
    "GatedBlock",
    "PaddedShortcut",
    "PreActBasicBlock",
    "PreActBottleneck",
    "PreActSequential",
    "ScaledBasicBlock",
    "ScaledBottleneck",
    "Shared",
    "blocks",
    "explain",
    "functional",
    "fuse_",
    "models",
    "optimize_for_inference",
    "reference",
    "tune",
    "unfuse_",
]
