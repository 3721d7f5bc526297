"""Every tile of every k x k kernel gives what the smallest one gives, which the ops' own tests hold against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conv2d_cases import Geometry
from conv2d_cases import Problem as Convolution
from device import Device
from op_cases import ops, same_bits
from test_conv2d_costs import CALLS
from torch import Tensor

from resnet_fused import plans
from resnet_fused.problems import Problem, capturing, name_of_tile

# More than one tile of pixels and of channels; with a stride the large tiles hold the halo of one slice.
CONVOLUTIONS = [
    Convolution(1, 72, 17, 19, 136, Geometry()),
    Convolution(2, 64, 11, 13, 96, Geometry((3, 5), 1, (1, 2), groups=4)),
    Convolution(2, 32, 19, 17, 32, Geometry(stride=2)),
]


def outputs_by_tile(op: str, arguments: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Of each tile's launches, largest tile first."""
    with capturing() as problems:
        getattr(ops, op)(**arguments)
    problem: Problem = problems[0]
    found = {}
    for _, plan, _workspace in problem.tiles(80):
        for name in problem.outputs:
            problem.tensors[name].fill_(torch.nan if problem.tensors[name].is_floating_point() else -1)
        plans.run(plan.steps, None)
        found[name_of_tile(plan)] = {name: problem.tensors[name].clone() for name in problem.outputs}
    return found


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=str)
def test_tiles_agree(convolution: Convolution, name: str) -> None:
    op, arguments = CALLS[name]
    found = Device("emulated").run(lambda given: outputs_by_tile(op, given), arguments(convolution))
    assert len(found) == 3
    *others, (_, smallest) = found.items()
    for tile, got in others:
        for output, want in smallest.items():
            if want.dtype == torch.float32 or op == "conv2d_wgrad":  # sums over pixels, which a tile cuts otherwise
                eps = 1e-5 if want.dtype == torch.float32 else torch.finfo(want.dtype).eps
                assert (got[output].double() - want.double()).norm() <= eps * want.double().norm(), (tile, output)
            else:
                assert same_bits(got[output], want), (tile, output)
