"""The command line: `python -m resnet_fused info | explain | tune | train | eval | analyse | demo`.

Exit codes: 0 success, 1 failure (one line on stderr), 2 wrong usage, 130 interrupted (143: by SIGTERM).
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.metadata
import math
import os
import platform
import signal
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from . import __version__, apps, costs, counting, kernels, models, network, units
from .arguments import add_command, checked_device, positive_float, positive_int, with_device
from .console import explanation_table, make_console, make_table
from .convert import fuse_
from .ops.pointwise import as_on_a_gpu
from .train import DivergenceError
from .tune import BACKENDS, ROUNDS, tune

FAILURES = (OSError, ImportError, ValueError, DivergenceError, torch.OutOfMemoryError)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt as interrupt:
        return 128 + getattr(interrupt, "number", signal.SIGINT)
    except BrokenPipeError:  # the reader of our output has left, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except FAILURES as error:
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"resnet_fused {args.command}: error: {message}", file=sys.stderr)
        return 1


# ---------------------------------------------------------------- commands


def info(args: argparse.Namespace) -> int:
    """Versions, devices and what the extension was built for."""
    print(f"resnet_fused  {__version__}")
    print(f"python        {platform.python_version()} on {platform.machine()}")
    print(f"torch         {torch.__version__} (CUDA {torch.version.cuda or 'none'})")
    for package in ("triton", "torchvision", "timm"):
        print(f"{package:<13} {_version(package)}")
    cuda, isa = _extension()
    onednn = "oneDNN" if torch.backends.mkldnn.is_available() else "native"
    print(f"extension     {'CUDA and CPU' if cuda else 'CPU-only'} build")
    print(f"cpu backend   {isa} kernels, {onednn} convolutions, {torch.get_num_threads()} threads")
    print(f"cuda backend  {_gpus() if cuda else 'not built'}")
    if args.kernels is not None:
        _print_kernels(args.kernels)
    if args.traffic and args.model:
        _print_network(args.model, args.batch, args.size)
    elif args.traffic:
        _print_traffic()
    return 0


def explain(args: argparse.Namespace) -> int:
    """How each unit of a network runs, and why."""
    if args.units:
        return _explain_units(args)
    from .explain import explain as explain_model

    model, x = _model_and_batch(args)
    model.train(args.training)
    with torch.set_grad_enabled(args.training), as_on_a_gpu() if args.as_on_a_gpu else nullcontext():
        explanation = explain_model(model, x)
    title = f"{args.model}, {'training' if args.training else 'inference'}, {args.dtype}"
    make_console().print(explanation_table(explanation, title))
    return 0


def _model_and_batch(args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    device, dtype = checked_device(args.device), DTYPES[args.dtype]
    model = models.create(args.model).to(device, dtype)
    channels, side, _ = models.image_shape(model)
    size = side if channels == 1 else args.size or side  # MNIST's networks take digits of one size
    return model, torch.randn(args.batch, channels, size, size, device=device, dtype=dtype)


def tune_command(args: argparse.Namespace) -> int:
    """Measures who runs each op of a network quickest here, and remembers it."""
    model, x = _model_and_batch(args)
    model = model.to(memory_format=torch.channels_last)
    fuse_(model, args.memory)
    options = {"rounds": args.rounds, "again": args.again, "seconds": args.seconds, "backends": args.backends}
    report = tune(model.train(not args.inference), x, **options, progress=True)
    title = f"{args.model}, batch {args.batch}, {args.dtype}: milliseconds, medians of {args.rounds} rounds"
    _print_table(title, ("problem", "winner", "ms", "runner-up", "ms", ""), report.cells())
    for problem, reason in report.left_out.items():
        print(f"left out: {problem}: {reason}")
    print(f"{len(report.measured)} measured, {len(report.entries)} known, in {report.path}")
    return 0


def _explain_units(args: argparse.Namespace) -> int:
    if args.model not in network.MODELS or DTYPES[args.dtype] == torch.float32:
        raise ValueError("--units takes a ResNet and a 16-bit --dtype, for which there are matrix kernels")
    device = torch.device(checked_device(args.device))
    measured = device if device.type == "cuda" else None
    trace = units.trace(args.model, args.batch, args.size or 224, args.memory, DTYPES[args.dtype], args.arch, measured)
    _print_plain(trace.columns, trace.cells(), left=4)
    print(trace)
    return 0


def demo_command(args: argparse.Namespace) -> int:
    """Agreement, speed, memory and training on real images."""
    from .demo import demo

    return 0 if demo(args.out, make_console()) else 1


# ---------------------------------------------------------------- parsing


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line instead of the whole usage."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="resnet_fused", description="Fused ResNet blocks for PyTorch.")
    parser.add_argument("--version", action="version", version=f"resnet_fused {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = partial(add_command, commands)
    sub = command("info", info)
    sub.add_argument(
        "--kernels",
        nargs="*",
        choices=kernels.MULTIPROCESSORS,
        metavar="ARCH",
        help=f"compile the CUDA kernels and list their registers and occupancy (default: {' '.join(kernels.ARCHES)})",
    )

    sub.add_argument(
        "--traffic", action="store_true", help="the bytes that blocks move in a training step, by two counts"
    )
    sub.add_argument("--model", choices=network.MODELS, help="with --traffic: of a whole network, by stage")
    sub.add_argument("--batch", type=positive_int, default=256)
    sub.add_argument("--size", type=positive_int, default=224, help="side of the images, pixels")

    sub = with_device(command("explain", explain))
    sub.add_argument("--model", choices=models.MODELS, default="resnet50")
    sub.add_argument("--batch", type=positive_int, default=8)
    sub.add_argument("--size", type=positive_int, help="side of the images, pixels (default: the network's)")
    sub.add_argument("--dtype", choices=DTYPES, default="float32")
    sub.add_argument("--training", action="store_true", help="with batch statistics and gradients")
    sub.add_argument("--as-on-a-gpu", action="store_true", help="plan for the kernels (16-bit types)")
    sub.add_argument(
        "--units", action="store_true", help="every kernel of a training step on a GPU: plan, cost and what binds it"
    )
    sub.add_argument("--memory", choices=network.MEMORIES, default="lean", help="with --units")
    sub.add_argument(
        "--arch", type=int, choices=costs.MACHINES, default=80, help="with --units: its compute capability"
    )

    sub = with_device(command("tune", tune_command))
    sub.add_argument("--model", choices=models.MODELS, default="resnet50")
    sub.add_argument("--batch", type=positive_int, default=32)
    sub.add_argument("--size", type=positive_int, help="side of the images, pixels (default: the network's)")
    sub.add_argument("--dtype", choices=DTYPES, default="float32")
    sub.add_argument("--memory", choices=network.MEMORIES, default="lean")
    sub.add_argument("--inference", action="store_true", help="forward alone, with given statistics")
    sub.add_argument("--rounds", type=positive_int, default=ROUNDS, help="of each measurement (default: %(default)s)")
    sub.add_argument("--seconds", type=positive_float, default=math.inf, help="after which no other problem is begun")
    sub.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    sub.add_argument("--again", action="store_true", help="also what is known already")

    apps.add_commands(commands)

    sub = command("demo", demo_command)
    default = Path("runs") / "mnist"
    sub.add_argument("--out", type=Path, default=default, help="folder for results (default: %(default)s)")
    return parser


# ---------------------------------------------------------------- the machine


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _extension() -> tuple[bool, str]:
    """(whether CUDA kernels are built in, the instruction set of the CPU kernels)."""
    module = importlib.import_module(f"{__package__}._C")
    library = ctypes.CDLL(str(module.__file__))
    best = 99  # a limit that limits nothing
    isa = ("baseline", "AVX2", "AVX-512")[library.resnet_fused_limit_isa(best)]
    return bool(library.resnet_fused_has_cuda()), isa


def _print_kernels(arches: list[str]) -> None:
    columns, rows = kernels.table(arches or kernels.ARCHES)
    _print_table("registers of a thread and theoretical occupancy", columns, rows)


def _print_traffic() -> None:
    title = "training step in bf16, forward + backward, in activations of the narrow width"
    _print_table(title, counting.COLUMNS, counting.comparison())


def _print_network(model: str, batch: int, size: int) -> None:
    for title, columns, rows in network.Comparison.of(model, batch, size).tables():
        _print_table(f"{model}, a training step in bf16 of {batch} images at {size}: GiB {title}", columns, rows)


def _print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """By rich where it is installed, else in plain columns."""
    try:
        table = make_table(*columns, title=title)
    except ImportError:
        return _print_plain(columns, rows)
    for row in rows:
        table.add_row(*row)
    make_console().print(table)


def _print_plain(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> None:
    """The first `left` columns are words."""
    lines = [columns, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "no GPU found"
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{p.name} (sm_{p.major}{p.minor})" for p in properties)


if __name__ == "__main__":
    sys.exit(main())
