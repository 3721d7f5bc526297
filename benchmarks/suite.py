"""How a benchmark runs: the variants of a case take turns, round by round; pytest-benchmark gets each one's times.

A bench file lists cases; `suite` makes of them a test for each variant and kind of work. The first test of a case has
all variants measured that were selected; the others find their times there. pytest-benchmark reads a clock that stands
still but for those times, so that its statistics and its JSON are of the interleaved rounds, and of a GPU's own time.

    RESNET_FUSED_BENCH_DEVICE=cpu|cuda    in the environment: what is measured (default: a GPU if there is one)

`extra_info` of a result: `ratio`, how many times faster than eager (median, lowest and highest of the rounds); `bytes`
and `flops`, counted: what the fused op reads and writes, and its products; of these `gbs` and `tflops`. On a GPU also
`floor`, the seconds that they take at the least (modelled: `machine.roof`), and its `share` of the time; `peak_bytes`,
allocated at most; `host_bound`, where the host was slower than the GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import machine
from benchmarks.variants import DTYPES, UnavailableError
from resnet_fused.costs import Machine
from resnet_fused.counting import counting
from resnet_fused.measure import Ratio
from resnet_fused.timing import Budget, CudaTimer, HostTimer, Part, Times, rounds_of

DEVICE = os.environ.get("RESNET_FUSED_BENCH_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE == "cuda"
torch.backends.cudnn.benchmark = True  # its quickest algorithm, for whoever asks it
TYPES = ("bf16", "fp16", "fp32") if ON_GPU else ("fp32", "bf16")  # the first is that of the short set
BATCH = 128 if ON_GPU else 8
LEAST_ROUNDS = 3
OURS = ("lean", "ours")  # variants by which bytes are counted
Build = Callable[[str], Sequence[Part]]  # of a variant, by name: its parts. Raises UnavailableError.


@dataclass(frozen=True, eq=False)
class Case:
    """One problem that several variants solve."""

    name: str
    dtype: str
    works: tuple[str, ...]  # what the parts of a round are; with a backward, "train" is the two together
    variants: tuple[str, ...]
    make: Callable[[], Build]
    quick: bool = False
    batch: int = BATCH
    size: int = 0  # elements of the input: which case is the smallest
    counts: bool = True  # whether bytes and FLOPs can be counted
    about: dict[str, Any] = field(default_factory=dict)
    rounds: int = 30
    seconds: float = 2.0  # after which no other round begins, but for LEAST_ROUNDS
    warmups: int = 3

    @property
    def id(self) -> str:
        return f"{self.name}-{self.dtype}"

    @property
    def kinds(self) -> tuple[str, ...]:
        return (*self.works, "train") if "backward" in self.works and "forward" in self.works else self.works


class Result(NamedTuple):
    """Of a variant and a kind of work."""

    seconds: list[float]  # of each round
    info: dict[str, Any]


class Measurement:
    """A case, measured when the first result is asked for."""

    def __init__(self, case: Case, wanted: Iterable[str]) -> None:
        self.case = case
        self._wanted = tuple(dict.fromkeys(("eager", *wanted)))

    def once(self, variant: str) -> None:
        """Runs a variant without timing it."""
        for part in self.case.make()(variant):
            part()

    def result(self, variant: str, work: str) -> Result | str:
        """The times and figures; why there are none where there is no such variant."""
        times, missing, about = self._measured
        if variant in missing:
            return missing[variant]
        case = self.case
        seconds = _seconds(case, times[variant], work)
        info = {"case": case.name, "variant": variant, "work": work, "dtype": case.dtype, "device": DEVICE,
                "batch": case.batch, **case.about, **about.get(variant, {})}  # fmt: skip
        if "eager" in times:
            info["ratio"] = Ratio.of(_seconds(case, times["eager"], work), seconds)._asdict()
        if counts := about.get("counts"):
            info |= _figures(case, {name: _of_work(case, own, work) for name, own in counts.items()}, median(seconds))
        return Result(seconds, info)

    @cached_property
    def _measured(self) -> tuple[dict[str, list[Times]], dict[str, str], dict[str, Any]]:
        case, about = self.case, {}
        build = case.make()
        built = {variant: _built(build, variant) for variant in self._wanted}
        missing = {variant: found for variant, found in built.items() if isinstance(found, str)}
        parts = {variant: found for variant, found in built.items() if not isinstance(found, str)}
        timer = CudaTimer() if ON_GPU else HostTimer()
        times = rounds_of(parts, timer, case.rounds, Budget(case.seconds), case.warmups, LEAST_ROUNDS)
        if case.counts:
            about["counts"] = _counts(parts)
        if ON_GPU:
            for variant, own in parts.items():
                bound = not all(t.ahead for t in times[variant])
                about[variant] = {"peak_bytes": _peak_memory(own), "host_bound": bound}
        return times, missing, about


def _built(build: Build, variant: str) -> Sequence[Part] | str:
    """Its parts, or why there are none."""
    try:
        return build(variant)
    except UnavailableError as reason:
        return str(reason)


def _of_work(case: Case, by_part: Sequence[float], work: str) -> float:
    return by_part[case.works.index(work)] if work in case.works else sum(by_part)


def _seconds(case: Case, times: list[Times], work: str) -> list[float]:
    return [_of_work(case, t.milliseconds, work) / 1e3 for t in times]


def _counts(parts: dict[str, Sequence[Part]]) -> dict[str, list[float]]:
    """Of each part: bytes, the inputs and outputs of the fused variant's ops once, and FLOPs of eager's products."""
    counts: dict[str, list[float]] = {}
    for variant in parts.keys() & {*OURS}:
        counts["bytes"] = []
        for part in parts[variant]:
            with counting() as counter:
                part()
            counts["bytes"].append(counter.moved.unique)
    if "eager" in parts:
        counts["flops"] = []
        for part in parts["eager"]:
            with FlopCounterMode(display=False) as counter:
                part()
            counts["flops"].append(counter.get_total_flops())
    return counts


def _peak_memory(parts: Sequence[Part]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for part in parts:
        part()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@cache
def roof() -> dict[str, Any]:
    return machine.roof(DEVICE, {name: DTYPES[name] for name in TYPES})


def _figures(case: Case, counts: dict[str, float], seconds: float) -> dict[str, Any]:
    figures: dict[str, Any] = dict(counts)
    if "bytes" in counts:
        figures["gbs"] = counts["bytes"] / seconds / 1e9
    if "flops" in counts:
        figures["tflops"] = counts["flops"] / seconds / 1e12
    if ON_GPU and counts.keys() == {"bytes", "flops"}:  # a CPU's caches keep what the rounds before have left there
        limit = Machine("", roof()["bandwidth"], roof()["peak"][case.dtype], 0)
        figures["floor"], _ = limit.floor(counts["bytes"], counts["flops"], 1)
        figures["share"] = figures["floor"] / seconds
    return figures


# --------------------------------------------------------------------------------------------------- as tests

_now = 0.0


def clock() -> float:
    """What pytest-benchmark reads."""
    return _now


def replayed(seconds: list[float]) -> Callable[[], None]:
    """A call that takes, by `clock`, the seconds of each round in turn."""
    rounds = iter(seconds)

    def call() -> None:
        global _now
        _now += next(rounds)

    return call


def suite(cases: Sequence[Case]) -> Callable[[Callable], Callable]:
    """Decorator: a test for each case, variant and kind of work; only quick cases are not slow."""
    values = [
        pytest.param(
            case, work, variant, id=f"{case.id}-{work}-{variant}", marks=[] if case.quick else [pytest.mark.slow]
        )
        for case in cases
        for work in case.kinds
        for variant in case.variants
    ]

    def decorate(test: Callable) -> Callable:
        test = pytest.mark.parametrize(("case", "work", "variant"), values)(test)
        return pytest.mark.benchmark(timer=clock)(test)

    return decorate
