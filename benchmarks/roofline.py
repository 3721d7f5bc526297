"""The least time that a network's training step and inference can take on a GPU, unit by unit: eager's and ours.

    python -m benchmarks.roofline --gpu h100 --model resnet50 --batch 256 --dtype bf16

Modelled: no kernel moves its bytes faster than the memory's bandwidth, or multiplies faster than the tensor cores'
peak, so that its floor is the longer of the two, and that of kernels one after the other is the sum. Bytes and FLOPs
are counted from the kernels that run for a network on the meta device, where nothing is computed:

    ours     every launch of our kernels, forward and backward, by its plan (`resnet_fused.units`); at inference those
             of the fused network with given statistics. In fp32 convolutions are ATen's between our passes, and a unit
             of which a GPU's shared memory holds no kernel is eager's
    eager    every op of ATen: a convolution's forward, dgrad and wgrad each; a batch norm in training reads its input
             twice; as `resnet_fused.network` counts passes

An op belongs to the unit of the convolution before it, in the backward pass to that of the next one. Left out in both:
launches, what stays in L2 from one kernel to the next, vectors and small matrices, the loss and the optimizer. The head
is eager's in both.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from benchmarks.gpus import GPUS, Gpu, find_gpu
from benchmarks.variants import DTYPES
from resnet_fused import units
from resnet_fused.console import make_console, make_table
from resnet_fused.costs import Machine
from resnet_fused.counting import Counter
from resnet_fused.functional import Memory
from resnet_fused.network import MEMORIES, MODELS, STAGES, create, images, stages_of

HEAD, TOTAL = "fc", "total"  # the head: with the pool before it
WORKS = ("training", "inference")


class Kernel(NamedTuple):
    """One that runs, of eager's or of ours."""

    unit: str  # name of its convolution, or HEAD
    backward: bool
    moved: float  # bytes
    flops: float

    def floor(self, machine: Machine) -> tuple[float, str]:
        """(seconds, what binds)"""
        return machine.floor(self.moved, self.flops, 1)


class _Eager(Counter):
    """The kernels of ATen's ops, each with its unit."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.backward = self.head = False
        self._names, self._unit = names, ""
        self._waiting: list[tuple[float, float]] = []  # of the backward pass, until their convolution's comes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.moved.passes
        out = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._opname
        if name == "convolution":
            result = out.contiguous(memory_format=torch.channels_last)  # which the meta device forgets
            self._unit = self._names[_storage(args[1])]
            self._convolution("fprop", args[0], args[1], result)
        elif name == "convolution_backward":
            dy, x, weight, mask = *args[:3], args[-1]
            self._unit = self._names[_storage(weight)]
            self.settle()
            for kind, wanted in zip(("dgrad", "wgrad"), mask, strict=False):
                if wanted:
                    self._convolution(kind, x, weight, dy)
        elif moved := self.moved.passes - before:
            count = flop_registry.get(func.overloadpacket)
            self._add(moved, count(*args, **(kwargs or {}), out_val=out) if count else 0)
        return out

    def _convolution(self, kind: str, x: Tensor, weight: Tensor, out: Tensor) -> None:
        (cost,) = units.aten_launch(kind, x, weight, out).costs
        self.kernels.append(Kernel(self._unit, self.backward, cost.moved, cost.flops))

    def _add(self, moved: float, flops: float) -> None:
        if self.backward and not self.head:
            self._waiting.append((moved, flops))
        else:
            self.kernels.append(Kernel(HEAD if self.head else self._unit, self.backward, moved, flops))

    def settle(self) -> None:
        """Gives what waits to the unit of now."""
        self.kernels += [Kernel(self._unit, True, *own) for own in self._waiting]
        self._waiting = []


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def eager_kernels(name: str, batch: int, size: int, dtype: torch.dtype, training: bool) -> list[Kernel]:
    """Those of torchvision's ResNet `name`."""
    model = create(name, dtype).train(training)
    convs = {_storage(m.weight): key for key, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    eager, x = _Eager(convs), images(batch, size, dtype)
    graphs = []  # alive to the end, so that no storage comes twice
    with torch.autograd.set_multithreading_enabled(False), torch.set_grad_enabled(training):
        for stage, run in zip(STAGES, stages_of(model), strict=True):
            eager.head = stage == "head"
            with eager:
                eager.backward = False
                y = run(x)
                eager.backward = True
                if training:
                    inputs = [*([x] if graphs else []), *model.parameters()]  # images have no gradient
                    torch.autograd.grad(y, inputs, torch.empty_like(y), True, allow_unused=True)
            eager.settle()
            graphs.append(y)
            x = y.detach().requires_grad_(training)
    return eager.kernels


def our_kernels(
    eager: Sequence[Kernel],
    name: str,
    batch: int,
    size: int,
    dtype: torch.dtype,
    training: bool,
    memory: Memory,
    arch: int,
) -> list[Kernel]:  # fmt: skip
    """Those of the fused network; eager's where it has none."""
    rows = units.trace(name, batch, size, memory, dtype, arch, training=training).rows
    without = {(row.unit, row.backward) for row in rows if not row.launch.costs}
    ours = [Kernel(r.unit, r.backward, c.moved, c.flops) for r in rows for c in r.launch.costs]
    kept = [k for k in ours if (k.unit, k.backward) not in without]
    return kept + [k for k in eager if k.unit == HEAD or (k.unit, k.backward) in without]


class Floor(NamedTuple):
    """Of a unit's kernels, one after the other."""

    seconds: float
    moved: float
    flops: float
    bound: str  # what binds most of the time

    @classmethod
    def of(cls, kernels: Sequence[Kernel], machine: Machine) -> Floor:
        by_bound: dict[str, float] = {}
        for kernel in kernels:
            seconds, bound = kernel.floor(machine)
            by_bound[bound] = by_bound.get(bound, 0) + seconds
        binds = max(by_bound, key=by_bound.__getitem__) if by_bound else ""
        return cls(sum(by_bound.values()), sum(k.moved for k in kernels), sum(k.flops for k in kernels), binds)


@dataclass(frozen=True)
class Roofline:
    """A network's floors on one GPU by (work, variant), work being of WORKS, and by unit, TOTAL the last."""

    gpu: Gpu
    title: str
    floors: dict[tuple[str, str], dict[str, Floor]]

    columns = ("unit", *("eager us", "ours us", "ratio", "ours: bound") * 2)

    @classmethod
    def of(
        cls, gpu: Gpu, name: str, batch: int, size: int = 224, dtype: str = "bf16", memory: Memory = "lean"
    ) -> Roofline:
        """Of torchvision's ResNet `name`; nothing is computed. memory: of our training step."""
        machine, floors = gpu.machine(dtype), {}
        for work in WORKS:
            run = (name, batch, size, DTYPES[dtype], work == "training")
            eager = eager_kernels(*run)
            ours = our_kernels(eager, *run, memory, gpu.arch)
            order = dict.fromkeys(k.unit for k in sorted(eager, key=lambda k: k.unit == HEAD))
            for variant, kernels in (("eager", eager), ("ours", ours)):
                by_unit = {unit: Floor.of([k for k in kernels if k.unit == unit], machine) for unit in order}
                floors[work, variant] = by_unit | {TOTAL: Floor.of(kernels, machine)}
        return cls(gpu, f"{name} ({memory}), batch {batch} at {size}, {dtype}", floors)

    def cells(self) -> Iterator[list[str]]:
        """A row a unit and the total: of a training step, then of an inference."""
        for unit in self.floors["training", "eager"]:
            row = [unit]
            for work in WORKS:
                eager, ours = (self.floors[work, variant][unit] for variant in ("eager", "ours"))
                ratio = f"{eager.seconds / ours.seconds:.2f}x" if ours.seconds else ""  # with another unit's kernel
                row += [f"{eager.seconds * 1e6:.1f}", f"{ours.seconds * 1e6:.1f}", ratio, ours.bound]
            yield row

    def summary(self) -> Iterator[str]:
        """A line for each work."""
        for work in WORKS:
            eager, ours = (self.floors[work, variant][TOTAL] for variant in ("eager", "ours"))
            yield (
                f"modelled: {work} takes eager {eager.seconds * 1e3:.2f} ms or more ({_counted(eager)}), ours "
                f"{ours.seconds * 1e3:.2f} ms or more ({_counted(ours)}): {eager.seconds / ours.seconds:.2f}x"
            )


def _counted(floor: Floor) -> str:
    return f"{floor.moved / 2**30:.2f} GiB, {floor.flops / 1e12:.2f} TFLOP"


def _gpu(text: str) -> Gpu:
    try:
        return find_gpu(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", type=_gpu, default="h100", help=f"one of {', '.join(GPUS)} (default: h100)")
    parser.add_argument("--model", choices=MODELS, metavar="MODEL", default="resnet50", help="a torchvision ResNet")
    parser.add_argument("--batch", type=_positive, default=256)
    parser.add_argument("--size", type=_positive, default=224, help="side of the images, pixels")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--memory", choices=MEMORIES, default="lean", help="of our training step")
    args = parser.parse_args(argv)
    roofline = Roofline.of(args.gpu, args.model, args.batch, args.size, args.dtype, args.memory)
    gpu = args.gpu
    print(
        f"{gpu.name}: {gpu.bandwidth / 1e12:.2f} TB/s, {gpu.peak[args.dtype] / 1e12:.1f} TFLOP/s dense {args.dtype}"
        f"{' (TF32)' * (args.dtype == 'fp32')}, L2 {gpu.l2 >> 20} MiB, {gpu.multiprocessors} SMs (published)"
    )
    table = make_table(*roofline.columns, title=f"modelled floors: {roofline.title}; a training step | an inference")
    table.columns[0].no_wrap = True
    for row in roofline.cells():
        table.add_row(*row)
    make_console().print(table)
    print(*roofline.summary(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
