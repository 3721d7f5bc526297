"""Interleaved ratios against eager PyTorch and torch.compile: the figures that README quotes.

    python -m benchmarks.ratios --model resnet50 --batch 16 --work train --dtype fp32

All variants live in one process and take turns, round by round, so that a machine that slows down or speeds up
favours none. Printed: the median time of each, and for ours the median, lowest and highest of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import os

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.variants import DTYPES, INFERENCE_VARIANTS, VARIANTS, WORK, build, photos_like
from resnet_fused.data import require
from resnet_fused.measure import Ratio, interleave


def malloc_setting() -> str:
    """Which of the two allocator settings this process runs under."""
    kept = os.environ.get("MALLOC_MMAP_MAX_") == "0"
    return "malloc keeps its pages" if kept else "default malloc"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ratios", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50", help="a torchvision ResNet")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--work", choices=WORK, default="train")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args()
    torch.manual_seed(0)
    model = getattr(require("torchvision.models", "the benchmark"), args.model)()
    x = photos_like(args.batch, args.size)
    allowed = INFERENCE_VARIANTS if args.work == "inference" else VARIANTS
    names = [v for v in args.variants if v in allowed]
    calls = {v: build(model, v, args.work, DTYPES[args.dtype], x) for v in names}
    times = interleave(calls, args.rounds)
    title = f"{args.model} {args.work} {args.dtype}, batch {args.batch} at {args.size}, "
    table = Table(title=title + f"{torch.get_num_threads()} threads, {malloc_setting()}, {args.rounds} rounds")
    table.add_column("variant")
    table.add_column("median ms", justify="right")
    baselines = [b for b in ("eager", "compile") if b in times]
    for b in baselines:
        table.add_column(f"{b} / this", justify="right")
    for name, seconds in times.items():
        median = sorted(seconds)[len(seconds) // 2]
        table.add_row(name, f"{median * 1e3:.1f}", *(str(Ratio.of(times[b], seconds)) for b in baselines))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
