"""Whole networks by stage: the counts of a run, the predictions beside them, and what the design promises."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torchvision.models import resnet as torchvision_resnet

from resnet_fused import fuse_, network
from resnet_fused.__main__ import main
from resnet_fused.network import MEMORIES, STAGES, Comparison, Step
from resnet_fused.ops.pointwise import as_on_a_gpu
from resnet_fused.traffic import block_bytes, stem_bytes

HALF = torch.bfloat16


@functools.cache
def comparison(name: str) -> Comparison:
    return Comparison.of(name, 256)


def share(name: str, of: str, get: Callable[[Step], float]) -> float:
    compared = comparison(name)
    return sum(map(get, compared.ours[of])) / sum(map(get, compared.eager))


def passes(step: Step) -> float:
    return step.moved.passes


def unique(step: Step) -> float:
    return step.moved.unique


def saved(step: Step) -> float:
    return step.saved


@pytest.mark.parametrize(
    ("name", "memory", "get", "most"),
    [
        ("resnet50", "lean", passes, 0.46),
        ("resnet50", "lean", unique, 0.56),
        ("resnet50", "lean", saved, 0.48),
        ("resnet50", "fast", passes, 0.62),
        ("resnet50", "fast", unique, 0.74),
        ("resnet50", "fast", saved, 0.80),
        ("resnet18", "lean", passes, 0.72),
        ("resnet18", "lean", saved, 0.60),
        ("resnet18", "fast", saved, 0.63),
    ],
)
def test_share_of_eager(name: str, memory: str, get: Callable[[Step], float], most: float) -> None:
    assert share(name, memory, get) <= most


def test_design() -> None:
    """Lean, ResNet-50: at most 0.45 of eager's passes, 0.50 of its ops' inputs and outputs."""
    compared = comparison("resnet50")
    lean = compared.ours["lean"]
    assert sum(map(passes, lean)) <= 0.45 * sum(map(passes, compared.eager))
    assert sum(map(unique, lean)) <= 0.50 * sum(map(unique, compared.eager))
    for own, compiled, eager in list(zip(lean, compared.compiled, compared.eager, strict=True))[:-1]:
        assert passes(own) <= compiled.moved <= passes(eager)


def fused_steps(name: str, memory: str) -> tuple[list[Step], list]:
    return network.steps_of(network.create(name, HALF, memory), 256, 224, HALF)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_eager_runs_as_predicted(name: str) -> None:
    """To the byte: the formulas' passes are those of the ops that ran."""
    eager, _ = network.steps_of(network.create(name, HALF), 256, 224, HALF)
    _, calls = fused_steps(name, "lean")
    predicted = [stem_bytes(calls[0][0])[0]]
    for stage in calls[1:-1]:
        forward, backward = (sum(block_bytes(call)[0][i] for call in stage) for i in (0, 1))
        predicted.append((forward, backward))
    for step, want in zip(eager[:-1], predicted, strict=True):
        assert (step.forward.passes, step.backward.passes) == tuple(want)[:2]


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_blocks_run_as_predicted(name: str, memory: str) -> None:
    steps, calls = fused_steps(name, memory)
    for step, stage in zip(steps[1:-1], calls[1:-1], strict=True):
        forward, backward = (sum(block_bytes(call)[1][i] for call in stage) for i in (0, 1))
        assert step.forward.passes == pytest.approx(forward, rel=1e-3)
        assert step.backward.passes == pytest.approx(backward, rel=1e-3)


@pytest.mark.parametrize("memory", [None, *MEMORIES])
def test_meta_tensors_count_as_real_ones(memory: str | None) -> None:
    counts = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = torchvision_resnet.ResNet(torchvision_resnet.Bottleneck, [1, 2, 1, 1], 10, width_per_group=16)
        model = model.to(HALF).to(memory_format=torch.channels_last)
        if memory is not None:
            fuse_(model, memory)
        by_batch = []
        with as_on_a_gpu():
            for batch in (2, 4):
                x = network.images(batch, 32, HALF, device)
                by_batch.append(network.run(model, torch.randn_like(x) if device == "cpu" else x)[0])
        counts.append([(b.moved.passes - a.moved.passes, b.saved - a.saved) for a, b in zip(*by_batch, strict=True)])
    assert counts[0] == counts[1]


def test_a_storage_counts_once() -> None:
    """Between stages an activation belongs to both."""
    from resnet_fused.measure import saved_bytes

    model = network.create("resnet18", HALF, "lean")
    x = network.images(4, 64, HALF)
    with as_on_a_gpu():
        whole = saved_bytes(lambda: model(x), [*model.parameters(), *model.buffers()])
        steps, _ = network.run(model, x)
    assert sum(step.saved for step in steps) == whole


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--traffic", "--model", "resnet18", "--batch", "8", "--size", "64"]) == 0
    out = capsys.readouterr().out
    assert out.count("total") == 3
    assert "torch.compile" in out
    assert all(stage in out for stage in STAGES)
