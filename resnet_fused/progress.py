"""The progress bar of a training run."""

from __future__ import annotations

import math
import time
from typing import Any

from .data import require


class Bar:
    """Loss and accuracy on the training images (means of about 20 iterations), images/s, time left.

    Without a console, in a process that does not write, it shows nothing.
    """

    def __init__(self, console: Any, images: int, done: int, classes: int) -> None:
        self._console = console
        if console is None:
            return
        progress = require("rich.progress", "training")
        self._progress = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TextColumn("loss {task.fields[loss]:.3f}  accuracy {task.fields[accuracy]:.1%}"),
            progress.TextColumn("{task.fields[rate]:.0f} images/s"),
            progress.TimeRemainingColumn(),
            console=console,
        )
        start = {"loss": math.log(classes), "accuracy": 1 / classes, "rate": 0.0}
        self._task = self._progress.add_task("epoch 1", total=images, completed=done, **start)
        self._done = done

    def __enter__(self) -> Bar:
        if self._console is not None:
            self._progress.start()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console is not None:
            self._progress.stop()

    def advance(self, epoch: int, loss: float, accuracy: float, images: int) -> None:
        """After an iteration of so many images."""
        if self._console is None:
            return
        task, decay = self._progress.tasks[0], 0.95
        self._progress.update(
            self._task,
            description=f"epoch {epoch}",
            advance=images,
            loss=decay * task.fields["loss"] + (1 - decay) * loss,
            accuracy=decay * task.fields["accuracy"] + (1 - decay) * accuracy,
            rate=(task.completed + images - self._done) / (time.perf_counter() - self._start),
        )

    def print(self, line: str) -> None:
        if self._console is not None:
            self._progress.console.print(line, highlight=False, soft_wrap=True)
