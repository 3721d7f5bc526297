"""The commands that train, test and analyse: `python -m resnet_fused train | eval | analyse`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin

import torch
from torch import nn

from . import analysis, checkpoint, complexity, evaluate, plots, recipe
from .arguments import add_command, checked_device, positive_float, positive_int, with_device
from .console import make_console, make_table
from .data import FORMATS, Images, Pixels
from .data.loading import batches, in_batches
from .data.views import Crops, HeldOutView
from .models import MODELS
from .prepare import splits
from .processes import leads
from .recipe import TYPES, Recipe, RecipeError
from .train import train

SCALES = (224, 256, 384, 480, 640)  # of He et al. 2015, section 4.1, for an input of 224
LISTED = 30  # classes whose confusion fits a terminal


# ---------------------------------------------------------------- train


def train_command(args: argparse.Namespace) -> int:
    """Trains a recipe; its flags change single values."""
    folder = args.out or Path("runs") / Path(args.recipe).stem
    if args.resume:
        state, _ = checkpoint.read_state(folder)
        base = recipe.from_values(state["recipe"], str(folder / checkpoint.STATE))
    else:
        base = recipe.read(args.recipe)
    console = make_console()
    run = train(_changed(base, args), folder, checked_device(args.device), console, args.resume, args.restart)
    if leads():
        console.print(str(run), soft_wrap=True)
    return 0


def _changed(base: Recipe, args: argparse.Namespace) -> Recipe:
    """With what the command line gives."""
    given = {f.name: getattr(args, f.name, None) for f in fields(Recipe)}
    changes = {name: value for name, value in given.items() if value is not None}
    if "model_args" in changes:
        changes["model_args"] = base.model_args | dict(changes["model_args"])
    return recipe.changed(base, changes) if changes else base


def _add_recipe_flags(sub: argparse.ArgumentParser, *left_out: str) -> None:
    """A flag for each of the recipe's values."""
    group = sub.add_argument_group("values of the recipe")
    for f in fields(Recipe):
        kind, flag = TYPES[f.name], "--" + f.name.replace("_", "-")
        if f.name in left_out:
            continue
        if f.name == "model":
            group.add_argument(flag, choices=MODELS, metavar="MODEL", help=f.metadata["help"])
        elif f.name == "model_args":
            group.add_argument(flag, type=_pair, nargs="*", metavar="NAME=VALUE", help=f.metadata["help"])
        elif kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=f.metadata["help"])
        else:
            several = "*" if get_origin(kind) is tuple else None
            group.add_argument(flag, type=_value(f.name), nargs=several, metavar=_metavar(kind), help=_help(f))


def _value(name: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return recipe.from_text(name, text)
        except RecipeError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def _pair(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as TOML has it, or a string without its quotes."""
    name, equals, value = text.partition("=")
    if not name.isidentifier() or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, recipe.parse(f"value = {value}".encode(), text)["value"]
    except RecipeError:
        return name, value


def _metavar(kind: Any) -> str:
    one = get_args(kind)[0] if get_origin(kind) is tuple else kind
    return {int: "N", float: "X"}.get(one, "WORD")


def _help(f: Any) -> str:
    choices = recipe.choices(f)
    return f"{', '.join(choices)}: {f.metadata['help']}" if choices else f.metadata["help"]


# ---------------------------------------------------------------- eval


def eval_command(args: argparse.Namespace) -> int:
    """Scores of a checkpoint on the held-out images: accuracy, top-5, confusion."""
    path, trained, model = _read(args.checkpoint, args.device)
    own = _changed(trained.recipe, args)
    view = _view(own, trained, path, args.crops, args.scales)
    with evaluate.fusion(own):
        score = evaluate.score(
            model,
            view,
            args.views,
            own.workers,
            context=lambda: evaluate.numerics(own, next(model.parameters()).device),
        )
    assert score is not None
    epoch, hits, total = trained.metadata.get("epoch", "?"), score.hits, score.images
    print(f"{own.model}, epoch {epoch}: {hits} of {total} right, {score.top1:.2%}, among five {score.top5:.2%}")
    if len(view.images.classes) <= LISTED:
        make_console().print(_confusion_table(score, view.images.classes))
    if args.out:
        _write_scores(args.out, own, view, score, path)
    return 0


def _read(given: Path, device: str) -> tuple[Path, checkpoint.Trained, nn.Module]:
    """(path, contents, network on the device) of a checkpoint, or of a run's folder the best one."""
    path = given / checkpoint.BEST if given.is_dir() else given
    trained = checkpoint.read(path)
    return path, trained, checkpoint.network(trained, path).to(checked_device(device))


def _view(
    own: Recipe, trained: checkpoint.Trained, path: Path, crops: Crops, scales: Sequence[int] | None
) -> HeldOutView:
    """Of the data's held-out images. Raises CheckpointError where the checkpoint knows other classes."""
    images = splits(own)[1]
    if images.classes != trained.classes:
        odd = sorted(set(images.classes) ^ set(trained.classes))[:5]
        raise checkpoint.CheckpointError(
            f"{path} was trained on {len(trained.classes)} classes, the data has {len(images.classes)}: "
            f"{', '.join(odd)} are not in both"
        )
    size = min(images.shape[1:]) if isinstance(images, Images) else own.size
    pixels = trained.pixels or Pixels.given(own.mean, own.std)
    default = [round(size * scale / SCALES[0]) for scale in SCALES]
    return HeldOutView(images, pixels, size, crops, tuple(scales or default) if crops == "multi" else ())


def _confusion_table(score: evaluate.Score, classes: Sequence[str]) -> Any:
    table = make_table("", *classes, "right", title="true class (row), predicted (column)")
    for i, row in enumerate(score.confusion.tolist()):
        table.add_row(classes[i], *(str(n) if n else "·" for n in row), f"{row[i] / max(1, sum(row)):.0%}")
    return table


def _write_scores(folder: Path, own: Recipe, view: HeldOutView, score: evaluate.Score, path: Path) -> None:
    """eval-<crops>.json and confusion-<crops>.png."""
    result = {
        "checkpoint": str(path),
        "model": own.model,
        "data": own.data,
        "data_dir": own.data_dir,
        "crops": view.crops,
        "scales": list(view.scales),
        "images": score.images,
        "top1": score.top1,
        "top5": score.top5,
        "loss": score.loss,
        "classes": list(view.images.classes),
        "confusion": score.confusion.tolist(),
    }
    checkpoint.write(folder / f"eval-{view.crops}.json", (json.dumps(result, indent=1) + "\n").encode())
    title = f"{own.model}: {score.top1:.2%}"
    plots.plot_confusion(score.confusion, view.images.classes, folder / f"confusion-{view.crops}.png", title)


# ---------------------------------------------------------------- analyse


ANALYSE = "What networks show: responses, degradation with depth, fused against eager curves, parameters and cost."


def responses_command(args: argparse.Namespace) -> int:
    """The standard deviation of each layer's response after its batch norm, of trained networks."""
    found: dict[str, dict[str, float]] = {}
    for given in args.checkpoints:
        path, trained, model = _read(given, args.device)
        first = next(model.parameters())
        view = _view(_changed(trained.recipe, args), trained, path, "centre", None)
        rows = in_batches(range(min(args.images, len(view))), 50)
        images = [torch.stack([x for x, *_ in views]).to(first.device, first.dtype) for views, _ in batches(view, rows)]
        found[_unique(trained.recipe.model, found)] = analysis.responses(model, images)
    table = make_table("", "layers", "largest", "median", "smallest", title="standard deviations of the responses")
    for name, stds in found.items():
        ordered = sorted(stds.values())
        figures = (ordered[-1], ordered[len(ordered) // 2], ordered[0])
        table.add_row(name, str(len(stds)), *(f"{x:.3f}" for x in figures))
    make_console().print(table)
    checkpoint.write(args.out / "responses.json", (json.dumps(found, indent=1) + "\n").encode())
    analysis.plot_responses(found, args.out / "responses.png")
    print(f"{args.out / 'responses.png'}, {args.out / 'responses.json'}")
    return 0


def _unique(name: str, taken: dict[str, Any]) -> str:
    same = sum(key.split(" (")[0] == name for key in taken)
    return f"{name} ({same + 1})" if same else name


def degradation_command(args: argparse.Namespace) -> int:
    """Trains plain and residual networks of two depths alike, and plots their errors."""
    console = make_console()
    base = _changed(recipe.read(args.recipe), args)
    runs = analysis.degradation(args.models, base, args.out, console, checked_device(args.device))
    table = make_table("", "training error", "held-out error, last", "best", title="after the last iteration")
    for run in runs:
        last = run.history[-1]
        errors = (1 - last["train_accuracy"], 1 - last["test_accuracy"], 1 - run.best)
        table.add_row(run.recipe.model, *(f"{e:.2%}" for e in errors))
    console.print(table)
    console.print(str(args.out / "degradation.png"), soft_wrap=True)
    return 0


def table_command(args: argparse.Namespace) -> int:
    """Parameters and multiply-adds of the networks, beside VGG-19's."""
    table = make_table(*complexity.COLUMNS, title="of one image")
    for row in complexity.cells(complexity.table(args.models)):
        table.add_row(*row)
    make_console().print(table)
    return 0


def coincide_command(args: argparse.Namespace) -> int:
    """Runs on one plot, the first against each other: do fused and eager training coincide?"""
    if len(args.runs) < 2:
        raise ValueError("one run, expected at least two to compare")
    curves = [analysis.Curve.of(folder.name, folder) for folder in args.runs]
    table = make_table("", "iterations", "loss apart", "accuracy apart", "time", title=f"against {curves[0].name}")
    table.add_row(curves[0].name, str(len(curves[0].iterations)), "", "", f"{curves[0].seconds:.0f} s")
    worst = 0.0
    for curve in curves[1:]:
        found = analysis.coincidence(curves[0], curve, args.window)
        worst = max(worst, found.loss)
        apart = f"{found.loss:.2g}", f"{found.accuracy:.2%}"
        table.add_row(curve.name, str(found.iterations), *apart, f"{curve.seconds:.0f} s")
    make_console().print(table)
    analysis.plot_coincidence(curves, args.out / "coincide.png", args.window)
    print(args.out / "coincide.png")
    if worst > args.tolerance:
        raise ValueError(f"the losses are up to {worst:.3g} apart, more than {args.tolerance:g}")
    return 0


# ---------------------------------------------------------------- parsing


def add_commands(commands: Any) -> None:
    """train, eval and analyse, to what add_subparsers has made."""
    sub = with_device(add_command(commands, "train", train_command))
    names = ", ".join(recipe.names())
    sub.add_argument("recipe", nargs="?", default="mnist", help=f"{names}, or a TOML file (default: %(default)s)")
    sub.add_argument("--out", type=Path, help="folder for results (default: runs/RECIPE)")
    once = sub.add_mutually_exclusive_group()
    once.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the folder")
    once.add_argument("--restart", action="store_true", help="begin again where an unfinished run is in the folder")
    _add_recipe_flags(sub)

    sub = with_device(add_command(commands, "eval", eval_command))
    sub.add_argument("checkpoint", type=Path, help="a file, or the folder of a run: its best one")
    sub.add_argument("--crops", choices=get_args(Crops), default="centre", help="of each image (default: %(default)s)")
    shown = ", ".join(map(str, SCALES))
    sub.add_argument(
        "--scales", type=positive_int, nargs="+", metavar="N",
        help=f"shorter sides for --crops multi (default: {shown}, for an input of 224; others in proportion)",
    )  # fmt: skip
    sub.add_argument("--views", type=positive_int, default=250, help="crops in a batch (default: %(default)s)")
    sub.add_argument("--out", type=Path, help="folder for a JSON of the results and a picture of the confusion")
    _add_data_flags(sub)

    analyse = commands.add_parser("analyse", help=ANALYSE, description=ANALYSE)
    kinds = analyse.add_subparsers(dest="what", required=True, metavar="WHAT")

    def kind(name: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        own = add_command(kinds, name, run)
        if name != "table":
            default = Path("runs") / "analysis"
            own.add_argument("--out", type=Path, default=default, help="folder for results (default: %(default)s)")
        return own

    sub = with_device(kind("responses", responses_command))
    sub.add_argument("checkpoints", type=Path, nargs="+", help="files, or folders of runs")
    sub.add_argument("--images", type=positive_int, default=500, help="that are looked at (default: %(default)s)")
    _add_data_flags(sub)

    sub = with_device(kind("degradation", degradation_command))
    sub.add_argument("--models", nargs="+", choices=MODELS, default=analysis.DEPTHS, metavar="MODEL")
    sub.add_argument("--recipe", default="degradation", help="a name or a TOML file (default: %(default)s)")
    _add_recipe_flags(sub, "model", "model_args")

    sub = kind("table", table_command)
    sub.add_argument("--models", nargs="+", choices=MODELS, default=(), metavar="MODEL", help="(default: all)")

    sub = kind("coincide", coincide_command)
    sub.add_argument("runs", type=Path, nargs="+", help="folders of runs, e.g. of --fuse lean and --fuse off")
    sub.add_argument("--window", type=positive_int, default=50, help="iterations of a mean (default: %(default)s)")
    sub.add_argument(
        "--tolerance", type=positive_float, default=0.1, help="difference of the mean losses that is too much"
    )


def _add_data_flags(sub: argparse.ArgumentParser) -> None:
    """Where the images are now, if not where the training found them."""
    sub.add_argument("--data", choices=FORMATS)
    sub.add_argument("--data-dir")
    for name in ("size", "workers"):
        sub.add_argument(f"--{name}", type=_value(name), metavar="N")
