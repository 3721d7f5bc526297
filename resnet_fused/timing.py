"""Timing of calls that are compared: in turn, on the GPU with a cold cache, within a budget of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

import torch

Part = Callable[[], object]


@dataclass
class Budget:
    """Seconds that a section has."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    @property
    def left(self) -> float:
        return self.seconds - (self.clock() - self.started)


class Times(NamedTuple):
    milliseconds: list[float]  # of each part
    ahead: bool  # whether the host had queued everything before the GPU began: else its own time is in there


class CudaTimer:
    """GPU time of calls, each with a cold L2.

    The GPU spins while the host queues what is timed, so that events see the GPU's own time and not how fast Python
    launches. How long it has to spin is found out: if the GPU was faster, twice as long.
    """

    MOST_CYCLES = 1 << 28  # about 0.15 s

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.empty(2 * max(cache, 32 << 20), dtype=torch.int8, device="cuda")
        self._cycles = 1 << 21

    def __call__(self, parts: Sequence[Part]) -> Times:
        while True:
            spans = [(self._mark(), self._mark()) for _ in parts]
            torch.cuda.synchronize()
            torch.cuda._sleep(self._cycles)
            for part, (begin, end) in zip(parts, spans, strict=True):
                self._flush.zero_()
                begin.record()
                part()
                end.record()
            ahead = not spans[0][0].query()
            torch.cuda.synchronize()
            if ahead or self._cycles >= self.MOST_CYCLES:
                return Times([begin.elapsed_time(end) for begin, end in spans], ahead)
            self._cycles *= 2

    @staticmethod
    def _mark() -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)


class HostTimer:
    """Wall-clock time of calls on the CPU."""

    def __call__(self, parts: Sequence[Part]) -> Times:
        times = []
        for part in parts:
            begin = time.perf_counter()
            part()
            times.append(1e3 * (time.perf_counter() - begin))
        return Times(times, True)


def rounds_of(
    calls: Mapping[str, Sequence[Part]],
    timer: Callable[[Sequence[Part]], Times],
    rounds: int,
    budget: Budget,
    warmups: int = 3,
    least: int = 1,
) -> dict[str, list[Times]]:
    """By name: the times of each round.

    The calls take turns, every other round backwards; at least `least` rounds, and no other when the budget is used up.
    """
    for parts in calls.values():  # warm up: compile, choose algorithms, fill the allocator
        for _ in range(warmups):
            timer(parts)
    seen: dict[str, list[Times]] = {name: [] for name in calls}
    order = list(calls)
    for round_ in range(rounds):
        if round_ >= least and budget.left <= 0:
            break
        for name in order:
            seen[name].append(timer(calls[name]))
        order.reverse()
    return seen


def interleaved(
    calls: Mapping[str, Sequence[Part]], timer: Callable[[Sequence[Part]], Times], rounds: int, budget: Budget
) -> dict[str, tuple[list[float], int, bool]]:
    """By name: the median of each part, how many rounds that is of, and whether the host was always ahead.

    Rounds are those of `rounds_of`.
    """
    return {
        name: (
            [median(part) for part in zip(*(t.milliseconds for t in times), strict=True)],
            len(times),
            all(t.ahead for t in times),
        )
        for name, times in rounds_of(calls, timer, rounds, budget).items()
    }
