"""Whole blocks by the Triton kernels, forward and backward, as RESNET_FUSED_BACKEND=triton has it."""

from __future__ import annotations

import itertools

import pytest
import torch
from device import COMPILED_TRITON, Device
from op_cases import activation
from test_device import block
from test_kernel_block import step_draws
from test_tune import fastest_is
from torchvision.models import resnet as torchvision_resnet

import resnet_fused as rf
from resnet_fused import choice, tuned
from resnet_fused.backend import Choice
from resnet_fused.ops import dispatch
from resnet_fused.signature import Signature

FIRST = [("Bottleneck", "identity", "lean"), ("Bottleneck", "stride 2", "lean"), ("BasicBlock", "projection", "fast")]
KINDS = itertools.product(("Bottleneck", "BasicBlock"), ("identity", "projection", "stride 2"), ("lean", "fast"))
CASES = [*FIRST, *(pytest.param(*c, marks=pytest.mark.slow) for c in KINDS if c not in FIRST)]


@pytest.mark.parametrize("device", [pytest.param(n, marks=[pytest.mark.slow] * (n == "triton-sm_90"))
                                    for n in COMPILED_TRITON])  # fmt: skip
@pytest.mark.parametrize(("name", "kind", "memory"), CASES)
def test_training_step(name: str, kind: str, memory: str, device: str) -> None:
    eager, fused = block(torchvision_resnet, name, kind), block(rf, name, kind)
    fused.memory = memory
    on = Device(device)
    # Few pixels, of which one on the other side of a ReLU weighs much: it takes draws to compare with eager's luck.
    step_draws(fused, eager, on, torch.bfloat16, (4, 32, 9, 7), count=6 if name == "Bottleneck" else 16)
    if device != "triton-cuda":
        assert {"fprop_kernel", "dgrad_kernel", "wgrad_kernel"} < set(on.symbols)
        assert ("gram_kernel" in on.symbols) == (memory == "lean" and (name == "Bottleneck" or kind != "identity"))


def test_its_configs_are_candidates_of_tune() -> None:
    x, weight = activation(1, 32, 6, 5, torch.bfloat16), activation(48, 32, 1, 1, torch.bfloat16)
    device = Device("triton-sm_80")
    conv = rf.Bottleneck(32, 8).bfloat16().to(memory_format=torch.channels_last)
    conv.memory = "fast"
    tune = {"rounds": 1, "timer": fastest_is("triton:2"), "backends": ("triton", "aten")}
    report = device.run(lambda: rf.tune(conv, activation(1, 32, 3, 2, torch.bfloat16), **tune))
    assert report.left_out == {}
    for problem, entry in report.entries.items():
        assert {"aten", "triton", "triton:1"} <= entry.seconds.keys(), problem
        assert entry.winner == "triton:2" or "triton:2" not in entry.seconds
    args = (x, weight, None, None, 1, False)
    outputs = [device.run(lambda n=n: dispatch.run("conv1x1", args, Choice("triton", n)))[0] for n in (0, 1, 2)]
    assert torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0], outputs[2], rtol=2e-2, atol=2e-2)
    tuned.table(torch.device("cpu")).add(str(Signature.of("conv1x1", args)), tuned.Entry.of({"triton:2": 1e-3}))
    assert choice.decide(Signature.of("conv1x1", args), torch.device("cpu"), 80).choice == Choice("triton", 2)
