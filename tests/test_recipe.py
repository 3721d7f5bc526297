"""Recipes: the files, their errors, and how the command line changes them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_runs import TinyNet

from resnet_fused import models, recipe
from resnet_fused.recipe import Recipe, RecipeError
from resnet_fused.schedule import Schedule


def test_the_defaults_are_the_mnist_recipe() -> None:
    assert recipe.read("mnist") == Recipe()


def test_the_papers_recipes() -> None:
    """He et al. 2015, sections 4.2 and 3.4."""
    cifar = recipe.read("cifar10")
    assert (cifar.lr, cifar.momentum, cifar.weight_decay, cifar.batch_size) == (0.1, 0.9, 1e-4, 128)
    assert (cifar.iterations, cifar.milestones, cifar.gamma) == (64_000, (32_000, 48_000), 0.1)
    assert (cifar.pad, cifar.flip, cifar.normalise, cifar.schedule) == (4, True, "pixel", "step")
    net = recipe.read("imagenet")
    assert (net.lr, net.momentum, net.weight_decay, net.batch_size) == (0.1, 0.9, 1e-4, 256)
    assert (net.iterations, net.schedule, net.gamma) == (600_000, "plateau", 0.1)
    assert (net.scale, net.size, net.flip, net.normalise, net.colour) == ((256, 480), 224, True, "pixel", 0.1)


@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_survives_a_checkpoint(name: str) -> None:
    own = recipe.read(name)
    assert recipe.from_values(own.as_dict()) == own


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = 'fast'", "lr is 'fast', expected a number"),
        ("epochs = 1.5", "epochs is 1.5, expected a whole number"),
        ("epochs = true", "epochs is True, expected a whole number"),
        ("flip = 1", "flip is 1, expected true or false"),
        ("milestones = 3", "milestones is 3, expected a list of numbers"),
        ("model_args = 3", "model_args is 3, expected a table"),
        ("model = 3", "model is 3, expected a string"),
        ("learning_rate = 1", "unknown value 'learning_rate'"),
        ("lr = nan", "lr is nan, expected a finite number"),
        ("lr = 0", "lr is 0.0, expected more than 0"),
        ("momentum = 1", "momentum is 1.0, expected less than 1"),
        ("batch_size = 0", "batch_size is 0, expected at least 1"),
        ("schedule = 'cosine'", "schedule is 'cosine', expected one of constant, step, plateau"),
        ("data = 'svhn'", "data is 'svhn', expected one of digits, mnist, cifar10, images"),
        ("milestones = [5, 3]", "milestones is [5, 3], expected ascending iterations"),
        ("mean = [0.1, 0.2]", "mean has 2 values and std 1, expected one for each channel"),
        ("scale = [300, 256]", "scale is [300, 256], expected a least and a greatest"),
        ("data = 'images'", "size is 0"),
        ("accumulate = 4", "batch_size is 30, which accumulate, 4, does not divide"),
        ("data_dir = 'x'", "data is 'digits'"),
        ("seed = 18446744073709551616", "seed is 18446744073709551616"),
        ("lr = ", "is no TOML file"),
    ],
)
def test_a_wrong_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        recipe.read(str(path))
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_no_recipe() -> None:
    with pytest.raises(RecipeError, match=r"no recipe mnits: one of cifar10, .*mnist"):
        recipe.read("mnits")


def test_epochs_take_the_place_of_iterations() -> None:
    cifar = recipe.read("cifar10")
    assert recipe.changed(cifar, {"epochs": 3}).iterations == 0
    assert recipe.changed(cifar, {"epochs": 3, "iterations": 5}).iterations == 5


def test_networks_get_the_classes_and_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "tiny", TinyNet)
    own = Recipe(model="tiny", model_args={"dropout": 0.5}, fuse="fast", precision="fp64")
    model = recipe.build(own, 7)
    assert isinstance(model, TinyNet)
    assert (model.fc.out_features, model.dropout.p) == (7, 0.5)
    assert model.block.memory == "fast"
    assert model.fc.weight.dtype == torch.float64
    with pytest.raises(RecipeError, match=r"model_args of tiny: .*depth"):
        recipe.build(dataclasses.replace(own, model_args={"depth": 3}), 7)
    with pytest.raises(ValueError, match="unknown model 'vgg'"):
        recipe.build(Recipe(model="vgg"), 10)


# ------------------------------------------------------------------------------------------ schedules


def rates(own: Recipe, iterations: int, accuracies: dict[int, float] | None = None) -> list[float]:
    """The learning rate of each iteration; `accuracies` are of tests after some of them."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], own.lr)
    schedule = Schedule(optimizer, own)
    found = []
    for i in range(1, iterations + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        if accuracies and i in accuracies:
            schedule.tested(accuracies[i])
    return found


def test_steps_after_a_warm_up() -> None:
    own = Recipe(lr=0.1, schedule="step", milestones=(5, 8), warmup=3, warmup_lr=0.01)
    assert rates(own, 10) == pytest.approx([0.01] * 3 + [0.1] * 2 + [0.01] * 3 + [0.001] * 2)


def test_a_plateau() -> None:
    own = Recipe(lr=0.1, schedule="plateau", patience=1)
    tests = {2: 0.5, 4: 0.6, 6: 0.6, 8: 0.55, 10: 0.7}
    assert rates(own, 10, tests) == pytest.approx([0.1] * 8 + [0.01] * 2)


def test_a_warm_up_is_slower_than_the_rest() -> None:
    with pytest.raises(ValueError, match=r"warmup_lr is 0.01, expected at most lr, 0.005"):
        rates(Recipe(warmup=3), 1)
