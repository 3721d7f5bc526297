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


def cases(some: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """Parameters, of which the others are slow."""
    return [*some, *(pytest.param(*other, marks=pytest.mark.slow) for other in others if other not in some)]
