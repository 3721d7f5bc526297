"""Scores of a network on labelled images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backend import unfused
from .data import Images, require
from .data.loading import batches, in_batches
from .data.views import HeldOutView
from .processes import Processes
from .recipe import Recipe

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Score:
    """Of a test: the mean cross entropy, the fractions of images whose class is the likeliest or among the five
    likeliest, and how often each class (row) was taken for each (column), int64 [K, K]."""

    loss: float
    top1: float
    top5: float
    confusion: Tensor

    @property
    def images(self) -> int:
        return int(self.confusion.sum())

    @property
    def hits(self) -> int:
        return int(self.confusion.diagonal().sum())


def numerics(recipe: Recipe, device: torch.device) -> Any:
    """The context of a forward pass: autocast, where the recipe asks for it."""
    if recipe.precision not in AUTOCAST:
        return nullcontext()
    return torch.autocast(device.type, AUTOCAST[recipe.precision])


def fusion(recipe: Recipe) -> Any:
    """The context in which the recipe's blocks run fused, or as plain PyTorch."""
    return unfused() if recipe.fuse == "off" else nullcontext()


@torch.no_grad()
def log_probabilities(model: nn.Module, views: Sequence[Sequence[Tensor]]) -> Tensor:
    """Of each class, the logarithm of the mean over an image's views of its probability: [N, K] on the model's device.

    views: those [C, h, w] of each image; those of one size run together.
    """
    first = next(model.parameters())
    owners: dict[torch.Size, list[int]] = {}
    grouped: dict[torch.Size, list[Tensor]] = {}
    for owner, own in enumerate(views):
        for view in own:
            owners.setdefault(view.shape, []).append(owner)
            grouped.setdefault(view.shape, []).append(view)
    found: list[list[Tensor]] = [[] for _ in views]
    for shape, group in grouped.items():
        logits = model(torch.stack(group).to(first.device, first.dtype))
        for owner, row in zip(owners[shape], F.log_softmax(logits.float(), 1), strict=True):
            found[owner].append(row)
    return torch.stack([torch.stack(rows).logsumexp(0) - torch.tensor(len(rows)).log().item() for rows in found])


@torch.no_grad()
def score(
    model: nn.Module,
    view: HeldOutView,
    batch_size: int = 250,
    workers: int = 0,
    processes: Processes | None = None,
    context: Callable[[], Any] = nullcontext,
    stop: Callable[[], bool] = lambda: False,
) -> Score | None:
    """`model` in eval mode on `view`, shared by the processes of a run; `batch_size` counts views.

    `context` is entered around each batch. None once `stop()` says so.
    """
    was_training = model.training
    device = next(model.parameters()).device
    processes = processes or Processes(device)
    classes = len(view.images.classes)
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, hits among five
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    rows = in_batches(range(processes.rank, len(view), processes.size), max(1, batch_size // view.views))
    model.eval()
    stopped = False
    try:
        for views, labels in batches(view, rows, workers):
            stopped = stop()
            if stopped:
                break
            with context():
                scores = log_probabilities(model, views)
            labels = labels.to(device)
            five = scores.topk(min(5, classes), 1).indices
            sums[0] += F.nll_loss(scores, labels, reduction="sum")
            sums[1] += (five == labels[:, None]).sum()
            confusion += torch.bincount(labels * classes + scores.argmax(1), minlength=classes**2)
    finally:
        model.train(was_training)
    ended = processes.sum(torch.tensor([int(stopped)], device=device))
    if ended.item():
        return None
    loss, five_hits = processes.sum(sums).tolist()
    confusion = processes.sum(confusion).view(classes, classes).cpu()
    n = len(view)
    return Score(loss / n, confusion.diagonal().sum().item() / n, five_hits / n, confusion)


def neighbour_accuracy(train: Images, test: Images, neighbours: int = 3) -> float:
    """What a k-nearest-neighbour classifier on the pixels reaches: the bar to clear."""
    knn = require("sklearn.neighbors", "the baseline", "scikit-learn").KNeighborsClassifier(neighbours)
    knn.fit(train.pixels.flatten(1).numpy() / 255, train.labels.numpy())
    return float(knn.score(test.pixels.flatten(1).numpy() / 255, test.labels.numpy()))
