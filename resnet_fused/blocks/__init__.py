"""Every block: the drop-in ones, their variants, and `create`, which makes any of them from one set of options."""

from .fused import (
    BasicBlock,
    Bottleneck,
    ConcatBasicBlock,
    ConcatBottleneck,
    ConvBNAct,
    FusedBlock,
    ScaledBasicBlock,
    ScaledBottleneck,
)
from .norms import BNReLU, bn_relu
from .stem import BNReLUMaxPool, FusedStem, UnpooledStem, bn_relu_maxpool, conv_bn_relu_maxpool

# These build on the above, so they come behind it.
from ..gated import GateAct, GatedBlock, MNISTBlock  # isort: skip
from ..preact import PreActBasicBlock, PreActBlock, PreActBottleneck, PreActSequential  # isort: skip
from .connect import BottleneckConnection, Connect, Join, Shared  # isort: skip
from .options import BlockOptions, create  # isort: skip

__all__ = [
    "BNReLU",
    "BNReLUMaxPool",
    "BasicBlock",
    "BlockOptions",
    "Bottleneck",
    "BottleneckConnection",
    "ConcatBasicBlock",
    "ConcatBottleneck",
    "Connect",
    "ConvBNAct",
    "FusedBlock",
    "FusedStem",
    "GateAct",
    "GatedBlock",
    "Join",
    "MNISTBlock",
    "PreActBasicBlock",
    "PreActBlock",
    "PreActBottleneck",
    "PreActSequential",
    "ScaledBasicBlock",
    "ScaledBottleneck",
    "Shared",
    "UnpooledStem",
    "bn_relu",
    "bn_relu_maxpool",
    "conv_bn_relu_maxpool",
    "create",
]
