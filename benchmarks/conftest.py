"""`--benchmark-group-by` is preset: one table for each shape and kind of work, a row for each variant."""

from __future__ import annotations

import pytest


@pytest.fixture
def timed(benchmark):
    """Times a call with few rounds (a step takes milliseconds to seconds); compiles before it counts."""

    def run(call, group: str, rounds: int = 5):
        benchmark.group = group
        benchmark.pedantic(call, rounds=rounds, warmup_rounds=2)

    return run
