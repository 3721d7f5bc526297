"""The fixtures of the suites, and the one table that they print at their end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import machine
from benchmarks.suite import DEVICE, Case, Measurement, replayed, roof
from benchmarks.table import Row, print_table
from benchmarks.variants import UnavailableError

ROWS = pytest.StashKey[list[Row]]()
MEASUREMENTS = pytest.StashKey[dict[Case, Measurement]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.stash[MEASUREMENTS] = {}


@pytest.fixture
def measurement(request: pytest.FixtureRequest, case: Case) -> Measurement:
    """Of a case: one for all its tests, of the variants that were selected."""
    known = request.config.stash[MEASUREMENTS]
    if case not in known:
        calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
        known[case] = Measurement(case, [p["variant"] for p in calls if p.get("case") is case])
    return known[case]


@pytest.fixture
def timed(benchmark: Any, measurement: Measurement, work: str, variant: str, pytestconfig: pytest.Config) -> Callable:
    """Gives one variant's times to pytest-benchmark; runs it once where benchmarks are disabled."""

    def run() -> None:
        if benchmark.disabled:
            try:
                return measurement.once(variant)
            except UnavailableError as reason:
                pytest.skip(str(reason))
        result = measurement.result(variant, work)
        if isinstance(result, str):
            pytest.skip(result)
        benchmark.group = f"{measurement.case.id} {work}"
        benchmark.extra_info.update(result.info)
        benchmark.pedantic(replayed(result.seconds), rounds=len(result.seconds))
        pytestconfig.stash[ROWS].append(Row(measurement.case.id, work, variant, result.seconds, result.info))

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if rows := config.stash[ROWS]:
        terminalreporter.line("")
        print_table(rows, title=f"{DEVICE}, {torch.get_num_threads()} threads, {machine.malloc_setting()}")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What the report needs to know of where a result comes from."""
    machine_info["resnet_fused"] = {
        **machine.machine(), "processor": machine.processor(), "device": DEVICE, "threads": torch.get_num_threads(),
        "malloc": machine.malloc_setting(), "versions": machine.versions(), "roof": roof(),
    }  # fmt: skip
