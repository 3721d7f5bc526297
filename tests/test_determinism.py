"""Two runs give the same bits: every op and whole blocks, whatever the order in which warps run; on a GPU, again."""

from __future__ import annotations

import pytest
import torch
from conftest import observe_module, randomise
from device import DEVICES, Device
from op_cases import activation, same_bits
from test_device import block
from test_ops_registration import op_names, samples
from torch import Tensor
from torch.utils._pytree import tree_leaves

import resnet_fused as rf

OPS = torch.ops.resnet_fused
KERNEL_DEVICES = [name for name in DEVICES if name != "cpu"]
SEEDS = (0, 7)  # of the order of the warps


@pytest.fixture(params=KERNEL_DEVICES)
def device(request: pytest.FixtureRequest) -> Device:
    return Device(request.param)


def assert_same(runs: list[dict[str, Tensor]]) -> None:
    first, *others = runs
    assert first
    for other in others:
        different = [name for name, t in first.items() if not same_bits(t.detach(), other[name].detach())]
        assert different == []


def launches_kernels(name: str, arguments: tuple) -> bool:
    """Channels in multiples of 8, of which the matrix kernels are made; a single pixel is a sample of the checks."""
    matrices = [t for t in tree_leaves(arguments) if isinstance(t, Tensor) and t.dim() == 4]
    return name not in MATRIX_OPS or all(t.shape[0] % 8 == 0 or t.shape[1] % 8 == 0 for t in matrices)


MATRIX_OPS = {"conv1x1", "conv1x1_dgrad", "conv1x1_wgrad", "gram", "expand", "expand_dgrad"}
MATRIX_OPS |= {"conv2d", "conv2d_bn_act", "conv2d_dgrad", "conv2d_wgrad"}
# Blocks are below: their samples are planned for the CPU's compositions.
NAMES = [name for name in op_names() if not name.startswith("residual_block")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_ops(name: str, dtype: torch.dtype, device: Device) -> None:
    if name in MATRIX_OPS and dtype == torch.float32:
        dtype = torch.float16  # the types that their kernels take
    ran = 0
    for arguments in samples(name, dtype):
        if not launches_kernels(name, arguments):
            continue
        ran += 1
        runs = []
        for seed in SEEDS:
            with torch.no_grad():
                results = device.run(lambda *a: tree_leaves(getattr(OPS, name)(*a)), *arguments, seed=seed)
            runs.append({str(i): t for i, t in enumerate(results)})
        assert_same(runs)
    assert ran


@pytest.mark.parametrize("memory", ["lean", "fast"])
@pytest.mark.parametrize("kind", ["identity", "projection", "stride 2"])
def test_a_training_step(kind: str, memory: str, device: Device) -> None:
    """Output, every gradient and the running statistics of a Bottleneck."""
    torch.manual_seed(0)
    fused = randomise(block(rf, "Bottleneck", kind)).bfloat16()
    fused.memory = memory
    state = {name: t.clone() for name, t in fused.state_dict().items()}
    x = activation(6, 32, 15, 13, torch.bfloat16).requires_grad_()
    dy = torch.randn_like(fused(x).detach())
    runs = []
    for seed in SEEDS:
        fused.load_state_dict(state)
        runs.append(device.run(observe_module, fused, x, dy, seed=seed))
    assert_same(runs)
