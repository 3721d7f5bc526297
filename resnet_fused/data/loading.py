"""Batches in their order, by torch's DataLoader."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from .errors import DataError
from .pixels import SAMPLE, Pixels
from .views import HeldOutView, Split, stream


def order(images: int, seed: int, epoch: int, ranks: int, rank: int) -> list[int]:
    """The rows that process `rank` of `ranks` trains on in an epoch, shuffled: a function of these numbers alone."""
    key = stream(seed, epoch, 0).initial_seed() % 2**62
    sampler: DistributedSampler = DistributedSampler(
        range(images),  # type: ignore[arg-type]  # only its length is asked for
        num_replicas=ranks,
        rank=rank,
        seed=key,
        drop_last=True,
    )
    return list(sampler)


def in_batches(rows: Sequence[int], size: int, whole: bool = False) -> list[Sequence[int]]:
    """Slices of `size`; the last may be smaller, or is left out if they must be `whole`."""
    end = len(rows) // size * size if whole else len(rows)
    return [rows[i : i + size] for i in range(0, end, size)]


def batches(view: Dataset, rows: Sequence[Sequence[int]], workers: int = 0, pin: bool = False) -> Iterator[Any]:
    """What `view` gives for each list of rows, in order. Raises DataError for what the view returned as one."""
    loader: DataLoader = DataLoader(
        view,
        batch_sampler=rows,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin,
        worker_init_fn=_leave_interrupts,
        generator=torch.Generator(),  # without one, a seed is drawn from the global state at every start
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_interrupts(_worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; it is the main one's to stop the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def measure_pixels(images: Split, size: int, per_pixel: bool, workers: int = 0) -> Pixels:
    """Of the training images (at most 10,000 of them, evenly spaced), as a test's centre crop shows them."""
    step = max(1, images.count // SAMPLE)
    as_bytes = Pixels.given([0.0], [1 / 255])
    view = HeldOutView(images, as_bytes, size)
    rows = in_batches(range(0, images.count, step), 250)

    def read() -> Iterator[torch.Tensor]:
        for views, _ in batches(view, rows, workers):
            yield torch.stack([first for first, *_ in views])

    return Pixels.measured(read, per_pixel)
