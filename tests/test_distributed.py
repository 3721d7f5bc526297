"""Norms shared by processes: two of them, by gloo on a CPU, run what is in `distributed_checks.py` side by side."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import check_modules, randomise
from distributed_checks import CHECKS, SLOW, WORLD, network, run_all, shared
from torch import nn

import resnet_fused as rf
from resnet_fused.recorder import recording

Errors = list[dict[str, str]]  # of each process, by check


def started(names: Sequence[str]) -> Errors:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.multiprocessing.spawn(run_all, (folder, names), WORLD)
        return [torch.load(f"{folder}/errors-{rank}") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def errors() -> Errors:
    return started([name for name in CHECKS if not name.startswith(SLOW)])


@pytest.mark.parametrize("name", [name for name in CHECKS if not name.startswith(SLOW)])
def test_two_processes(name: str, errors: Errors) -> None:
    for rank, found in enumerate(errors):
        assert name not in found, f"process {rank}: {found[name]}"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CHECKS if name.startswith(SLOW)])
def test_two_processes_slowly(name: str) -> None:
    assert started([name]) == [{}, {}]


@pytest.mark.parametrize("training", [True, False])
def test_without_process_groups_it_is_the_plain_norm(training: bool) -> None:
    block = randomise(rf.Bottleneck(16, 4)).train(training)
    own, x = shared(block), torch.randn(4, 16, 6, 6, requires_grad=True)
    with recording() as calls:
        own(x)
    assert [call.reason for call in calls] == [None]
    check_modules(own, nn.ModuleDict({"b": block})["b"], x)


def test_a_stem_without_process_groups() -> None:
    model = network()
    own = copy.deepcopy(model)
    rf.fuse_(own)
    check_modules(shared(own), model, torch.randn(4, 3, 32, 32))


def test_inference_folds_it() -> None:
    model, x = shared(network()).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(rf.optimize_for_inference(model, x)(x), model(x), rtol=1e-3, atol=1e-4)


def test_a_group_must_be_one() -> None:
    unit: Any = rf.functional.ConvBN(torch.randn(8, 8, 1, 1), group="world")
    with pytest.raises(TypeError, match="group is a str, expected a torch"):
        rf.functional.residual_block(torch.randn(2, 8, 4, 4), [unit])
