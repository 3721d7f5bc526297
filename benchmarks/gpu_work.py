"""What `gpu_check.py` has done on the GPU, each section in a process of its own: a fault or a hang costs one of them.

    python -m benchmarks.gpu_work SECTION --out FILE --seconds N

FILE is JSON, and complete after every row, so that what a killed process has done is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent import futures
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import resnet_fused as rf
from benchmarks.shapes import BLOCKS, BlockShape
from benchmarks.variants import Step
from resnet_fused import kernels, plans
from resnet_fused.problems import capturing
from resnet_fused.recorder import recording
from resnet_fused.timing import Budget, CudaTimer, Part, Times, interleaved
from resnet_fused.traffic import Bytes, block_bytes

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

BOTTLENECKS = tuple(shape for shape in BLOCKS if shape.kind == "bottleneck")
ROUNDS = 15
TUNE_ROUNDS = 5


class Log:
    """A section's rows, in a file that is complete after each."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows, self.summary = path, [], ""
        self._write()

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        self._write()

    def finish(self, summary: str) -> None:
        self.summary = summary
        self._write()

    def _write(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({"summary": self.summary, "rows": self.rows}))
        partial.replace(self.path)


# ------------------------------------------------------------------------------------------------------ blocks


def make_step(shape: BlockShape, variant: str, batch: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Step:
    """variant: eager, compile, or a fused block's `memory`."""
    torch.manual_seed(0)
    block = shape.build().train()
    if variant in ("lean", "fast"):
        rf.fuse_(block, memory=variant)  # type: ignore[arg-type]
    block = block.to(device, dtype, memory_format=torch.channels_last)
    x = torch.randn(batch, shape.inplanes, shape.size, shape.size, device=device).to(dtype)
    return Step(block, x.contiguous(memory_format=torch.channels_last).requires_grad_(), variant == "compile")


def counted_bytes(step: Step) -> tuple[Bytes, Bytes]:
    """(eager's, ours) of a fused block's step, by traffic.py."""
    with recording() as calls:
        step.forward()
    return block_bytes(calls[0])


def benchmark(
    log: Log, budget: Budget, timer: Callable[[Sequence[Part]], Times], batch: int, device: str, variants: Sequence[str]
) -> None:
    """Forward and backward of every bottleneck, in turn by all variants."""
    shapes = list(BOTTLENECKS)
    done = 0
    for i, shape in enumerate(shapes):
        if budget.left <= 0:
            break
        steps = {v: make_step(shape, v, batch, device) for v in variants}
        fused = next(step for v, step in steps.items() if v in ("lean", "fast"))
        eager, ours = counted_bytes(fused)
        share = Budget(budget.left / (len(shapes) - i), budget.clock)
        for variant, (times, rounds, ahead) in interleaved(
            {v: step.parts for v, step in steps.items()}, timer, ROUNDS, share
        ).items():
            moved = ours if variant in ("lean", "fast") else eager
            log.add(
                block=shape.name, batch=batch, variant=variant, rounds=rounds, host_bound=not ahead,
                forward_ms=times[0], backward_ms=times[1],
                forward_gbs=moved.forward / times[0] / 1e6, backward_gbs=moved.backward / times[1] / 1e6,
            )  # fmt: skip
        done += 1
    log.finish(f"{done} of {len(shapes)} blocks, {', '.join(variants)}")


def peak_memory(log: Log, budget: Budget, batch: int) -> None:
    """Bytes that a training step of ResNet-50 in bfloat16 allocates at most, beside model, gradients and input."""
    from torchvision.models import resnet50

    for variant in ("eager", "lean", "fast"):
        if budget.left <= 0:
            break
        torch.manual_seed(0)
        model = resnet50().cuda().to(memory_format=torch.channels_last).train()
        if variant != "eager":
            rf.fuse_(model, memory=variant)  # type: ignore[arg-type]
        x = torch.randn(batch, 3, 224, 224, device="cuda").contiguous(memory_format=torch.channels_last)
        labels = torch.arange(batch, device="cuda")
        for _ in range(2):  # the first allocates gradients and workspaces that stay
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with torch.autocast("cuda", torch.bfloat16):
                loss = F.cross_entropy(model(x), labels)
            loss.backward()
        torch.cuda.synchronize()
        log.add(model="resnet50", batch=batch, variant=variant, bytes=torch.cuda.max_memory_allocated() - before)
        del model, x, loss
        torch.cuda.empty_cache()
    log.finish(f"resnet50, batch {batch} at 224, bf16 autocast")


# -------------------------------------------------------------------------------------------------------- tune


def tune_blocks(log: Log, budget: Budget, timer: Callable[[Sequence[Part]], Times], batch: int, device: str) -> None:
    """`tune` on every bottleneck, but for Triton's kernels, which take too long to compile. The winners are kept."""
    other = aten = 0
    for shape in BOTTLENECKS:
        if budget.left <= 0:
            break
        step = make_step(shape, "lean", batch, device)
        options = {"rounds": TUNE_ROUNDS, "seconds": budget.left, "backends": ("cuda", "aten"), "again": True}
        report = rf.tune(step.block, step.x, timer=timer, **options)  # type: ignore[arg-type]
        for problem in report.measured:
            entry = report.entries[problem]
            default = entry.seconds.get("cuda", entry.seconds[entry.winner])
            ratio = default / entry.seconds[entry.winner]
            log.add(
                problem=problem, winner=entry.winner, ratio=ratio, ms={k: 1e3 * s for k, s in entry.seconds.items()}
            )
            other += ratio >= 1.05
            aten += entry.winner == "aten" and ratio >= 1.05
    found = f"{len(log.rows)} problems; another plan is 5 % faster on {other}, ATen's on {aten} of them"
    log.finish(found if log.rows else "no problem was timed")


# ---------------------------------------------------------------------------------- static checks, every kernel


def static_checks(log: Log, budget: Budget, arch: str) -> bool:
    """Whether the machine code of every kernel has none of what `Kernel.faults` finds."""
    pool = futures.ThreadPoolExecutor(os.cpu_count() or 1)  # whatever `make` allows itself: the time is short
    waiting = {pool.submit(kernels.compile_source, source, arch): source for source in kernels.sources()}
    count = 0
    try:
        for done in futures.as_completed(waiting, timeout=max(budget.left, 0)):
            del waiting[done]
            for kernel in done.result():
                count += 1
                if kernel.faults:
                    log.add(kernel=kernel.symbol, arch=arch, faults=kernel.faults)
    except futures.TimeoutError:  # before Python 3.11 not the builtin one
        for source in waiting.values():
            log.add(kernel=source, arch=arch, faults=["not compiled in time"])
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    log.finish(f"{count} kernels for {arch}, {len(log.rows)} with faults")
    return not log.rows


# Channels of a block's input and of its narrow convolutions, and the stride: a shortcut of each kind.
SMALL = [BlockShape(*kind, 7) for kind in (("bottleneck", 32, 8, 1), ("bottleneck", 40, 8, 2), ("basic", 8, 8, 1),
                                           ("basic", 16, 24, 2))]  # fmt: skip


def every_kernel(log: Log, device: str, arch: int, dtypes: Sequence[torch.dtype] = tuple(DTYPES.values())) -> None:
    """Runs the kernels once on small shapes: blocks of every kind and the stem, then the blocks' problems by every
    tile."""
    for dtype in dtypes:
        for shape, memory in product(SMALL, ("lean", "fast") if dtype == dtypes[0] else ("lean",)):
            step = make_step(shape, memory, 2, device, dtype)
            with capturing() as problems:
                step.run()
                with torch.no_grad():
                    step.block.eval()(step.x)
            launches = 0
            for problem in problems:
                for _, plan, _workspace in problem.tiles(arch):
                    plans.run(plan.steps, problem.device)
                    launches += len(plan.steps)
            log.add(block=shape.name, memory=memory, dtype=str(dtype), launches_by_tile=launches)
        x = torch.randn(2, 16, 9, 9, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
        y = rf.BNReLUMaxPool(16).to(device, dtype)(x.requires_grad_())
        torch.autograd.grad(y, x, torch.ones_like(y))
    if device == "cuda":
        torch.cuda.synchronize()
    log.finish(f"{len(log.rows)} blocks, {sum(row['launches_by_tile'] for row in log.rows)} launches by tile")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_work", description=__doc__.splitlines()[0])
    parser.add_argument("section", choices=("static", "kernels", "benchmark", "memory", "tune"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--arch", required=True, help="of the GPU, as sm_80")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--compile", action="store_true")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    log, budget = Log(args.out), Budget(args.seconds)
    arch = int(args.arch.removeprefix("sm_"))
    torch.backends.cudnn.benchmark = True
    if args.section == "static":
        return 0 if static_checks(log, budget, args.arch) else 1
    if args.section == "kernels":
        every_kernel(log, "cuda", arch)
    elif args.section == "benchmark":
        benchmark(log, budget, CudaTimer(), args.batch, "cuda", ["eager", *["compile"] * args.compile, "lean"])
    elif args.section == "memory":
        peak_memory(log, budget, args.batch)
    else:
        tune_blocks(log, budget, CudaTimer(), args.batch, "cuda")
    return 0


if __name__ == "__main__":
    sys.exit(main())
