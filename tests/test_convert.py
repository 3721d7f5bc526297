"""`fuse_` and `unfuse_` on whole networks: what is fused, what is left and why, and that nothing else changes."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision import models
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops.misc import FrozenBatchNorm2d

import resnet_fused as rf
from resnet_fused.blocks import FusedBlock
from resnet_fused.recorder import recording
from tests.conftest import check_modules, randomise

TORCHVISION = ("resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "wide_resnet50_2")
WHOLE = ("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2")


def images(n: int = 2, size: int = 64) -> torch.Tensor:
    return torch.randn(n, 3, size, size)


def small(name: str, **options) -> nn.Module:
    return randomise(getattr(models, name)(num_classes=10, **options))


@pytest.mark.parametrize("name", TORCHVISION)
def test_every_torchvision_resnet_fuses_whole(name):
    model = small(name)
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    children = [child for child, _ in model.named_children()]
    report = rf.fuse_(model)
    assert not report.composed
    assert len(report.fused) == 1 + sum(len(getattr(model, f"layer{i}")) for i in (1, 2, 3, 4))
    assert report.channels_last > 0
    assert list(model.state_dict()) == keys
    assert [child for child, _ in model.named_children()] == children
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert isinstance(model.layer1[0], (models.resnet.BasicBlock, models.resnet.Bottleneck))
    assert "blocks and stems fused" in str(report)
    assert "layer4.1" in str(report)


@pytest.mark.parametrize("memory", ["lean", "fast"])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_network_trains_alike(name, memory):
    """Outputs, running statistics and the gradient of every parameter and of the image."""
    eager = small(name).double()
    fused = copy.deepcopy(eager)
    rf.fuse_(fused, memory=memory)
    check_modules(fused, eager, images().double())


def test_eval_mode_and_frozen_norms():
    eager = small("resnet50").double().eval()
    fused = copy.deepcopy(eager)
    rf.fuse_(fused)
    check_modules(fused, eager, images().double())
    for model in (eager, fused):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    check_modules(fused, eager, images().double())


def test_frozen_batch_norm_2d():
    eager = small("resnet50", norm_layer=FrozenBatchNorm2d).double()
    fused = copy.deepcopy(eager)
    report = rf.fuse_(fused)
    assert [row.name for row in report.composed] == ["bn1"]
    check_modules(fused, eager, images().double())


@pytest.mark.parametrize(
    "options", [{"replace_stride_with_dilation": [False, True, True]}, {"zero_init_residual": True}]
)
def test_torchvision_options(options):
    eager = models.resnet50(num_classes=10, **options).double()
    fused = copy.deepcopy(eager)
    assert not rf.fuse_(fused).composed
    check_modules(fused, eager, images().double())


def test_unfuse_is_the_exact_inverse():
    model = small("resnet50")
    original = copy.deepcopy(model)
    before = {name: type(m) for name, m in model.named_modules()}
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    rf.fuse_(model, memory="fast")
    assert rf.unfuse_(model) is model
    assert {name: type(m) for name, m in model.named_modules()} == before
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    for (name, p), q in zip(model.named_parameters(), original.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert p.stride() == q.stride(), name
    x = images()
    assert torch.equal(model.eval()(x), original.eval()(x))


def test_fusing_twice_changes_only_the_memory_mode():
    model = small("resnet18")
    rf.fuse_(model)
    types = [type(m) for m in model.modules()]
    report = rf.fuse_(model, memory="fast")
    assert [type(m) for m in model.modules()] == types
    assert not report.composed
    assert model.layer1[0].memory == "fast"
    rf.unfuse_(model)
    assert type(model.layer1[0]) is models.resnet.BasicBlock
    assert type(model.relu) is nn.ReLU


TIMM = {
    "resnet18": 9,  # name -> rows that must be fused
    "resnet50": 17,
    "resnext50_32x4d": 17,
    "resnet50d": 17,  # deep stem and average-pooled downsample
    "wide_resnet50_2": 17,
    "seresnet50": 1,
    "resnetblur50": 0,
}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    eager = randomise(timm.create_model(name, num_classes=10)).double()
    fused = copy.deepcopy(eager)
    report = rf.fuse_(fused)
    assert len(report.fused) >= TIMM[name]
    assert all(row.reason for row in report.composed)
    check_modules(fused, eager, images().double())


def test_timm_drop_path_stays():
    model = timm.create_model("resnet18", drop_path_rate=0.2)
    report = rf.fuse_(model)
    assert any("drop_path is a DropPath" in row.reason for row in report.composed)


def test_report_reasons():
    model = small("resnet18")
    model.layer1[0].conv1.register_forward_hook(lambda *args: None)
    prune.l1_unstructured(model.layer1[1].conv2, "weight", amount=0.3)
    parametrizations.weight_norm(model.layer2[0].conv1)
    model.layer2[1].bn1 = nn.GroupNorm(4, 128)
    model.layer3[0].relu = nn.GELU()
    model.layer3[1].bn2 = nn.InstanceNorm2d(256)
    model.maxpool = nn.AvgPool2d(3, 2, 1)
    reasons = {row.name: row.reason for row in rf.fuse_(model).composed}
    assert reasons.keys() == {"bn1", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1"}
    assert "hook" in reasons["layer1.0"]
    assert "hook" in reasons["layer1.1"]
    assert "ParametrizedConv2d" in reasons["layer2.0"]
    assert "GroupNorm" in reasons["layer2.1"]
    assert "GELU" in reasons["layer3.0"]
    assert "InstanceNorm2d" in reasons["layer3.1"]
    assert "AvgPool2d" in reasons["bn1"]


def test_a_hook_added_later_makes_the_block_composed():
    model = small("resnet18")
    rf.fuse_(model)
    seen = []
    model.layer1[0].conv1.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with recording() as calls:
        model(images())
    assert seen
    assert [call.reason for call in calls if call.reason] == ["conv1 has a forward hook"]


def test_subclass_with_its_own_forward_is_left():
    class Noisy(models.resnet.BasicBlock):
        def forward(self, x):
            return super().forward(x) + 1

    class Renamed(models.resnet.BasicBlock):
        pass

    model = nn.Sequential(Noisy(8, 8), Renamed(8, 8))
    report = rf.fuse_(model)
    assert type(model[0]) is Noisy
    assert [row.name for row in report.fused] == ["1"]
    assert isinstance(model[1], Renamed)
    rf.unfuse_(model)
    assert type(model[1]) is Renamed


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_stay_fused(copier):
    model = small("resnet18").double()
    rf.fuse_(model, memory="fast")
    other = copier(model)
    assert type(other.layer1[0]) is type(model.layer1[0])
    assert other.layer1[0].memory == "fast"
    x = images().double()
    assert torch.equal(other.eval()(x), model.eval()(x))
    rf.unfuse_(other)
    assert type(other.layer1[0]) is models.resnet.BasicBlock
    assert type(other.maxpool) is nn.MaxPool2d


def test_state_dicts_load_both_ways():
    fused, eager = small("resnet18"), small("resnet18")
    rf.fuse_(fused)
    eager.load_state_dict(fused.state_dict())
    fused.load_state_dict(eager.state_dict())
    own = rf.models.resnet18(num_classes=10)
    own.load_state_dict(eager.state_dict())
    eager.load_state_dict(own.state_dict())


def test_detection_backbones():
    model = small("resnet18").double().eval()
    x = images().double()
    expected = create_feature_extractor(copy.deepcopy(model), {"layer1": "a", "layer3.0": "b", "avgpool": "c"})(x)
    rf.fuse_(model)
    extractor = create_feature_extractor(model, {"layer1": "a", "layer3.0": "b", "avgpool": "c"})
    with recording() as calls:
        got = extractor(x)
    assert [call.reason for call in calls] == [None] * 8  # the blocks: the stem's modules stay apart, to be tapped
    for name, y in expected.items():
        torch.testing.assert_close(got[name], y)
    layers = IntermediateLayerGetter(model, {"layer1": "a"})(x)
    torch.testing.assert_close(layers["a"], expected["a"])


NETWORKS = {
    "torchvision": lambda: small("resnet18"),
    "timm": lambda: randomise(timm.create_model("resnet18", num_classes=10)),
    "timm, deep stem": lambda: randomise(timm.create_model("resnet18d", num_classes=10)),
}


def eager_and_fused(name: str, training: bool) -> tuple[nn.Module, nn.Module]:
    eager = NETWORKS[name]().double().train(training)
    fused = copy.deepcopy(eager)
    rf.fuse_(fused)
    return eager, fused


def assert_same(got, expected) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_stem_can_be_tapped_anywhere(name, training):
    """By a feature extractor, by a hook, and by calling the modules one by one."""
    x = images().double()
    taps = {n: n for n in ("conv1", "bn1", "relu" if name == "torchvision" else "act1", "maxpool", "layer1")}
    if name == "timm, deep stem":
        taps.pop("conv1")  # no leaf
    for tap in (
        lambda model: list(create_feature_extractor(model, taps)(x).values()),
        lambda model: list(IntermediateLayerGetter(model, taps)(x).values()),
        lambda model: hooked(model, taps, x),
    ):
        models_ = eager_and_fused(name, training)
        expected, got = (tap(model) for model in models_)
        assert_same(got, expected)
        assert_same(list(models_[1].buffers()), list(models_[0].buffers()))


def hooked(model: nn.Module, names, x: torch.Tensor) -> list[torch.Tensor]:
    seen = []
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _module, _args, y: seen.append(y.clone()))
    return [model(x), *seen]


@pytest.mark.parametrize("name", ["timm", "timm, deep stem"])
def test_timm_intermediates(name):
    eager, fused = eager_and_fused(name, True)
    x = images().double()
    (y, features), (z, ours) = (model.forward_intermediates(x) for model in (eager, fused))
    assert_same([z, *ours], [y, *features])
    for model in (eager, fused):
        model.prune_intermediate_layers([0])
    assert_same([fused(x)], [eager(x)])


def test_timm_gradient_checkpointing():
    steps, x = [], images().double()
    for model in eager_and_fused("timm", True):
        model.set_grad_checkpointing()
        y = model(x)
        steps.append([y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
    assert_same(*steps)


@pytest.mark.parametrize("change", ["hook", "other pool", "other norm"])
def test_a_stem_changed_later_runs_composed(change):
    eager, fused = eager_and_fused("torchvision", False)
    for model in (eager, fused):
        if change == "hook":
            model.relu.register_forward_hook(lambda _module, _args, y: 2 * y)
        elif change == "other pool":
            model.maxpool = nn.AvgPool2d(2)
        else:
            model.bn1 = nn.InstanceNorm2d(64)
    x = images().double()
    with recording() as calls:
        got = fused(x)
    reasons = {"hook": "relu has a forward hook", "other pool": "maxpool is a AvgPool2d"}
    assert calls[0].reason == reasons.get(change, "bn1 is a InstanceNorm2d")
    assert_same([got], [eager(x)])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_whole_networks_compile_and_export(name, training):
    torch._dynamo.reset()
    _, model = eager_and_fused(name, training)
    x = images().double()
    with recording() as calls:
        expected = copy.deepcopy(model)(x)
    tails = sum(m.shortcut_tail() is not None for m in model.modules() if isinstance(m, FusedBlock))
    assert tails == 3 * (name == "timm, deep stem")
    assert [call.reason for call in calls] == [None] * (9 + tails)  # the stem, eight blocks, and long shortcuts
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(copy.deepcopy(model), (x,))
    assert sum("bn_act_pool" in str(node.target) for node in exported.graph.nodes) == 1
    assert_same([compiled(x), exported.module()(x)], [expected, expected])


def test_a_whole_network_is_traced_by_jit():
    _, model = eager_and_fused("torchvision", False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, images().double())
        x = images(3).double()
        assert_same([traced(x)], [model(x)])


def test_bad_arguments():
    with pytest.raises(TypeError, match="model is a int"):
        rf.fuse_(3)
    with pytest.raises(TypeError, match="model is a int"):
        rf.unfuse_(3)
    model = small("resnet18")
    with pytest.raises(ValueError, match="memory is 'low'"):
        rf.fuse_(model, memory="low")
    assert type(model.layer1[0]) is models.resnet.BasicBlock


def test_a_shortcut_with_its_own_forward_runs_as_it_is():
    class Doubled(nn.Sequential):
        def forward(self, x):
            return 2 * super().forward(x)

    block = models.resnet.BasicBlock(8, 8, downsample=Doubled(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))).double().eval()
    x = torch.randn(2, 8, 6, 6).double()
    expected = block(x)
    (row,) = rf.fuse_(block).rows
    assert row.name == "model"
    assert "downsample runs as it is" in row.reason
    torch.testing.assert_close(block(x), expected)


def test_a_network_with_its_own_steps_keeps_its_stem():
    class WithStem(models.ResNet):
        def _forward_impl(self, x):
            return self.relu(self.bn1(self.conv1(x)))

    class WithFeatures(timm.models.resnet.ResNet):
        def forward_features(self, x):
            return self.act1(self.bn1(self.conv1(x)))

    for model in (
        WithStem(models.resnet.BasicBlock, [1, 1, 1, 1]),
        WithFeatures(timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=0, global_pool=""),
    ):
        x = images()
        expected = model.eval()(x)
        rf.fuse_(model)
        torch.testing.assert_close(model(x), expected)
