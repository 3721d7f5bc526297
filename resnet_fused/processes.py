"""The processes of a run: one, or those that torchrun started; and the signals that end it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class ProcessError(OSError):
    """Another process of the run has failed, or they do not find together."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run, and its device."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether it is the one that writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise, over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Each process's, by rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def wrap(self, model: nn.Module, sync_bn: bool) -> nn.Module:
        """`model`, averaging its gradients over the processes, and with `sync_bn` its batch statistics too."""
        if self.size == 1:
            return model
        replica = DistributedDataParallel(model, [self.device] if self.device.type == "cuda" else None)
        if sync_bn:  # behind it: on a CPU it refuses them in what it is given, as they do not run there unless fused
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return replica

    @staticmethod
    def without_averaging(model: nn.Module) -> AbstractContextManager:
        """Within it, gradients are only added up."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def leads() -> bool:
    """Whether this process, of those that torchrun started, is the first; also where it did not."""
    return int(os.environ.get("RANK", 0)) == 0


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes that torchrun started, each with a GPU of its own on "cuda" (NCCL; else Gloo); or this one alone.

    Raises ProcessError where they do not find together, and in each when another has failed.
    """
    size = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    if size == 1:
        yield Processes(torch.device(device))
        return
    local = int(os.environ["LOCAL_RANK"])
    own = torch.device(f"cuda:{local}" if device == "cuda" else device)
    if own.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ProcessError(f"process {local} finds {torch.cuda.device_count()} GPUs, expected one for each process")
        torch.cuda.set_device(own)
    try:
        dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
        yield Processes(own, dist.get_rank(), size)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        raise ProcessError(f"process {os.environ['RANK']} has lost the others: {error}") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class Interrupted(KeyboardInterrupt):
    """A signal has ended the run, which has saved what it had."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Signals:
    """Within it SIGINT and SIGTERM are noted, so that a run ends between two iterations.

    A later Ctrl-C, from a second on, ends it at once: torchrun and the terminal may both pass the first one on.
    """

    def __init__(self) -> None:
        self.received = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received and now - self._since > 1:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self._since = number, now
