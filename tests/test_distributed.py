"""Norms shared by processes: two of them, by gloo on a CPU, run what `distributed_checks.py` and
`distributed_networks.py` list side by side."""

from __future__ import annotations

import copy
import datetime
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import check_modules, randomise
from distributed_networks import SLOW
from distributed_tools import CHECKS, WORLD, network, shared
from torch import nn

import resnet_fused as rf
from resnet_fused.recorder import recording

Errors = list[dict[str, str]]  # of each process, by check


def run_all(rank: int, folder: str, names: Sequence[str]) -> None:
    """Process `rank`: the checks' errors, by name, into a file."""
    torch.set_num_threads(1)
    warnings.filterwarnings("error", "Grad strides|.*custom operator")  # DDP's, and of outputs that share memory
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=WORLD, timeout=timeout)
    errors = {}
    for name in names:
        torch.manual_seed(0)
        torch.compiler.reset()
        try:
            CHECKS[name]()
        except Exception:
            errors[name] = traceback.format_exc()
            print(f"process {rank}, {name}: {errors[name]}", file=sys.stderr)  # the other may not live to tell
    torch.save(errors, Path(folder) / f"errors-{rank}")
    dist.destroy_process_group()


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
