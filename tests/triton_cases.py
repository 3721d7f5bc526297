"""What the tests of the Triton kernels share: where they run, and the cases that only `-m slow` runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from device import COMPILED_TRITON, Device

DEVICES = ["interpreted", *COMPILED_TRITON]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Device:
    return Device(request.param)


def cases(some: Sequence[tuple], every: Sequence[tuple]) -> list[Any]:
    """Parameters, of which all but some are slow."""
    return [*some, *(pytest.param(*case, marks=pytest.mark.slow) for case in every if case not in some)]


def others(every: Sequence[Any], *some: Any) -> list[Any]:
    """Single parameters: all but some, as slow ones."""
    return [pytest.param(case, marks=pytest.mark.slow) for case in every if case not in some]
