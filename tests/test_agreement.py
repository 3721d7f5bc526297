"""The demo's comparison of two models finds what is wrong, and only that."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from resnet_fused import agreement, models
from resnet_fused.agreement import KINDS, Agreement, Error, compare


@pytest.fixture
def model() -> nn.Module:
    return models.ResNet(models.BasicBlock, (1, 1, 1, 1), num_classes=5)


X, LABELS = torch.randn(4, 3, 33, 33, generator=torch.Generator().manual_seed(0)), torch.arange(4)


def failing(eager: nn.Module, other: nn.Module, training: bool = True) -> dict[str, list[str]]:
    """The names out of bounds, by kind, in float64, where nothing but a mistake shows."""
    x = X.double()
    agreements = compare(eager.double(), other.double(), x, LABELS, training, floor=1e-10)
    assert [a.kind for a in agreements] == list(KINDS)
    return {a.kind: [e.name for e in a.failures] for a in agreements}


@pytest.mark.parametrize("training", [True, False])
def test_a_copy_agrees_and_nothing_is_touched(model: nn.Module, training: bool) -> None:
    before = copy.deepcopy(model.state_dict())
    agreements = compare(model, copy.deepcopy(model), X, LABELS, training)
    assert all(e.eager == e.fused for a in agreements for e in a.errors)
    assert [len(a.errors) for a in agreements] == [1, 2 * 12, len(list(model.parameters()))]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_wrong_weight_shows_everywhere(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layer4[0].bn2.bias[3] += 0.5
    names = failing(model, other)
    assert names["outputs"] == ["logits"]
    assert "fc.weight" in names["gradients"]
    assert names["running statistics"] == []


def test_a_wrong_momentum_shows_in_the_running_statistics_alone(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    other.layer2[0].bn1.momentum = 0.2
    assert failing(model, other) == {
        "outputs": [],
        "running statistics": ["layer2.0.bn1.running_mean", "layer2.0.bn1.running_var"],
        "gradients": [],
    }
    assert not any(failing(model, other, training=False).values())


def test_a_scaled_gradient_shows_where_it_is(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    other = copy.deepcopy(model)
    original = agreement.observe

    def observe(network: nn.Module, *args) -> agreement.Observed:
        seen = original(network, *args)
        if network is other:
            seen["gradients", "fc.bias"] *= 1.01
        return seen

    monkeypatch.setattr(agreement, "observe", observe)
    assert failing(model, other)["gradients"] == ["fc.bias"]


def test_a_missing_gradient_is_an_error(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    other.fc.bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"fc\.bias got no gradient"):
        failing(model, other)


def test_other_names_are_an_error(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    other.fc = nn.Sequential(other.fc)
    with pytest.raises(RuntimeError, match=r"the models differ in .*fc\.0\.bias"):
        failing(model, other)


def test_the_rule_and_its_summary() -> None:
    errors = [Error("k", "a", 1e-3, 2e-3), Error("k", "b", 1e-3, 2.1e-3), Error("k", "c", 0.0, float("inf"))]
    summary = Agreement("k", errors, floor=1e-6)
    assert [e.name for e in summary.failures] == ["b", "c"]
    assert summary.medians == (1e-3, 2.1e-3)
    assert summary.worst("fused").name == "c"
    assert summary.worst("eager").name == "a"
