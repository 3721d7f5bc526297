"""Tables and plots of what `make bench` has written.

    python -m benchmarks.report results/*.json [--out FOLDER] [--model resnet50] [--batch 256]

For each file, beside it or in FOLDER, under its machine and version:

    <name>.md             tables: times and ratios (measured), bytes by stage (counted; torch.compile's modelled)
    <name>-speed.png      how many times faster than eager the blocks of each stage are: measured
    <name>-traffic.png    what a training step moves through memory, by stage: counted; torch.compile's is modelled
    <name>-saved.png      what it keeps for backward: counted; torch.compile's is modelled
    <name>-roofline.png   every op as a point under the machine's roof: measured times of counted bytes and FLOPs

Files of `make gpu-check` are passed over. Exit status: 1 if a file could not be read, with a line for each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from benchmarks.machine import slug
from benchmarks.table import Row, cells
from resnet_fused import plots
from resnet_fused.network import MODELS, STAGES, Comparison

GIB = 1 << 30


class ResultError(Exception):
    """What is wrong with a file, in one line."""


class OtherFileError(ResultError):
    """A file that is no result of the suites, and is not meant to be."""


@dataclass(frozen=True)
class Results:
    """What one file holds."""

    about: dict[str, Any]  # of the machine, see benchmarks/conftest.py
    rows: list[Row]

    @property
    def machine(self) -> str:
        return self.about["gpu"] if self.about["device"] == "cuda" else self.about["processor"]

    @property
    def name(self) -> str:
        return f"{slug(self.machine)}-{self.about['versions']['resnet_fused']}"

    @property
    def title(self) -> str:
        versions = self.about["versions"]
        return f"{self.machine}, resnet_fused {versions['resnet_fused']}, torch {versions['torch']}"

    @classmethod
    def read(cls, path: Path) -> Results:
        """Raises ResultError."""
        try:
            content = json.loads(path.read_text())
        except OSError as error:
            raise ResultError(f"{path}: {error.strerror}") from None
        except ValueError:
            raise ResultError(f"{path}: is not JSON") from None
        if isinstance(content, dict) and "sections" in content:
            raise OtherFileError(f"{path}: is of `make gpu-check`: passed over")
        try:
            about = content["machine_info"]["resnet_fused"]
            rows = [_row(benchmark) for benchmark in content["benchmarks"]]
            results = cls(about, rows)
            if not (results.title and rows):
                raise KeyError
        except (KeyError, TypeError, IndexError):
            raise ResultError(f"{path}: is not a result of `make bench`") from None
        return results


def _row(benchmark: dict[str, Any]) -> Row:
    info = benchmark["extra_info"]
    seconds = [float(s) for s in benchmark["stats"]["data"]]
    return Row(f"{info['case']}-{info['dtype']}", info["work"], info["variant"], seconds, info)


# ------------------------------------------------------------------------------------------------------- tables


def markdown(results: Results, comparison: Comparison, of: str) -> Iterator[str]:
    """Lines."""
    about = results.about
    yield f"# {results.title}"
    yield ""
    setting = f"{about['threads']} threads, {about['malloc']}"
    yield f"Measured on {about['device']}, {setting}: medians of interleaved rounds."
    yield "Ratios: how many times faster than eager, the median (lowest to highest) of rounds."
    yield ""
    yield from _table(*cells(results.rows))
    for title, columns, rows in comparison.tables():
        kind = "counted; torch.compile's modelled" if "torch.compile" in columns else "counted"
        yield from ("", f"## A training step of {of}: GiB {title} ({kind})", "")
        yield from _table(columns, rows)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(columns) + " |"
    yield "|" + " --- |" * len(columns)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


# -------------------------------------------------------------------------------------------------------- plots


def stage_ratios(rows: Iterable[Row]) -> dict[str, dict[tuple[str, int], float]]:
    """By column and (kind of block with dtype and work, stage): the geometric mean of its blocks' ratios to eager."""
    found: dict[str, dict[tuple[str, int], list[float]]] = {}
    for row in rows:
        info = row.info
        if info.get("op") == "block" and row.variant != "eager" and "ratio" in info:
            key = f"{info['kind']} {info['dtype']} {row.work}", info["stage"]
            found.setdefault(row.column, {}).setdefault(key, []).append(info["ratio"]["median"])
    return {column: {key: geometric_mean(r) for key, r in own.items()} for column, own in found.items()}


def plot_speed(results: Results, path: Path) -> bool:
    """False where no block was measured."""
    ratios = stage_ratios(results.rows)
    groups = sorted({key for own in ratios.values() for key in own})
    if not groups:
        return False
    figure, axes = _figure(f"measured: blocks, times faster than eager\n{results.title}", 6 + 0.3 * len(groups))
    labels = [f"{what}\nstage {stage}" for what, stage in groups]
    _bars(axes, labels, {column: [own.get(g) for g in groups] for column, own in ratios.items()})
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylabel("eager / variant")
    axes.tick_params(axis="x", labelrotation=90)
    plots.save(figure, path)
    return True


def plot_stages(title: str, unit: str, columns: dict[str, list[float]], path: Path) -> None:
    """Bars of bytes by stage."""
    figure, axes = _figure(title, 8)
    _bars(axes, list(STAGES), {name: [v / GIB for v in values] for name, values in columns.items()})
    axes.set_ylabel(unit)
    plots.save(figure, path)


def traffic(comparison: Comparison) -> dict[str, list[float]]:
    """Bytes by stage, by passes; torch.compile's are derived."""
    return _modelled(comparison.columns(lambda step: step.moved.passes, lambda stage: stage.moved))


def saved(comparison: Comparison) -> dict[str, list[float]]:
    """Bytes kept for backward by stage; torch.compile's are derived."""
    return _modelled(comparison.columns(lambda step: step.saved, lambda stage: stage.saved))


def _modelled(columns: dict[str, list[float]]) -> dict[str, list[float]]:
    return {f"{name} (modelled)" if name == "torch.compile" else name: own for name, own in columns.items()}


def points(rows: Iterable[Row]) -> dict[str, list[tuple[float, float]]]:
    """By op: (FLOPs a byte, bytes a second) of ours."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.column == "ours" and "gbs" in row.info and row.work != "train":
            label = f"{row.info['op']} {row.work} {row.info['dtype']}"
            found.setdefault(label, []).append((row.info["flops"] / row.info["bytes"], row.info["gbs"] * 1e9))
    return found


def plot_roofline(results: Results, path: Path) -> bool:
    """Bytes a second over intensity, so that ops without a product are on it too, at 0. False where no op was measured.

    Under the roof is what memory and products allow: a CPU's caches may exceed it.
    """
    found = points(results.rows)
    if not found:
        return False
    roof = results.about["roof"]
    most = max(intensity for own in found.values() for intensity, _ in own)
    figure, axes = _figure(f"measured: bytes a second of counted traffic; roof: {roof['kind']}\n{results.title}", 10)
    for dtype, peak in roof["peak"].items():
        ridge = peak / roof["bandwidth"]
        steps = [0.0, *(ridge * (1 + most / ridge) ** (i / 50) for i in range(51))]
        heights = [min(roof["bandwidth"], peak / s) if s else roof["bandwidth"] for s in steps]
        axes.plot(steps, heights, label=f"roof {dtype} ({roof['kind']})")
    markers = "osv^<>DPX*hdp8"
    for i, (label, own) in enumerate(found.items()):
        axes.scatter(*zip(*own, strict=True), s=24, marker=markers[i % len(markers)], label=label)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs of products a byte (counted)")
    axes.set_ylabel("bytes a second")
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    plots.save(figure, path)
    return True


def _figure(title: str, width: float) -> tuple[Any, Any]:
    figure = plots.figure(width, 5)
    axes = figure.subplots()
    axes.set_title(title, fontsize="medium")
    return figure, axes


def _bars(axes: Any, labels: list[str], columns: dict[str, list[Any]]) -> None:
    """Groups of bars, one of each column; None leaves a gap."""
    width = 0.8 / len(columns)
    for i, (name, values) in enumerate(columns.items()):
        places = [x + (i - (len(columns) - 1) / 2) * width for x in range(len(labels))]
        shown = [(x, v) for x, v in zip(places, values, strict=True) if v is not None]
        axes.bar(*zip(*shown, strict=True), width, label=name)
    axes.set_xticks(range(len(labels)), labels, fontsize="small")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


# --------------------------------------------------------------------------------------------------------- command


def write(results: Results, comparison: Comparison, of: str, folder: Path) -> list[Path]:
    """All outputs of a file; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {end: folder / f"{results.name}{end}" for end in (".md", "-speed.png", "-traffic.png", "-saved.png",
                                                               "-roofline.png")}  # fmt: skip
    paths[".md"].write_text("\n".join(markdown(results, comparison, of)) + "\n")
    title = f"counted: {{}} of a training step of {of}\nresnet_fused {results.about['versions']['resnet_fused']}"
    plot_stages(title.format("traffic"), "GiB moved, by passes", traffic(comparison), paths["-traffic.png"])
    plot_stages(title.format("memory"), "GiB kept for backward", saved(comparison), paths["-saved.png"])
    drawn = {"-speed.png": plot_speed, "-roofline.png": plot_roofline}
    missing = [end for end, plot in drawn.items() if not plot(results, paths[end])]
    return [path for end, path in paths.items() if end not in missing]


def _read(path: Path) -> Results | ResultError:
    try:
        return Results.read(path)
    except ResultError as error:
        return error


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help="results/*.json")
    parser.add_argument("--out", type=Path, help="folder (default: that of each file)")
    parser.add_argument("--model", choices=MODELS, metavar="MODEL", default="resnet50", help="whose bytes are counted")
    parser.add_argument("--batch", type=int, default=256)
    args = parser.parse_args(argv)
    found = [(path, _read(path)) for path in args.files]
    for error in (own for _, own in found if isinstance(own, ResultError)):
        print(f"report: {error}", file=sys.stderr)
    read = [(path, own) for path, own in found if isinstance(own, Results)]
    if read:
        comparison = Comparison.of(args.model, args.batch)
        for path, results in read:
            of = f"{args.model}, batch {args.batch}, bf16, as on a GPU"
            print(*write(results, comparison, of, args.out or path.parent), sep="\n")
    return int(any(type(own) is ResultError for _, own in found))


if __name__ == "__main__":
    sys.exit(main())
