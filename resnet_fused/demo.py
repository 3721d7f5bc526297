"""`python -m resnet_fused demo`: the package on real images, against eager PyTorch, in under five minutes.

Agreement with float64, speed and memory of torchvision's ResNet-50 on eight photographs, and a network
trained on MNIST digits. Every claim that can fail is a `Check`, and one that fails makes the demo fail.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from . import measure
from .agreement import Agreement, compare
from .checkpoint import network, read
from .console import explanation_table, make_table
from .convert import fuse_
from .data import mnist_5k, photos, require
from .data.views import HeldOutView
from .evaluate import neighbour_accuracy, score
from .explain import explain
from .inference import optimize_for_inference
from .recipe import read as read_recipe
from .train import train

PHOTOS, SIZE = 8, 224
SEED = 0
ROUNDS = 5


class Check(NamedTuple):
    """One line of the summary; `passed` is None where nothing is claimed."""

    what: str
    result: str
    passed: bool | None = None


def demo(folder: Path, console) -> bool:
    """Runs every part, prints the summary, and returns whether every check passed."""
    model, x, labels = _photo_model()
    checks: list[Check] = []
    for part in (
        show_agreement(model, x, labels, console),
        show_plans_and_speed(model, x, labels, console),
        show_training(folder, console),
    ):
        checks.extend(part)
    console.rule("[bold]Summary")
    table = make_table("", "result", "")
    marks = {True: "[green]passed", False: "[red]FAILED", None: ""}
    for check in checks:
        table.add_row(check.what, check.result, marks[check.passed])
    console.print(table)
    return all(check.passed is not False for check in checks)


def _photo_model() -> tuple[nn.Module, Tensor, Tensor]:
    """A seeded ResNet-50 whose running statistics have seen the photographs [8, 3, 224, 224]."""
    torch.manual_seed(SEED)
    model = require("torchvision.models", "the demo").resnet50().to(memory_format=torch.channels_last)
    x = photos(PHOTOS, SIZE).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for view in (x, x.flip(3), x.roll(16, 2)):
            model(view)
    return model, x, torch.arange(PHOTOS)


# ---------------------------------------------------------------- agreement


def show_agreement(model: nn.Module, x: Tensor, labels: Tensor, console) -> Iterator[Check]:
    """Errors of eager and fused against float64, in training and in eval mode."""
    console.rule("[bold]1. Agreement: ResNet-50 on real photographs, fp32 against float64")
    fused = copy.deepcopy(model)
    report = fuse_(fused)
    console.print(f"{len(report.fused)} of {len(report.rows)} blocks and stems fused", highlight=False)
    console.print("In bounds: an error of at most twice eager's, give or take rounding.", highlight=False)
    for training in (True, False):
        mode = "training" if training else "eval"
        agreements = compare(model, fused, x, labels, training)
        console.print(_agreement_table(agreements, f"{mode} mode: relative error norms"))
        for agreement in agreements:
            n, bad = len(agreement.errors), agreement.failures
            eager, ours = agreement.medians
            yield Check(
                f"{agreement.kind}, {mode} mode",
                f"{n - len(bad)} of {n} in bounds; median {ours:.1e}, eager {eager:.1e}",
                not bad,
            )
    # Rounding flips no ReLU here, so that a difference, however small, would be a mistake.
    few = x[:4, :, ::2, ::2].double()
    agreements = compare(copy.deepcopy(model).double(), fused.double(), few, labels[:4], True, floor=1e-11)
    n, worst = sum(len(a.errors) for a in agreements), max(a.worst("fused").fused for a in agreements)
    yield Check(
        "the same in float64, 4 photographs",
        f"{n} tensors equal to {worst:.0e}",
        not any(a.failures for a in agreements),
    )


def _agreement_table(agreements: list[Agreement], title: str):
    table = make_table("", "median", "worst", "where", title=title)
    for agreement in agreements:
        for which, middle in zip(("eager", "fused"), agreement.medians, strict=True):
            worst = agreement.worst(which)
            table.add_row(f"{agreement.kind}, {which}", f"{middle:.1e}", f"{getattr(worst, which):.1e}", worst.name)
        for error in agreement.failures[:3]:
            figures = f"eager {error.eager:.1e}", f"fused {error.fused:.1e}"
            table.add_row("[red]out of bounds", *figures, error.name)
    return table


# ---------------------------------------------------------------- plans, speed, memory


def show_plans_and_speed(model: nn.Module, x: Tensor, labels: Tensor, console) -> Iterator[Check]:
    """What runs how, then times and memory against eager channels_last."""
    console.rule("[bold]2. Plans, speed and memory, against eager channels_last")
    variants = {"eager": copy.deepcopy(model)}
    for memory in ("lean", "fast"):
        variants[f"fused, {memory}"] = copy.deepcopy(model)
        fuse_(variants[f"fused, {memory}"], memory=memory)
    explanation = explain(variants["fused, lean"].train(), x)
    console.print(explanation_table(explanation, "training step, memory='lean'"))

    steps = {name: measure.training_step(m.train(), x, labels) for name, m in variants.items()}
    times = measure.interleave(steps, ROUNDS)
    console.print(_time_table(times, f"training step, {len(x)} photographs ({_threads()})"))
    for name in list(times)[1:]:
        ratio = measure.Ratio.of(times["eager"], times[name])
        yield Check(f"training step, {name}", f"{ratio} eager's speed")

    yield from _show_memory(variants, x, console)

    inference = _inference_calls(model, x)
    times = measure.interleave(inference, 2 * ROUNDS)
    console.print(_time_table(times, f"inference, {len(x)} photographs ({_threads()})"))
    yield Check("inference", f"{measure.Ratio.of(times['eager'], times['optimized'])} eager's speed")
    error = _relative(inference["optimized"](), inference["eager"]())
    yield Check("inference, optimized against eager", f"relative difference {error:.1e}", error < 1e-4)


def _inference_calls(model: nn.Module, x: Tensor) -> dict:
    eager = copy.deepcopy(model).eval()
    optimized = optimize_for_inference(copy.deepcopy(model).eval(), x)

    def call(network: nn.Module):
        def forward() -> Tensor:
            with torch.inference_mode():
                return network(x)

        return forward

    return {"eager": call(eager), "optimized": call(optimized)}


def _show_memory(variants: dict[str, nn.Module], x: Tensor, console) -> Iterator[Check]:
    """Bytes saved for backward, and the peak of one training step in a process of its own."""
    table = make_table("", "saved for backward", "peak of a step", "of the process", title="memory, training")
    saved, peaks = {}, {}
    for name, model in variants.items():
        known = [*model.parameters(), *model.buffers()]
        saved[name] = measure.saved_bytes(partial(model, x), exclude=known)
        peaks[name] = measure.peak_memory(_variant(name), len(x), x.shape[2])
        peak = peaks[name]
        table.add_row(name, *(_mib(size) for size in (saved[name], peak.step, peak.peak)))
    console.print(table)
    for name in list(variants)[1:]:
        ratios = saved["eager"] / saved[name], peaks["eager"].step / peaks[name].step
        yield Check(f"memory, {name}", "{:.2f}x less saved, {:.2f}x less at the peak".format(*ratios))


def _time_table(times: dict[str, list[float]], title: str):
    table = make_table("", "median", "fastest", "slowest", "speed against eager (extremes)", title=title)
    for name, seconds in times.items():
        figures = [f"{1e3 * t:.0f} ms" for t in (median(seconds), min(seconds), max(seconds))]
        table.add_row(name, *figures, str(measure.Ratio.of(times["eager"], seconds)))
    return table


# ---------------------------------------------------------------- training


def show_training(folder: Path, console) -> Iterator[Check]:
    """The MNIST recipe, and the nearest-neighbour baseline that it has to beat."""
    console.rule("[bold]3. Training: a ResNet on 4,000 MNIST digits, 1,000 held out")
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # a step takes milliseconds: on a busy machine, threads lose more by waiting than they gain
    try:
        run = train(read_recipe("mnist"), folder, console=console, restart=True)
    finally:
        torch.set_num_threads(threads)
    digits, held_out = mnist_5k()
    baseline = neighbour_accuracy(digits, held_out)
    trained = read(run.checkpoint)
    assert trained.pixels is not None
    reread = score(network(trained, run.checkpoint), HeldOutView(held_out, trained.pixels, 28))
    assert reread is not None
    reloaded = reread.top1
    console.print(f"{run}\n3-nearest-neighbour baseline: {baseline:.2%}", highlight=False, soft_wrap=True)
    result = f"{run.best:.2%} in {run.seconds:.0f} s; baseline {baseline:.2%}"
    yield Check("held-out accuracy", result, run.best > baseline)
    yield Check("checkpoint, loaded again", f"{reloaded:.2%}", reloaded == run.best)
    yield Check("accuracy curve", run.curve.name, run.curve.is_file())


# ---------------------------------------------------------------- small things


def _relative(got: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected))


def _variant(name: str) -> measure.Variant:
    return cast(measure.Variant, name.removeprefix("fused, "))


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def _threads() -> str:
    return f"{torch.get_num_threads()} threads"
