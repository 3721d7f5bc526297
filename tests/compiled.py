"""The kernels of csrc/ as compiled, for the emulator: parsed once for all tests of a process."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from resnet_fused import kernels

if TYPE_CHECKING:
    from ptx import Module


@functools.cache
def module(source: str) -> Module:
    """Of a file of csrc/."""
    from ptx import Module  # not earlier: the emulator compiles itself when it is first imported

    return Module(kernels.ptx(source, "sm_80"))
