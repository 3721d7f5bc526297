"""Fused ResNet residual blocks: conv + BatchNorm + ReLU + residual-add, forward and backward."""

from __future__ import annotations

from . import functional, models, reference
from .blocks import BasicBlock, BNReLUMaxPool, Bottleneck, ConvBNAct
from .convert import fuse_, unfuse_
from .explain import explain
from .inference import optimize_for_inference

__version__ = "0.1.0"

__all__ = [
    "BNReLUMaxPool",
    "BasicBlock",
    "Bottleneck",
    "ConvBNAct",
    "explain",
    "functional",
    "fuse_",
    "models",
    "optimize_for_inference",
    "reference",
    "unfuse_",
]
