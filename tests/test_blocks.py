"""The drop-in blocks against torchvision's: constructor, state, results, and what makes them run composed."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from conftest import check_modules, observe_module, randomise, relative_error
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision.models import resnet as tv

import resnet_fused as rf
from resnet_fused.recorder import recording

BLOCKS = ["BasicBlock", "Bottleneck"]


def pair(name: str, planes: int = 4, **options) -> tuple[nn.Module, nn.Module]:
    """(fused, torchvision's) block of random state; stride != 1 brings its projection."""
    blocks = []
    for source in (rf, tv):
        cls = getattr(source, name)
        wide = planes * cls.expansion
        own = dict(options)
        if own.get("stride", 1) != 1:
            own["downsample"] = nn.Sequential(nn.Conv2d(wide, wide, 1, own["stride"], bias=False), nn.BatchNorm2d(wide))
        blocks.append(cls(wide, planes, **own))
    randomise(blocks[1])
    blocks[0].load_state_dict(blocks[1].state_dict())
    return blocks[0], blocks[1]


def activation(name: str, planes: int = 4, size: int = 6) -> torch.Tensor:
    x = torch.randn(3, planes * getattr(tv, name).expansion, size, size)
    return x.to(memory_format=torch.channels_last).requires_grad_()


def reasons(block: nn.Module, x: torch.Tensor) -> list[str | None]:
    with recording() as calls:
        copy.deepcopy(block)(x)
    return [call.reason for call in calls]


# -------------------------------------------------------------------------------------- constructor and state


@pytest.mark.parametrize("name", BLOCKS)
def test_signature_is_torchvisions(name) -> None:
    ours, theirs = (inspect.signature(getattr(source, name)) for source in (rf, tv))
    assert [(p.name, p.default, p.kind) for p in ours.parameters.values()] == [
        (p.name, p.default, p.kind) for p in theirs.parameters.values()
    ]
    assert getattr(rf, name).expansion == getattr(tv, name).expansion


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("stride", [1, 2])
def test_state_dict_both_ways(name, stride) -> None:
    fused, eager = pair(name, stride=stride)
    assert list(fused.state_dict()) == list(eager.state_dict())
    assert [n for n, _ in fused.named_children()] == [n for n, _ in eager.named_children()]
    nn.init.ones_(fused.conv1.weight)
    eager.load_state_dict(fused.state_dict())
    assert torch.equal(eager.conv1.weight, fused.conv1.weight)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [({"groups": 2}, ValueError), ({"base_width": 32}, ValueError), ({"dilation": 2}, NotImplementedError)],
)
def test_errors_are_torchvisions(arguments, error) -> None:
    messages = []
    for source in (rf, tv):
        with pytest.raises(error) as caught:
            source.BasicBlock(8, 8, **arguments)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_same_seed_same_initial_weights() -> None:
    for name in BLOCKS:
        states = []
        for source in (rf, tv):
            torch.manual_seed(7)
            states.append(getattr(source, name)(4 * getattr(tv, name).expansion, 4).state_dict())
        assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


def test_a_whole_torchvision_network_of_our_blocks() -> None:
    layers = [1, 1, 1, 1]
    eager = randomise(tv.ResNet(tv.Bottleneck, layers, num_classes=5, width_per_group=16))
    fused = tv.ResNet(rf.Bottleneck, layers, num_classes=5, width_per_group=16)
    check_modules(fused.eval(), eager.eval(), torch.randn(2, 3, 32, 32))


# -------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("BasicBlock", {}),
        ("BasicBlock", {"stride": 2}),
        ("Bottleneck", {}),
        ("Bottleneck", {"stride": 2}),
        ("Bottleneck", {"stride": 2, "dilation": 2}),
        ("Bottleneck", {"groups": 2, "base_width": 32}),
        ("Bottleneck", {"base_width": 128}),
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_agrees_with_torchvision(name, options, training) -> None:
    fused, eager = (block.train(training) for block in pair(name, **options))
    for memory in ("lean", "fast"):
        fused.memory = memory
        assert reasons(fused, activation(name)) == [None]
        check_modules(fused, eager, activation(name))


def test_norm_layer() -> None:
    fused, eager = pair("Bottleneck", norm_layer=lambda planes: nn.GroupNorm(2, planes))
    assert reasons(fused, activation("Bottleneck")) == ["bn1 is a GroupNorm"]
    check_modules(fused, eager, activation("Bottleneck"))


@pytest.mark.parametrize("training", [True, False])
def test_a_foreign_shortcut_runs_by_itself(training) -> None:
    """ResNet-D: average pool, conv, norm. The main path stays fused."""
    fused, eager = pair("Bottleneck")
    shortcut = nn.Sequential(nn.AvgPool2d(1), nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
    fused.downsample, eager.downsample = shortcut, copy.deepcopy(shortcut)
    assert reasons(fused, activation("Bottleneck")) == [None, None]  # the shortcut's conv and norm are fused, too
    check_modules(fused.train(training), eager.train(training), activation("Bottleneck"))
    fused.downsample[2].register_forward_hook(lambda *_: None)  # now the shortcut runs as it is
    assert reasons(fused, activation("Bottleneck")) == [None]


def test_an_empty_shortcut_is_the_identity() -> None:
    fused, eager = pair("BasicBlock")
    fused.downsample, eager.downsample = nn.Sequential(), nn.Sequential()
    with recording() as calls:
        copy.deepcopy(fused)(activation("BasicBlock"))
    assert [call.shortcut for call in calls] == ["identity"]
    check_modules(fused, eager, activation("BasicBlock"))


class Gate(nn.Module):
    """A shortcut with one value a channel."""

    def forward(self, x):
        return x.mean((2, 3), keepdim=True)


SHORTCUTS = {
    "foreign": lambda: Gate(),
    "projection to one pixel": lambda: nn.Sequential(nn.Conv2d(16, 16, 6, bias=False), nn.BatchNorm2d(16)),
    "projection to one channel": lambda: nn.Sequential(nn.Conv2d(16, 1, 1, bias=False), nn.BatchNorm2d(1)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_shortcut_that_broadcasts_runs_composed(name, shortcut, training) -> None:
    fused, eager = pair(name, 16 if name == "BasicBlock" else 4)
    eager.downsample = randomise(SHORTCUTS[shortcut]())
    fused.downsample = copy.deepcopy(eager.downsample)
    x = activation("Bottleneck")
    (reason,) = reasons(fused, x)
    assert "broadcasts to [3, 16, 6, 6]" in reason
    check_modules(fused.train(training), eager.train(training), x)


def test_an_identity_that_broadcasts_runs_composed() -> None:
    fused, eager = (source.BasicBlock(1, 8) for source in (rf, tv))
    x = torch.randn(2, 1, 6, 6).requires_grad_()
    assert reasons(fused, x) == ["the shortcut [2, 1, 6, 6] broadcasts to [2, 8, 6, 6]"]
    check_modules(fused, randomise(eager), x)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_conv_bn_act(norm, relu, residual) -> None:
    layer = randomise(rf.ConvBNAct(4, 6, 3, stride=2, padding=1, norm=norm, relu=relu)).double()
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    add = torch.randn(2, 6, 4, 4, dtype=torch.float64) if residual else None
    y = copy.deepcopy(layer)(x, add)
    want = layer.bn(layer.conv(x))
    want = want if add is None else want + add
    assert relative_error(y, want.relu() if relu else want) < 1e-12


# ------------------------------------------------------------------------------------- what runs composed


def hooked(block: nn.Module) -> str:
    block.conv2.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    return "conv2 has a forward hook"


def pre_hooked(block: nn.Module) -> str:
    block.bn1.register_forward_pre_hook(lambda _module, inputs: (inputs[0] + 1,))
    return "bn1 has a forward pre hook"


def backward_hooked(block: nn.Module) -> str:
    block.relu.register_full_backward_hook(lambda _module, grads, _outputs: (3 * grads[0],))
    block.relu.inplace = False
    return "relu has a backward hook"


def pruned(block: nn.Module) -> str:
    prune.l1_unstructured(block.conv1, "weight", amount=0.5)
    return "conv1 has a forward pre hook"


def parametrized(block: nn.Module) -> str:
    parametrizations.orthogonal(block.conv1)
    return "conv1 is a ParametrizedConv2d"


def replaced(block: nn.Module) -> str:
    block.conv2 = nn.Sequential(block.conv2, nn.Tanh())
    return "conv2 is a Sequential"


def other_activation(block: nn.Module) -> str:
    block.relu = nn.SiLU()
    return "relu is a SiLU"


def other_padding(block: nn.Module) -> str:
    block.conv2.padding_mode = "reflect"
    return "conv2 has padding_mode='reflect', padding=(1, 1)"


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(
    "change",
    [hooked, pre_hooked, backward_hooked, pruned, parametrized, replaced, other_activation, other_padding],
)
def test_changed_inner_layers_run_composed(name, change) -> None:
    fused, eager = pair(name)
    torch.manual_seed(1)
    reason = change(fused)
    torch.manual_seed(1)
    change(eager)
    x = activation(name)
    dy = torch.randn_like(x)
    with recording() as calls:
        got = observe_module(fused, x, dy)
    assert [c.reason for c in calls] == [reason]
    want = observe_module(eager, x, dy)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_forward_replaced_on_an_inner_layer_runs_composed() -> None:
    """Adapters that assign `layer.forward`, and subclasses, must be heard."""
    fused, _ = pair("BasicBlock")
    fused.conv1.forward = lambda x: nn.Conv2d.forward(fused.conv1, x) * 0
    x = activation("BasicBlock")
    with recording() as calls:  # no copy: it would keep the assigned forward of the original
        fused(x)
    assert [c.reason for c in calls] == ["conv1.forward is replaced"]


def test_global_hook_runs_composed() -> None:
    fused, _ = pair("BasicBlock")
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        assert reasons(fused, activation("BasicBlock")) == ["a global module hook is registered"]
    finally:
        handle.remove()
    assert seen.count("Conv2d") == 2


def test_hooks_on_the_block_itself() -> None:
    fused, eager = pair("Bottleneck")
    x = activation("Bottleneck")
    seen = []
    fused.register_forward_hook(lambda _m, _i, y: seen.append(y.shape))
    fused.register_full_backward_hook(lambda _m, grads, _o: seen.append(grads[0].shape))
    check_modules(fused, eager, x)
    assert seen == [x.shape, x.shape]


# --------------------------------------------------------------------------------------- as a module in use


@pytest.mark.parametrize("name", BLOCKS)
def test_copies(name) -> None:
    fused, eager = pair(name, stride=2)
    fused.memory = "fast"
    for clone in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert clone.memory == "fast"
        check_modules(clone, copy.deepcopy(eager), activation(name))
    fused.double(), eager.double()
    check_modules(fused, eager, activation(name).double().detach().requires_grad_())


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("training", [True, False])
def test_any_parameter_may_be_frozen(name, training) -> None:
    for frozen in [n for n, _ in tv.Bottleneck(16, 4).named_parameters()] + [
        "downsample.0.weight",
        "downsample.1.weight",
    ]:
        fused, eager = (block.train(training) for block in pair(name, stride=2))
        parameters = dict(fused.named_parameters())
        if frozen not in parameters:
            continue
        for block in (fused, eager):
            block.get_parameter(frozen).requires_grad_(False)
        check_modules(fused, eager, activation(name))
        assert parameters[frozen].grad is None


@pytest.mark.parametrize("name", BLOCKS)
def test_input_without_gradient(name) -> None:
    for stride in (1, 2):
        fused, eager = pair(name, stride=stride)
        check_modules(fused, eager, activation(name).detach())


@pytest.mark.parametrize("name", BLOCKS)
def test_applied_twice_in_one_graph(name) -> None:
    class Twice(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x):
            return self.block(self.block(x))

    fused, eager = pair(name)
    check_modules(Twice(fused), Twice(eager), activation(name))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_without_gradients(context, training) -> None:
    for name in BLOCKS:
        fused, eager = (block.train(training) for block in pair(name, stride=2))
        x = activation(name)
        with context():
            got, want = fused(x), eager(x)
        assert not got.requires_grad
        assert relative_error(got, want) < 1e-6
        for a, b in zip(fused.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(a, b)


def test_output_overwritten_by_what_follows() -> None:
    """Backward keeps bits of y, not y."""
    fused, eager = pair("Bottleneck")
    x = activation("Bottleneck")
    (got,) = torch.autograd.grad(fused(x).mul_(2).add_(1).square().sum(), x)
    (want,) = torch.autograd.grad((eager.double()(x.double()) * 2 + 1).square().sum(), x)
    assert relative_error(got, want) < 1e-5
