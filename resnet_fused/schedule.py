"""Learning rates over a run, by torch's schedulers."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, MultiStepLR, ReduceLROnPlateau

from .recipe import Recipe


class Schedule:
    """A warm-up at a rate of its own, and steps or plateaus; each multiplies the optimizer's rate, in any order."""

    def __init__(self, optimizer: Optimizer, recipe: Recipe) -> None:
        self._by_iteration: list[LRScheduler] = []
        self._on_plateau: ReduceLROnPlateau | None = None
        if recipe.warmup:
            factor = recipe.warmup_lr / recipe.lr
            if factor > 1:
                raise ValueError(f"warmup_lr is {recipe.warmup_lr}, expected at most lr, {recipe.lr}")
            self._by_iteration.append(ConstantLR(optimizer, factor, recipe.warmup))
        if recipe.schedule == "step":
            self._by_iteration.append(MultiStepLR(optimizer, list(recipe.milestones), recipe.gamma))
        if recipe.schedule == "plateau":
            self._on_plateau = ReduceLROnPlateau(optimizer, "max", recipe.gamma, recipe.patience)

    def step(self) -> None:
        """After each iteration."""
        for scheduler in self._by_iteration:
            scheduler.step()

    def tested(self, accuracy: float) -> None:
        """After each test."""
        if self._on_plateau is not None:
            self._on_plateau.step(accuracy)

    def state_dict(self) -> list[dict[str, Any]]:
        return [scheduler.state_dict() for scheduler in self._all()]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Raises ValueError if they are of other schedulers."""
        if len(states) != len(self._all()):
            raise ValueError(f"{len(states)} schedules, expected {len(self._all())}")
        for scheduler, state in zip(self._all(), states, strict=True):
            scheduler.load_state_dict(state)

    def _all(self) -> list[Any]:
        return [*self._by_iteration, *([self._on_plateau] if self._on_plateau else [])]
