"""Commands, and types of their arguments."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch


def add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    """The parser of a command, among those that add_subparsers has made, whose help is what `run` says of itself."""
    sub = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
    sub.set_defaults(run=run)
    return sub


def with_device(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
    sub.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    return sub


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def positive_float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number above 0")
    return number


def checked_device(name: str) -> str:
    """Raises ValueError, in one line, for a device that is not there."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return name
