"""What `tune` has measured, on disk: a JSON file for each machine and set of versions, under the platform's cache.

    RESNET_FUSED_CACHE=<folder>    in the environment: the folder, instead of the platform's

A file that is damaged, or of another machine or version, is left aside with a warning. Files are written whole and
then renamed, under a lock: two processes that tune at once lose nothing.
"""

from __future__ import annotations

import json
import os
import platform
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock  # torch depends on it

from . import __version__
from .backend import LEAN_PLANS, Choice
from .data import MissingPackageError, require

VARIABLE = "RESNET_FUSED_CACHE"
FORMAT = 1  # of the files


class Entry(NamedTuple):
    """What was measured for one problem: who is quickest, and seconds by candidate, the quickest first."""

    winner: str
    seconds: dict[str, float]

    @property
    def runner_up(self) -> str | None:
        return next((name for name in self.seconds if name != self.winner), None)

    @classmethod
    def of(cls, seconds: Mapping[str, float]) -> Entry:
        ordered = dict(sorted(seconds.items(), key=lambda item: item[1]))
        return cls(next(iter(ordered)), ordered)

    @classmethod
    def read(cls, value: Any) -> Entry:
        """From a file. Raises ValueError."""
        seconds = value.get("seconds") if isinstance(value, dict) else None
        if not isinstance(seconds, dict) or value.get("winner") not in seconds:
            raise ValueError("an entry without a winner")
        if not all(isinstance(s, float) and s > 0 for s in seconds.values()):
            raise ValueError("times that are none")
        if value["winner"] not in LEAN_PLANS:
            Choice.parse(value["winner"])
        return cls(value["winner"], dict(seconds))


def machine(device: torch.device) -> dict[str, str]:
    """What a measurement depends on beside the problem."""
    versions = {"torch": torch.__version__, "triton": _version("triton"), "resnet_fused": __version__}
    if device.type != "cuda":
        return {"device": f"{platform.machine()} {_processor()}, {torch.get_num_threads()} threads", **versions}
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    return {"device": f"{properties.name} ({capability})", "driver": _driver(), **versions}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _driver() -> str:
    get = getattr(torch._C, "_cuda_getDriverVersion", None)
    return str(get()) if get else "unknown"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def folder() -> Path:
    """Where the files are. Raises MissingPackageError without the package that knows the platform's cache."""
    if given := os.environ.get(VARIABLE):
        return Path(given)
    return Path(require("platformdirs", "finding the cache folder").user_cache_dir("resnet_fused", appauthor=False))


@dataclass
class Table:
    """The entries of one machine, by problem."""

    machine: dict[str, str]
    path: Path | None  # None: there is no folder to keep them in
    entries: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def load(cls, device: torch.device) -> Table:
        """That of a device, empty where there is none."""
        if device.type not in ("cpu", "cuda"):
            return cls({}, None)
        own = machine(device)
        try:
            path = folder() / f"{_file_name(own)}-{FORMAT}.json"
        except MissingPackageError:
            return cls(own, None)
        return cls(own, path, _read(path, own))

    def prepare(self) -> None:
        """Raises OSError where the file could not be written."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock"):
                pass

    def choice(self, problem: str) -> Choice | None:
        """The winner of a problem of an op; None where it was not measured."""
        entry = self.entries.get(problem)
        return None if entry is None else Choice.parse(entry.winner)

    def add(self, problem: str, entry: Entry) -> None:
        """Into the table and its file, beside what others have written there meanwhile. Raises OSError."""
        self.entries[problem] = entry
        if self.path is None:
            return
        self.prepare()
        with FileLock(f"{self.path}.lock"):
            self.entries = self.entries | _read(self.path, self.machine) | {problem: entry}
            entries = {name: e._asdict() for name, e in sorted(self.entries.items())}
            content = {"format": FORMAT, "machine": self.machine, "entries": entries}
            partial = self.path.with_suffix(f".{os.getpid()}.partial")
            try:
                partial.write_text(json.dumps(content, indent=1))
                partial.replace(self.path)
            finally:
                partial.unlink(missing_ok=True)


def _file_name(own: Mapping[str, str]) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", "-".join(own.values()))


def _read(path: Path, own: Mapping[str, str]) -> dict[str, Entry]:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"not of format {FORMAT}")
        if content.get("machine") != own:
            raise ValueError("of another machine or version")
        return {name: Entry.read(value) for name, value in content["entries"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        aside = path.with_suffix(".bad")
        with suppress(OSError):  # a folder of somebody else's
            path.replace(aside)
        warnings.warn(f"tuned plans in {path} are left aside, in {aside.name}: {error}", stacklevel=4)
        return {}


_tables: dict[tuple[torch.device, int], Table] = {}


def table(device: torch.device) -> Table:
    """The table of a device, and of so many threads of a CPU, read once a process. Nothing is known of others."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    key = device, torch.get_num_threads() if device.type == "cpu" else 0
    if key not in _tables:
        _tables[key] = Table.load(device)
    return _tables[key]


@contextmanager
def forgotten() -> Iterator[None]:
    """Within the block, and after it, tables are read anew."""
    _tables.clear()
    try:
        yield
    finally:
        _tables.clear()
