"""What `explain --units` lists: every convolution of a network, its kernels or the reason for none."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from resnet_fused import network, tuned, units
from resnet_fused.__main__ import main
from resnet_fused.costs import MACHINES
from resnet_fused.ops.dispatch import COMPOSED
from resnet_fused.tuned import Entry
from resnet_fused.units import Row, Trace, folded

NETWORKS = ("resnet18", "resnet50", "resnet101", "resnext50_32x4d", "wide_resnet50_2")


@functools.cache
def traced(name: str, memory: str = "lean") -> Trace:
    return units.trace(name, 256, memory=memory)


def convolutions(name: str) -> Iterator[tuple[str, nn.Conv2d]]:
    for key, module in network.create(name, torch.bfloat16).named_modules():
        if isinstance(module, nn.Conv2d):
            yield key, module


@pytest.mark.parametrize("name", NETWORKS)
def test_every_convolution_has_a_kernel_or_a_reason(name: str) -> None:
    by_unit: dict[str, list[Row]] = {}
    for row in traced(name).rows:
        by_unit.setdefault(row.unit, []).append(row)
    assert list(by_unit) == [key for key, _ in convolutions(name)]
    for key, conv in convolutions(name):
        rows = by_unit[key]
        assert {row.backward for row in rows} == {False, True}
        for row in rows:
            if row.launch.plan is None:
                assert row.reason
                assert conv.kernel_size != (1, 1), "a 1x1 convolution has a kernel"
            else:
                assert row.launch.plan.reason == ""
                assert row.launch.plan.steps
            assert all(cost.moved > 0 for cost in row.launch.costs)


def families(trace: Trace, unit: str) -> list[str]:
    plans = [row.launch.plan for row in trace.rows if row.unit == unit]
    return [plan.steps[0].symbol.split("_bf16")[0] for plan in plans if plan is not None]


def test_units_of_a_block() -> None:
    lean, fast = traced("resnet50"), traced("resnet50", "fast")
    assert families(lean, "layer1.1.conv3") == ["gram", "expand_affine", "conv1x1_wgrad_masked_affine", "expand_dgrad"]
    assert families(lean, "layer2.0.downsample.0") == [
        "gram_strided",
        "conv1x1_wgrad_masked_strided",
        "expand_dgrad_projection",
    ]
    assert families(fast, "layer1.1.conv3") == [
        "conv1x1_fprop_affine",
        "bn_act",
        "bn_act_backward_reduce",
        "conv1x1_wgrad_backward_affine",
        "conv1x1_dgrad_backward_gate",
    ]
    assert families(lean, "conv1") == [
        "conv2d_few_fprop_4x2",
        "bn_act_pool",
        "bn_act_pool_backward",
        "bn_act_backward_reduce",
        "conv2d_few_wgrad_backward_4",
    ]
    assert families(lean, "layer1.1.conv2") == ["conv2d_fprop", "conv2d_wgrad_backward_affine", "conv2d_dgrad_gate"]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_launches_move_what_the_ops_move(name: str) -> None:
    """But for partial sums on the one side, and small matrices and the head on the other."""
    steps, _ = network.steps_of(network.create(name, torch.bfloat16, "lean"), 256, 224, torch.bfloat16)
    assert traced(name).moved == pytest.approx(sum(step.moved.unique for step in steps), rel=0.05)


@pytest.mark.parametrize("arch", MACHINES)
def test_command(arch: int, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["explain", "--units", "--model", "resnet18", "--batch", "8", "--size", "64", "--dtype", "bfloat16"]
    assert main([*command, "--as-on-a-gpu", "--arch", str(arch)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["unit", "input", "pass"]
    assert any("conv2d_fprop_bf16" in line for line in lines)
    assert any("gram_strided_bf16" in line for line in lines)
    assert MACHINES[arch].name in last


@pytest.mark.parametrize("flags", [["--model", "mnist_resnet", "--dtype", "float16"], ["--dtype", "float32"]])
def test_what_has_no_matrix_kernels(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--units", *flags]) == 1
    assert "--units takes a ResNet and a 16-bit --dtype" in capsys.readouterr().err


def test_blocks_that_are_alike_fold() -> None:
    rows = folded(traced("resnet101").rows)
    names = list(dict.fromkeys(row.unit for row in rows))
    assert "layer3.0.conv1" in names
    assert "layer3.1-22.conv2" in names
    assert sum(row.unit.startswith("layer3.1-22") for row in rows) == sum(
        row.unit.startswith("layer3.7.") for row in traced("resnet101").rows
    )


def test_what_auto_chooses_is_shown() -> None:
    """By the model of costs, with the runner-up; ops that have nothing to choose show nothing."""
    rows = [row.launch for row in traced("resnet50").rows if row.launch.plan is not None]
    products = [launch for launch in rows if launch.op in COMPOSED]
    assert all(re.fullmatch(r"(cuda|aten) .* ms, (aten|cuda) .* ms \(modelled\)", launch.auto) for launch in products)
    assert {launch.auto for launch in rows if launch not in products} == {""}
    assert products[0].auto in "\n".join(" ".join(cells) for cells in traced("resnet50").cells())


def test_what_was_measured_is_shown() -> None:
    class Everything(dict):  # type: ignore[type-arg]
        def get(self, key: str, default: object = None) -> Entry:
            return Entry.of({"triton:2": 1e-3, "cuda": 2e-3})

    device = torch.device("cpu")
    tuned.table(device).entries = Everything()
    shown = {row.launch.auto for row in units.trace("resnet18", 8, 32, device=device).rows}
    assert shown == {"", "triton:2 1.000 ms, cuda 2.000 ms (tuned)"}
