"""What the ops share on the autograd side."""

from __future__ import annotations

from collections.abc import Callable

import torch


def forbid_gradients(*names: str) -> None:
    """Ops that are steps of a larger one: a gradient asked of them raises, instead of silently being lost."""
    for name in names:

        def backward(ctx: object, *grads: object, _name: str = name) -> None:
            raise RuntimeError(
                f"resnet_fused::{_name} has no derivative of its own; use resnet_fused.functional, "
                "whose backward calls it (and cannot be differentiated twice)"
            )

        torch.library.register_autograd(f"resnet_fused::{name}", backward)


def fake(name: str) -> Callable:
    """Decorator: the shapes, dtypes and strides of op `name` on tensors without data."""
    return torch.library.register_fake(f"resnet_fused::{name}")
