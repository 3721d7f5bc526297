"""Packages of the `apps` extra, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingPackageError(ImportError):
    """An optional package is not installed; the message says how to get it."""


def require(module: str, purpose: str, package: str | None = None) -> ModuleType:
    """Imports `module`; raises MissingPackageError, in one line, where it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = package or module.split(".")[0]
        raise MissingPackageError(
            f"{purpose} needs {package}, which is not installed: pip install 'resnet_fused[apps]'"
        ) from error
