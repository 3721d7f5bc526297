"""Timing, and what is kept in memory."""

from __future__ import annotations

import subprocess

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnet_fused import measure, models
from resnet_fused.measure import PeakMemory, Ratio, interleave, saved_bytes


def test_calls_take_turns() -> None:
    seen = ""

    def call(name: str):
        def run() -> None:
            nonlocal seen
            seen += name

        return run

    times = interleave({"a": call("a"), "b": call("b"), "c": call("c")}, rounds=3)
    assert seen == "abc" + "abc" + "cba" + "abc"
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratios_are_taken_within_a_round() -> None:
    ratio = Ratio.of([2.0, 20.0, 6.0], [1.0, 5.0, 6.0])
    assert ratio == (2.0, 1.0, 4.0)
    assert str(ratio) == "2.00x (1.00-4.00)"


def test_saved_bytes_of_known_functions() -> None:
    x = torch.randn(8, 16, requires_grad=True)
    w = nn.Parameter(torch.randn(16, 4))
    assert saved_bytes(lambda: x.exp()) == 8 * 16 * 4  # its result
    assert saved_bytes(lambda: x * x) == 8 * 16 * 4  # one storage, saved twice
    assert saved_bytes(lambda: x[2:] * x[:6]) == 8 * 16 * 4  # two views of one storage
    assert saved_bytes(lambda: x + x) == 0
    assert saved_bytes(lambda: x @ w) == (8 * 16 + 16 * 4) * 4
    assert saved_bytes(lambda: x @ w, exclude=[w]) == 8 * 16 * 4


def test_a_fused_step_saves_less_than_the_plain_one() -> None:
    fused = models.ResNet(models.Bottleneck, (2, 1, 1, 1))
    plain = models.ResNet(models.reference.Bottleneck, (2, 1, 1, 1))
    x = torch.randn(2, 3, 64, 64)
    sizes = [saved_bytes(lambda m=m: m(x), [*m.parameters(), *m.buffers()]) for m in (fused, plain)]
    assert sizes[0] < 0.6 * sizes[1]


def test_a_training_step_trains() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    x, labels = torch.randn(6, 3, 2, 2), torch.randint(0, 3, (6,))
    step = measure.training_step(model, x, labels)
    before = F.cross_entropy(model(x), labels)
    for _ in range(50):
        step()
    assert F.cross_entropy(model(x), labels) < before


@pytest.mark.parametrize("variant", ["eager", "lean"])
def test_peak_memory_of_a_process_of_its_own(variant: measure.Variant) -> None:
    pytest.importorskip("torchvision")
    ballast = torch.ones(2**28)  # 1 GiB here must not show there
    memory = measure.peak_memory(variant, batch=2, size=32)
    assert 0 < memory.before < memory.peak < ballast.nbytes * 2
    assert memory.step == memory.peak - memory.before
    parameters = 25_557_032 * 4
    assert memory.step > parameters  # at the least their gradients


def test_a_failed_process_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args, **_kwargs) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess([], 1, "", "Traceback\nRuntimeError: no room\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(RuntimeError, match="measuring the memory of lean failed: RuntimeError: no room"):
        measure.peak_memory("lean", 1, 32)


def test_peak_memory_adds_up() -> None:
    assert PeakMemory(peak=5, before=3).step == 2
