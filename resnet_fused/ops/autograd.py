"""What the ops share on the autograd side, registered for each op and for its twin among the Triton kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

_NAMESPACES = (torch.ops.resnet_fused, torch.ops.resnet_fused_triton)


def _twins(name: str) -> Iterator[tuple[Any, str]]:
    """The namespaces that have op `name`, and its full name there."""
    return ((ops, f"{ops.name}::{name}") for ops in _NAMESPACES if hasattr(ops, name))


def differentiable(name: str, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    """The derivative of op `name`: backward(ops, ctx, *grads), which calls other ops as those of `ops`."""
    for ops, full_name in _twins(name):
        torch.library.register_autograd(full_name, functools.partial(backward, ops), setup_context=setup)


def forbid_gradients(*names: str) -> None:
    """Ops that are steps of a larger one: a gradient asked of them raises, instead of silently being lost."""
    for full_name in (full_name for name in names for _, full_name in _twins(name)):

        def backward(ctx: object, *grads: object, _name: str = full_name) -> None:
            raise RuntimeError(
                f"{_name} has no derivative of its own; use resnet_fused.functional, "
                "whose backward calls it (and cannot be differentiated twice)"
            )

        torch.library.register_autograd(full_name, backward)


def fake(name: str) -> Callable:
    """Decorator: the shapes, dtypes and strides of op `name` on tensors without data."""

    def register(f: Callable[..., Any]) -> Callable[..., Any]:
        for _, full_name in _twins(name):
            torch.library.register_fake(full_name, f)
        return f

    return register
