"""What a run measures, kept as it goes: a CSV of every iteration, and events for TensorBoard."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .checkpoint import CheckpointError, SaveError, write
from .data import require

COLUMNS = ("iteration", "epoch", "loss", "accuracy", "lr")
FILE = "iterations.csv"


class Metrics:
    """Loss, accuracy and rate of each iteration in `folder`; what an earlier run left behind `iteration` is dropped."""

    def __init__(self, folder: Path, iteration: int, tensorboard: bool) -> None:
        path = folder / FILE
        kept = [row for row in rows(path) if row["iteration"] <= iteration] if iteration else []
        lines = [",".join(COLUMNS), *(",".join(str(row[name]) for name in COLUMNS) for row in kept)]
        write(path, ("\n".join(lines) + "\n").encode())
        self._file = open(path, "a", newline="")  # noqa: SIM115  # closed by `close`
        self._csv = csv.writer(self._file, lineterminator="\n")
        self._events: Any = None
        if tensorboard:
            self._events = summary_writer()(str(folder / "events"), purge_step=iteration + 1)

    def add(self, row: Mapping[str, float]) -> None:
        """One iteration's `COLUMNS`."""
        self._csv.writerow([row[name] for name in COLUMNS])
        self._scalars("train", row, ("loss", "accuracy", "lr"))

    def tested(self, row: Mapping[str, float]) -> None:
        """After a test: its loss and accuracy, and the images/s of the epoch."""
        self._scalars("test", row, ("test_loss", "test_accuracy", "images_per_second"))

    def _scalars(self, group: str, row: Mapping[str, float], names: tuple[str, ...]) -> None:
        for name in names if self._events else ():
            self._events.add_scalar(f"{group}/{name.removeprefix('test_')}", row[name], row["iteration"])

    def flush(self) -> None:
        """Onto the disk. Raises SaveError."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise SaveError(f"cannot save {self._file.name}: {error.strerror or error}") from error
        if self._events:
            self._events.flush()

    def close(self) -> None:
        with suppress(OSError):  # what `flush` could not write
            self._file.close()
        if self._events:
            self._events.close()


def summary_writer() -> Any:
    """TensorBoard's class. Raises MissingPackageError."""
    return require("torch.utils.tensorboard", "writing events for TensorBoard", "tensorboard").SummaryWriter


def rows(path: Path) -> list[dict[str, Any]]:
    """What `Metrics` wrote, as numbers; a last line that was cut short is left out. Empty if there is no file.

    Raises CheckpointError for another file.
    """
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        found = list(csv.DictReader(file))
    complete = [row for row in found if None not in row.values() and "" not in row.values()]
    try:
        return [{name: (int if name in COLUMNS[:2] else float)(row[name]) for name in COLUMNS} for row in complete]
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
