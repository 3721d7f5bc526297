"""`optimize_for_inference`: the folded, packed copy equals the model in eval mode, and refuses what it cannot do."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torchvision.models._utils import IntermediateLayerGetter

import resnet_fused as rf
from resnet_fused import folded, sliced

torchvision_models = pytest.importorskip("torchvision.models")
timm = pytest.importorskip("timm")

FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and affine parameters that a trained model could have: nothing is the identity."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.3, 0.9),
                (module.bias.data, -0.3, 0.3),
            ):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return model.eval()


def images(n: int = 2, size: tuple[int, int] = (64, 64), dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(1)).to(dtype)


def error(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


@torch.no_grad()
def assert_equal_within_rule(model: nn.Module, optimized: nn.Module, x: torch.Tensor) -> None:
    exact = copy.deepcopy(model).double()(x.double())
    eager, ours = model(x), optimized(x)
    assert ours.dtype == eager.dtype
    assert ours.shape == eager.shape
    assert error(ours, exact) <= 2 * error(eager, exact) + FLOOR[x.dtype]


NETWORKS = {
    "resnet18": torchvision_models.resnet18,
    "resnet50": torchvision_models.resnet50,
    "resnext50": torchvision_models.resnext50_32x4d,
    "wide_resnet50": torchvision_models.wide_resnet50_2,
    "timm-resnet18": lambda: timm.create_model("resnet18"),
    "timm-resnet50d": lambda: timm.create_model("resnet50d"),
    "timm-seresnet50": lambda: timm.create_model("seresnet50"),
    "timm-resnetblur50": lambda: timm.create_model("resnetblur50"),
    "timm-drops": lambda: timm.create_model("resnet26d", drop_path_rate=0.3, drop_block_rate=0.2),
}
COMPOSED = ("timm-seresnet50", "timm-resnetblur50")  # their blocks stay, with folded convolutions


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_eager_eval(name, fused):
    model = randomised(NETWORKS[name]())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    source = copy.deepcopy(model)
    if fused:
        rf.fuse_(source)
    optimized = rf.optimize_for_inference(source, images())
    assert_equal_within_rule(model, optimized, images())
    assert all(torch.equal(v, before[k]) for k, v in source.state_dict().items()), "the source model was changed"
    assert not any(isinstance(m, nn.BatchNorm2d) for m in optimized.modules())
    if name not in COMPOSED:
        assert not optimized.report.left


def test_report_names_what_was_left():
    optimized = rf.optimize_for_inference(timm.create_model("seresnet50").eval(), images())
    assert "layer1.0" in optimized.report.left
    assert "se is a" in optimized.report.left["layer1.0"]
    assert {"layer1.0.conv1", "layer1.0.conv3", "layer1.0.downsample.0"} <= set(optimized.report.folded)
    assert "left as they were" in str(optimized.report)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    model = randomised(torchvision_models.resnet18()).to(dtype)
    assert_equal_within_rule(model, rf.optimize_for_inference(model, images(dtype=dtype)), images(dtype=dtype))


@pytest.mark.parametrize("shape", [(1, (64, 64)), (5, (96, 80)), (3, (65, 63))])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_other_sizes_and_layouts(shape, layout):
    model = randomised(torchvision_models.resnet18())
    optimized = rf.optimize_for_inference(model, images())
    assert_equal_within_rule(model, optimized, images(*shape).contiguous(memory_format=layout))


def test_without_onednn():
    model = randomised(torchvision_models.resnet18())
    optimized = rf.optimize_for_inference(model, images())
    with torch.backends.mkldnn.flags(enabled=False):
        assert_equal_within_rule(model, optimized, images())


def test_copies_pickles_and_state_dicts_give_the_same():
    x = images()
    optimized = rf.optimize_for_inference(randomised(torchvision_models.resnet18()), x)
    other = rf.optimize_for_inference(randomised(torchvision_models.resnet18(), seed=5), x)
    with torch.no_grad():
        y = optimized(x)
        assert torch.equal(copy.deepcopy(optimized)(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(optimized))(x), y)
        assert not torch.equal(other(x), y)
        other.load_state_dict(optimized.state_dict())  # packed weights of before must not be used
        assert torch.equal(other(x), y)


def test_converting_the_copy_drops_the_packed_weights():
    x = images()
    optimized = rf.optimize_for_inference(randomised(torchvision_models.resnet18()), x)
    with torch.no_grad():
        y = optimized(x)
        z = optimized.to(torch.bfloat16)(x.bfloat16())
    assert error(z, y.double()) < 0.02


@pytest.mark.parametrize("kind", ["conv bias", "no affine", "two names", "single block", "conv unit"])
def test_unusual_structures(kind):
    torch.manual_seed(0)
    block = rf.reference.BasicBlock(8, 8)
    if kind == "conv bias":
        block.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=True)
    if kind == "no affine":
        block.bn1 = nn.BatchNorm2d(8, affine=False)
    model: nn.Module = nn.Sequential(block, nn.Conv2d(8, 8, 1))
    if kind == "two names":
        model = nn.Sequential(block, nn.Tanh(), block)
    if kind == "single block":
        model = block
    if kind == "conv unit":
        model = rf.ConvBNAct(8, 16, 3, padding=1)
    model.train()
    for _ in range(2):
        model(torch.randn(4, 8, 9, 9))
    model.eval()
    x = torch.randn(2, 8, 9, 9)
    optimized = rf.optimize_for_inference(model, x)
    assert optimized.report.folded
    assert_equal_within_rule(model, optimized, x)


def test_what_cannot_fold_is_left():
    block = rf.BasicBlock(8, 8)
    block.bn1 = nn.BatchNorm2d(8, track_running_stats=False)
    optimized = rf.optimize_for_inference(nn.Sequential(block), torch.randn(2, 8, 9, 9))
    assert "running statistics" in optimized.report.left["0"]
    hooked = rf.BasicBlock(8, 8)
    hooked.conv1.register_forward_hook(lambda *args: None)
    optimized = rf.optimize_for_inference(nn.Sequential(hooked), torch.randn(2, 8, 9, 9))
    assert "hook" in optimized.report.left["0"]


def test_refusals():
    x = images()
    optimized = rf.optimize_for_inference(randomised(torchvision_models.resnet18()), x)
    with pytest.raises(RuntimeError, match="forward-mode differentiation"), forward_ad.dual_level():
        optimized(forward_ad.make_dual(x, x))
    with pytest.raises(RuntimeError, match="requires grad"):
        optimized(x.clone().requires_grad_())
    with pytest.raises(RuntimeError, match=r"bfloat16, expected torch.float32"), torch.no_grad():
        optimized(x.bfloat16())
    with pytest.raises(TypeError, match="model is a int"):
        rf.optimize_for_inference(3, x)
    with pytest.raises(ValueError, match="example_input"):
        rf.optimize_for_inference(torchvision_models.resnet18(), x[0])
    assert not optimized(x).requires_grad


def test_empty_batch():
    optimized = rf.optimize_for_inference(randomised(torchvision_models.resnet18()), images())
    with torch.no_grad():
        assert optimized(torch.empty(0, 3, 64, 64)).shape == (0, 1000)


def test_wrong_channels_are_named():
    optimized = rf.optimize_for_inference(randomised(torchvision_models.resnet18()), images())
    with pytest.raises(ValueError, match=r"x has shape \[2, 4, 64, 64\], expected \[N, 3, H, W\]"), torch.no_grad():
        optimized(torch.randn(2, 4, 64, 64))


def test_made_in_inference_mode_and_used_outside():
    model = randomised(torchvision_models.resnet18())
    with torch.inference_mode():
        optimized = rf.optimize_for_inference(model, images())
    assert_equal_within_rule(model, optimized, images())
    assert optimized.double()(images().double()).dtype == torch.float64


def test_a_block_with_its_own_forward_is_left():
    class Doubled(rf.BasicBlock):
        def forward(self, x):
            return 2 * super().forward(x)

    model, x = nn.Sequential(Doubled(8, 8)).eval(), torch.randn(2, 8, 9, 9)
    optimized = rf.optimize_for_inference(model, x)
    assert "forward of its own" in optimized.report.left["0"]
    assert_equal_within_rule(model, optimized, x)


def test_a_shortcut_of_another_size_is_refused():
    unit = rf.optimize_for_inference(rf.ConvBNAct(8, 8, 3), torch.randn(1, 8, 9, 9))
    with pytest.raises(ValueError, match=r"residual is \[1, 8, 9, 9\]"):
        unit(torch.randn(1, 8, 9, 9), torch.randn(1, 8, 9, 9))


@pytest.mark.parametrize("kind", ["network", "sequence", "block", "unit"])
def test_training_mode_is_refused_before_anything_changes(kind):
    network = torchvision_models.resnet18()
    model = {
        "network": network,
        "sequence": nn.Sequential(nn.Dropout(), network, nn.Dropout()),
        "block": rf.BasicBlock(3, 3),
        "unit": rf.ConvBNAct(3, 3, 3),
    }[kind]
    optimized = rf.optimize_for_inference(model, images())
    for copied in (optimized, copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized))):
        with pytest.raises(RuntimeError, match="is the product of optimize_for_inference"):
            copied.train()
        assert not any(module.training for module in copied.modules())
        assert copied.eval() is copied


@pytest.mark.parametrize("inner", [False, True])
def test_a_compiled_model_is_unwrapped(inner):
    model = randomised(torchvision_models.resnet18())
    compiled = copy.deepcopy(model)
    if inner:
        compiled.layer1 = torch.compile(compiled.layer1)
    else:
        compiled = torch.compile(compiled)
    optimized = rf.optimize_for_inference(compiled, images())
    assert [name for name, _ in optimized.named_modules() if "_orig_mod" in name] == []
    assert "layer1.0" in optimized.report.folded
    assert_equal_within_rule(model, optimized, images())


@pytest.mark.parametrize("name", ["resnet18", "timm-seresnet50"])
@pytest.mark.parametrize("how", ["compile", "export", "trace"])
def test_a_packed_model_is_traced(how, name):
    model = randomised(NETWORKS[name]())
    optimized, x = rf.optimize_for_inference(model, images()), images()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "compile":
            torch._dynamo.reset()
            traced = torch.compile(optimized, fullgraph=True, backend="aot_eager")
        elif how == "export":
            traced = torch.export.export(optimized, (x,)).module()
        else:
            traced = torch.jit.trace(optimized, x)
    assert_equal_within_rule(model, traced, x)
    if how == "trace":
        assert_equal_within_rule(model, traced, images(3, (96, 80)))
    assert_equal_within_rule(model, optimized, x)  # its packed weights still serve


def test_features_of_an_optimized_model():
    """The stem's names give what they give in eager PyTorch; torch.fx traces the folded modules as leaves."""
    model, x = randomised(torchvision_models.resnet18()).double(), images(dtype=torch.float64)
    optimized = rf.optimize_for_inference(model, x)
    taps = {name: name for name in ("relu", "maxpool", "layer1")}
    expected, got = (IntermediateLayerGetter(m, taps)(x) for m in (model, optimized))
    for name in taps:
        torch.testing.assert_close(got[name], expected[name])
    traced = torch.fx.symbolic_trace(optimized)
    assert "layer1_0" in [node.name for node in traced.graph.nodes]
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("layer", ["conv1", "bn1", "act1", "downsample.0", "downsample.1", "downsample"])
def test_a_hook_keeps_its_layer(layer):
    """Of a block that runs composed: what is watched is not folded, and the rest is."""
    network = timm.create_model("seresnet18", num_classes=10)
    model = randomised(network.layer2[0]).double()
    model.get_submodule(layer).register_forward_hook(lambda _module, _args, y: 2 * y)
    x = torch.randn(2, 64, 9, 9, dtype=torch.float64)
    optimized = rf.optimize_for_inference(nn.Sequential(model), x)
    assert "0.conv2" in optimized.report.folded
    assert_equal_within_rule(nn.Sequential(model), optimized, x)


@pytest.mark.parametrize("mkldnn", [True, False])
@pytest.mark.parametrize("kernel", [9, 1])
def test_a_shortcut_that_broadcasts(kernel, mkldnn):
    """To one pixel, and to one channel."""
    out = 8 if kernel == 9 else 1
    block = rf.BasicBlock(8, 8, downsample=nn.Sequential(nn.Conv2d(8, out, kernel), nn.BatchNorm2d(out)))
    model, x = randomised(nn.Sequential(block)), torch.randn(2, 8, 9, 9)
    with torch.backends.mkldnn.flags(enabled=mkldnn):
        assert_equal_within_rule(model, rf.optimize_for_inference(model, x), x)


def test_a_shortcut_that_is_a_unit_is_folded():
    block = rf.BasicBlock(8, 8, downsample=rf.ConvBNAct(8, 8, 1, relu=False))
    model, x = randomised(nn.Sequential(block)), torch.randn(2, 8, 9, 9)
    optimized = rf.optimize_for_inference(model, x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in optimized.modules())
    assert_equal_within_rule(model, optimized, x)


def test_weights_changed_behind_its_back_are_packed_again():
    x = images()
    optimized = rf.optimize_for_inference(randomised(torchvision_models.resnet18()), x)
    other = rf.optimize_for_inference(randomised(torchvision_models.resnet18(), seed=5), x)
    with torch.no_grad():
        expected = other(x)
        got = torch.func.functional_call(optimized, other.state_dict(), (x,))
        assert torch.equal(got, expected)
        assert not torch.equal(optimized(x), expected)
        for name, buffer in optimized.named_buffers():
            buffer.copy_(other.get_buffer(name))
        optimized.fc = other.fc
        assert torch.equal(optimized(x), expected)


# ------------------------------------------------------------------------------------------------ slices of images


SLICED = {name: NETWORKS[name] for name in ("resnet18", "resnet50", "timm-resnet18", "timm-resnet50d")}
SLICED |= {"our resnet50": rf.models.resnet50, "our v1": lambda: rf.models.resnet18(shortcut="A", stride_on="conv1")}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Slices of at most two images of 64 x 64 in float32, and how many the blocks of one call got."""
    monkeypatch.setattr(sliced, "SLICE_BYTES", -(-2 * 16 * 64 * 64 * 4 // torch.get_num_threads()))
    found: list[int] = []
    run = folded.FoldedBlock.forward

    def counted(self: folded.FoldedBlock, x: torch.Tensor) -> torch.Tensor:
        found.append(int(x.shape[0]))  # of a trace a tensor
        return run(self, x)

    monkeypatch.setattr(folded.FoldedBlock, "forward", counted)
    return found


@pytest.mark.parametrize("name", SLICED)
def test_slices_give_what_the_whole_gives(name: str, calls: list[int]) -> None:
    model = randomised(SLICED[name]())
    optimized = rf.optimize_for_inference(model, images())
    x = images(7)
    assert_equal_within_rule(model, optimized, x)
    first = sum(len(getattr(model, f"layer{i}")) for i in (1, 2))
    behind = sum(len(getattr(model, f"layer{i}")) for i in (3, 4))
    del calls[:]
    with torch.no_grad():
        y = optimized(x)
        assert calls == [n for n in (2, 2, 2, 1) for _ in range(first)] + [7] * behind
        assert torch.equal(pickle.loads(pickle.dumps(optimized))(x), y)
        del calls[:]
        optimized(images(2))
        assert {*calls} == {2}
        assert optimized(images(0)).shape == (0, 1000)
    with pytest.raises(ValueError, match=r"\[7, 2, 64, 64\], expected \[N, 3, H, W\]"):
        optimized(x[:, :2])
    with pytest.raises(RuntimeError, match="requires grad"):
        optimized(x.requires_grad_())


def test_a_nested_network_runs_by_slices(calls: list[int]) -> None:
    model = nn.Sequential(nn.Identity(), randomised(torchvision_models.resnet18()))
    optimized = rf.optimize_for_inference(model, images())
    assert_equal_within_rule(model, optimized, images(5))
    assert {*calls} == {1, 2, 5}
    with pytest.raises(RuntimeError, match="no batch norms left to train"):
        optimized.train()


def test_whoever_watches_or_differs_gets_the_whole_batch(calls: list[int]) -> None:
    x = images(5)
    optimized = rf.optimize_for_inference(randomised(torchvision_models.resnet18()), images())

    def sizes() -> set[int]:
        del calls[:]
        with torch.no_grad():
            optimized(x)
        return {*calls}

    assert sizes() == {1, 2, 5}
    seen: list[int] = []
    handles = [
        optimized.layer1[1].register_forward_hook(lambda module, args, y: seen.append(len(y))),
        nn.modules.module.register_module_forward_pre_hook(lambda module, args: None),
    ]
    for handle in handles:
        assert sizes() == {5}
        handle.remove()
    assert {*seen} == {5}
    assert sizes() == {1, 2, 5}
    layer1 = optimized.layer1
    optimized.layer1 = nn.Sequential(layer1, nn.BatchNorm2d(64, track_running_stats=False).eval())  # of the whole batch
    assert sizes() == {5}
    optimized.layer1 = layer1
    del calls[:]
    traced = torch.jit.trace(optimized, x, check_trace=False)
    assert {*calls} == {5}
    with torch.no_grad():
        torch.testing.assert_close(traced(x), optimized(x))
        taps = IntermediateLayerGetter(optimized, {"layer1": "a", "layer3": "b"})(x)
    assert [len(t) for t in taps.values()] == [5, 5]


def test_networks_with_steps_of_their_own(calls: list[int]) -> None:
    class Normalising(rf.models.ResNet):
        def stem(self, x: torch.Tensor) -> torch.Tensor:
            return super().stem((x - 0.5) / 0.2)

    class WithRelu(timm.models.resnet.ResNet):  # which is not its activation
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.relu = nn.Identity()

    ours = Normalising(rf.BasicBlock, (1, 1, 1, 1))
    theirs = WithRelu(timm.models.resnet.BasicBlock, (1, 1, 1, 1))
    other = WithRelu(timm.models.resnet.BasicBlock, (1, 1, 1, 1))
    other.act1 = nn.Hardswish()
    for model, sizes in ((ours, {5}), (theirs, {1, 2, 5}), (other, {5})):
        optimized = rf.optimize_for_inference(randomised(model), images())
        del calls[:]
        assert_equal_within_rule(model, optimized, images(5))
        assert {*calls} == sizes


@pytest.mark.parametrize("make", [rf.models.resnet18, torchvision_models.resnet18], ids=["ours", "torchvision"])
def test_optimized_twice(make, calls: list[int]) -> None:
    model = randomised(make())
    once = rf.optimize_for_inference(model, images())
    twice = rf.optimize_for_inference(once, images())
    assert type(twice) is type(once)
    del calls[:]
    assert_equal_within_rule(model, twice, images(5))
    assert {*calls} == {1, 2, 5}


@pytest.mark.parametrize("before", [True, False])
def test_timms_checkpointing(before: bool, calls: list[int]) -> None:
    model = randomised(timm.create_model("resnet18"))
    if before:
        model.set_grad_checkpointing(True)
    optimized = rf.optimize_for_inference(model, images())
    optimized.set_grad_checkpointing(True)
    del calls[:]
    assert_equal_within_rule(model, optimized, images(5))
    assert {*calls} == {1, 2, 5}
