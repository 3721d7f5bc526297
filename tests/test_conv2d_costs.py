"""The costs of the k x k convolutions' launches against what the emulator counts: see test_costs.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conv2d_cases import (
    Geometry,
    Problem,
    backward_arguments,
    bn_act_arguments,
    dgrad_arguments,
    forward_arguments,
)
from device import Device, emulated_launches
from op_cases import ops

from resnet_fused import plans
from resnet_fused.costs import costs_of
from resnet_fused.problems import capturing

SECTOR = 32
HALF = torch.bfloat16
# Channels in multiples of 16 and pixels of 8, all of them read: every tensor is made of whole sectors. Ends of tiles
# are within tiles.
PROBLEMS = [
    Problem(1, 48, 12, 10, 144, Geometry()),
    Problem(2, 32, 16, 8, 80, Geometry(stride=2)),
    Problem(2, 64, 8, 8, 64, Geometry((5, 5), 1, (2, 2))),
    Problem(1, 64, 8, 16, 128, Geometry(groups=4)),
    Problem(2, 32, 8, 8, 48, Geometry((3, 3), 1, (2, 2), (2, 2))),
]
IMAGES = [
    Problem(2, 3, 16, 16, 64, Geometry((7, 7), 2, (3, 3))),
    Problem(1, 3, 16, 16, 48, Geometry()),
    Problem(1, 5, 16, 16, 80, Geometry((7, 7), 2, (3, 3))),
]


def wgrad_arguments(p: Problem, prologue: str, affine: bool) -> dict[str, Any]:
    forward = forward_arguments(p, HALF, affine)
    given = backward_arguments(p, HALF, prologue)
    given |= {"x": forward["x"], "x_scale": forward["scale"], "x_shift": forward["shift"]}
    return given | {"kernel_size": list(p.geometry.kernel), "geometry": p.geometry.numbers}


Arguments = Callable[[Problem], dict[str, Any]]
CALLS: dict[str, tuple[str, Arguments]] = {
    "fprop": ("conv2d", lambda p: forward_arguments(p, HALF)),
    "fprop, plain": ("conv2d", lambda p: forward_arguments(p, HALF, affine=False, stats=False)),
    "bn_act": ("conv2d_bn_act", lambda p: bn_act_arguments(p, HALF)),
    "dgrad, gate": ("conv2d_dgrad", lambda p: dgrad_arguments(p, HALF, "bn gate", "gate")),
    "dgrad, add": ("conv2d_dgrad", lambda p: dgrad_arguments(p, HALF, "bn mask", "add mask")),
    "wgrad": ("conv2d_wgrad", lambda p: wgrad_arguments(p, "none", False)),
    "wgrad, affine": ("conv2d_wgrad", lambda p: wgrad_arguments(p, "bn mask", True)),
}
OF_IMAGES: dict[str, tuple[str, Arguments]] = {
    "fprop": ("conv2d", lambda p: forward_arguments(p, HALF, affine=False)),
    "wgrad": ("conv2d_wgrad", lambda p: wgrad_arguments(p, "none", False)),
    "wgrad, bn": ("conv2d_wgrad", lambda p: wgrad_arguments(p, "bn gate", False)),
}


def check(op: str, arguments: dict[str, Any]) -> None:
    device = Device("emulated")

    def run(given: dict[str, Any]) -> Any:
        with capturing() as problems:
            getattr(ops, op)(**given)
        (problem,) = problems
        return problem

    problem = device.run(run, arguments)
    launches = emulated_launches()
    plan = plans.plan(op, problem.fields, 80, {name: t.data_ptr() for name, t in problem.tensors.items()})
    costs = costs_of(op, problem.fields, problem.tensors, plan)
    assert [launch.symbol for launch in launches] == [step.symbol for step in plan.steps]
    got = [(SECTOR * launch.stats.sectors_read, SECTOR * launch.stats.sectors_written) for launch in launches]
    assert [(cost.read, cost.written) for cost in costs] == got
    assert [cost.executed for cost in costs] == [launch.stats.flops for launch in launches]
    assert all(cost.flops <= cost.executed for cost in costs)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_convolutions(problem: Problem, name: str) -> None:
    op, arguments = CALLS[name]
    check(op, arguments(problem))


@pytest.mark.parametrize("name", OF_IMAGES)
@pytest.mark.parametrize("problem", IMAGES, ids=str)
def test_convolutions_of_images(problem: Problem, name: str) -> None:
    op, arguments = OF_IMAGES[name]
    check(op, arguments(problem))


# Instructions of the widest tile's main loop for each of the tensor cores', at most.
LOOPS: dict[str, tuple[str, Arguments, float]] = {
    "fprop, plain": (*CALLS["fprop, plain"], 2.75),
    "fprop, affine": (*CALLS["fprop"], 3.1),
    "dgrad, plain": ("conv2d_dgrad", lambda p: dgrad_arguments(p, HALF, "none", "none"), 2.9),
    "dgrad, bn": ("conv2d_dgrad", lambda p: dgrad_arguments(p, HALF, "bn", "none"), 3.55),
    "dgrad, bn gate": ("conv2d_dgrad", lambda p: dgrad_arguments(p, HALF, "bn gate", "gate"), 3.75),
    "dgrad, bn mask": ("conv2d_dgrad", lambda p: dgrad_arguments(p, HALF, "bn mask", "add"), 3.8),
}


@pytest.mark.parametrize("name", LOOPS)
def test_instructions_of_the_main_loop(name: str) -> None:
    """What more channels take; registers are moved in PTX only."""
    op, arguments, most = LOOPS[name]
    counts = []
    for channels in (128, 192):
        c, k = (channels, 128) if op == "conv2d" else (128, channels)
        with plans.wanted_tile(1):
            Device("emulated").run(
                lambda given: getattr(ops, op)(**given), arguments(Problem(1, c, 8, 32, k, Geometry()))
            )
        launch = next(launch for launch in emulated_launches() if launch.symbol.endswith("256x128x32"))
        counts.append((launch.stats.instructions["mma"], _executed(launch)))
    (mma, every), (more_mma, more) = counts
    assert (more - every) / (more_mma - mma) <= most


def _executed(launch: Any) -> int:
    return sum(n for kind, n in launch.stats.instructions.items() if kind != "move")
