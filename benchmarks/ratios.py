"""Interleaved ratios against eager PyTorch and torch.compile: the figures that README quotes.

    python -m benchmarks.ratios --model resnet50 --batch 16 --work train --dtype fp32

All variants live in one process and take turns, round by round, so that a machine that slows down or speeds up
favours none. Printed: the median time of each, and for ours the median, lowest and highest of the rounds' ratios. On a
GPU (`--device cuda`) it is the GPU's own time, with a cold L2. `--shares` also runs each variant of a CPU once under
the profiler: how much of it is spent in the library's convolutions, and how near these come to a large product's speed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import malloc_setting, roof
from benchmarks.variants import (
    DTYPES,
    ENGINES,
    INFERENCE_VARIANTS,
    VARIANTS,
    WORK,
    UnavailableError,
    build,
    photos_like,
)
from resnet_fused.data import require
from resnet_fused.measure import Ratio
from resnet_fused.network import MODELS
from resnet_fused.timing import Budget, CudaTimer, HostTimer, Part, rounds_of


class Share(NamedTuple):
    """Where the time of one call goes, in seconds; ours also runs some products of matrices as convolutions."""

    convolutions: float
    total: float

    @classmethod
    def of(cls, call: Part) -> Share:
        """By ATen's operators: of an engine, which has none, the convolutions are 0."""
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            call()
        events = profiled.key_averages()
        inside = sum(e.self_cpu_time_total for e in events if "_convolution" in e.key or "convolution_" in e.key)
        return cls(inside / 1e6, sum(e.self_cpu_time_total for e in events) / 1e6)


def print_shares(calls: dict[str, list[Part]], dtype: str, console: Console) -> None:
    """Of every variant; and of eager, whose FLOPs are those of the network, the convolutions' speed."""
    for name, (call,) in calls.items():
        share = Share.of(call)
        if not share.convolutions:
            continue
        line = f"{name}: {share.convolutions / share.total:.0%} of {share.total:.2f} s in convolutions"
        if name == "eager":
            with FlopCounterMode(display=False) as counter:
                call()
            speed = counter.get_total_flops() / share.convolutions
            peak = roof("cpu", {dtype: DTYPES[dtype]})["peak"][dtype]
            line += f", {speed / 1e9:.0f} GFLOP/s, {speed / peak:.2f} of a large product's {peak / 1e9:.0f}"
        console.print(line)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ratios", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, metavar="MODEL", default="resnet50", help="a torchvision ResNet")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--work", choices=WORK, default="train")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--variants", nargs="+", choices=(*VARIANTS, *ENGINES), default=list(VARIANTS))
    parser.add_argument("--shares", action="store_true", help="also where the time goes (CPU)")
    args = parser.parse_args(argv)
    if args.shares and args.device != "cpu":
        parser.error("--shares is of a CPU: expected --device cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but there is no GPU here")
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    model = require("torchvision.models", "the benchmark").get_model(args.model)
    x = photos_like(args.batch, args.size, args.device)
    allowed = INFERENCE_VARIANTS if args.work == "inference" else VARIANTS
    names = [v for v in args.variants if v in allowed]
    if not names:
        parser.error(f"--variants has none that does {args.work}, expected some of {', '.join(allowed)}")
    try:
        calls = {v: [build(model, v, args.work, DTYPES[args.dtype], x)] for v in names}
    except UnavailableError as reason:
        parser.exit(1, f"{parser.prog}: error: {reason}\n")
    timer = CudaTimer() if args.device == "cuda" else HostTimer()
    found = rounds_of(calls, timer, args.rounds, Budget(float("inf")), warmups=1)
    times = {v: [t.milliseconds[0] for t in rounds] for v, rounds in found.items()}
    title = f"{args.model} {args.work} {args.dtype}, batch {args.batch} at {args.size}, "
    table = Table(title=title + f"{torch.get_num_threads()} threads, {malloc_setting()}, {args.rounds} rounds")
    table.add_column("variant")
    table.add_column("median ms", justify="right")
    baselines = [b for b in ("eager", "compile") if b in times]
    for b in baselines:
        table.add_column(f"{b} / this", justify="right")
    for name, own in times.items():
        table.add_row(name, f"{median(own):.1f}", *(str(Ratio.of(times[b], own)) for b in baselines))
    console = Console(width=110)
    console.print(table)
    if args.shares:
        print_shares(calls, args.dtype, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
