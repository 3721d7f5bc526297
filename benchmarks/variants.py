"""What is compared: eager PyTorch (channels_last), torch.compile, and the fused model, built from one seed.

A variant is a model and a call without arguments that runs one forward, training step or inference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused as rf

VARIANTS = ("eager", "compile", "lean", "fast")
INFERENCE_VARIANTS = ("eager", "compile", "lean")  # `memory` is about training only
WORK = ("forward", "train", "inference")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def photos_like(batch: int, size: int) -> Tensor:
    """Random images [batch, 3, size, size], channels_last: speed does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, size, size, generator=generator).contiguous(memory_format=torch.channels_last)


def build(model: nn.Module, variant: str, work: str, dtype: torch.dtype, x: Tensor) -> Callable[[], Any]:
    """The call to time. Training under bf16 is autocast, as users train; inference converts the model."""
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    if work == "inference":
        return _inference(model.eval().to(dtype), variant, x.to(dtype))
    model.train()
    if variant in ("lean", "fast"):
        rf.fuse_(model, memory=variant)  # type: ignore[arg-type]
    run = torch.compile(model) if variant == "compile" else model
    amp = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    if work == "forward":
        return lambda: _forward(run, amp, x)
    return lambda: _train_step(model, run, amp, x)


def _forward(run: Callable, amp: Any, x: Tensor) -> Tensor:
    with amp:
        return run(x)


def _train_step(model: nn.Module, run: Callable, amp: Any, x: Tensor) -> None:
    """Forward, loss and backward; the optimiser's step is the same for all and left out."""
    with amp:
        y = run(x)
    if y.dim() == 2:
        loss = F.cross_entropy(y.float(), torch.arange(len(y)) % y.shape[1])
        loss.backward()
    else:
        y.backward(torch.ones_like(y))
    model.zero_grad(set_to_none=True)


def _inference(model: nn.Module, variant: str, x: Tensor) -> Callable[[], Any]:
    run: Callable = model
    if variant in ("lean", "fast"):
        run = rf.optimize_for_inference(model, x)
    elif variant == "compile":
        run = torch.compile(model, options={"freezing": True})

    def call() -> Tensor:
        with torch.inference_mode(variant != "compile"), torch.no_grad():
            return run(x)

    return call
