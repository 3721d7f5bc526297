"""The blocks under PyTorch's own tools: autocast, compile, export, functional_call, checkpoint, torch.func, fx, jit."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import assert_agrees, draw_modules, observe_module, randomise, relative_error
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet as tv

import resnet_fused as rf
from resnet_fused.recorder import recording

MODULES = ["BasicBlock", "Bottleneck", "projection", "stem"]


class EagerStem(nn.BatchNorm2d):
    """The stem's tail as torchvision runs it."""

    def forward(self, x):
        return nn.functional.max_pool2d(super().forward(x).relu(), 3, 2, 1)


def build(name: str, source, channels: int = 16) -> nn.Module:
    """One of MODULES from `rf` or `tv`, for an input of `channels`."""
    if name == "stem":
        return rf.BNReLUMaxPool(channels) if source is rf else EagerStem(channels)
    if name == "projection":
        shortcut = nn.Sequential(nn.Conv2d(channels, 2 * channels, 1, 2, bias=False), nn.BatchNorm2d(2 * channels))
        return source.Bottleneck(channels, channels // 2, stride=2, downsample=shortcut)
    cls = getattr(source, name)
    return cls(channels, channels // cls.expansion)


def fused_and_eager(name: str, channels: int = 16) -> tuple[nn.Module, nn.Module]:
    eager = randomise(build(name, tv, channels))
    fused = build(name, rf, channels)
    fused.load_state_dict(eager.state_dict())
    return fused, eager


def activation(n: int = 2, size: int = 8, channels: int = 16) -> torch.Tensor:
    return torch.randn(n, channels, size, size).to(memory_format=torch.channels_last).requires_grad_()


def assert_same_step(got: nn.Module, want: nn.Module, x: torch.Tensor, tolerance: float = 0.0) -> None:
    """One step of both gives the same outputs, gradients and buffers."""
    with torch.no_grad():
        dy = torch.randn_like(copy.deepcopy(want)(x))
    a, b = observe_module(got, x, dy), observe_module(want, x, dy)
    b = {name.removeprefix("_orig_mod."): t for name, t in b.items()}
    a = {name.replace("_orig_mod.", ""): t for name, t in a.items()}
    assert a.keys() == b.keys()
    for name, t in b.items():
        assert a[name].dtype == t.dtype
        assert relative_error(a[name], t) <= tolerance, name


# ------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["BasicBlock", "Bottleneck", "projection"])
def test_autocast(name, training, dtype) -> None:
    """Eager's dtypes of the output and of every gradient, and its accuracy."""
    draws = []
    for _ in range(3):  # large enough for many signs to flip: a single flip is chance
        fused, eager = (module.train(training) for module in fused_and_eager(name, 64))
        draws.append(draw_modules(fused, eager, activation(2, 28, 64), autocast=dtype))
    assert draws[0][0]["y"].dtype == dtype
    assert_agrees(draws, dtype)


def test_autocast_of_the_stem() -> None:
    """What reaches it is bfloat16, its parameters are not."""
    draws = []
    for _ in range(6):
        fused, eager = fused_and_eager("stem")
        x = activation(size=24).detach().bfloat16().requires_grad_()
        draws.append(draw_modules(fused, eager, x, autocast=torch.bfloat16))
    assert_agrees(draws, torch.bfloat16)


def test_autocast_leaves_float64_alone() -> None:
    fused, eager = (module.double() for module in fused_and_eager("Bottleneck"))
    x = activation().detach().double().requires_grad_()
    assert_agrees([draw_modules(fused, eager, x, autocast=torch.bfloat16)], torch.float64)


# ---------------------------------------------------------------------------------------- compile and export


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_compile(name, training, dynamic) -> None:
    """One graph, without breaks, that gives what the module gives without it; dynamic: at other sizes as well."""
    torch._dynamo.reset()
    module = randomise(build(name, rf)).train(training)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n, size in [(2, 8), (3, 10)] if dynamic else [(2, 8)]:
        assert_same_step(compiled, module, activation(n, size), tolerance=1e-6)


def test_compile_with_inductor() -> None:
    torch._dynamo.reset()
    module = build("Bottleneck", rf)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True)
    assert_same_step(compiled, module, activation(), tolerance=1e-6)


def test_compile_without_gradients() -> None:
    torch._dynamo.reset()
    for name in MODULES:
        module = randomise(build(name, rf)).eval()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            x = activation()
            assert relative_error(compiled(x), module(x)) < 1e-6


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_export(name, training) -> None:
    """The exported graph holds our ops and trains as the module does."""
    module = randomise(build(name, rf)).train(training)
    x = activation()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(copy.deepcopy(module), (x.detach(),))
    targets = {str(node.target) for node in program.graph.nodes}
    assert any(target.startswith("resnet_fused.") for target in targets)
    exported = program.module()
    assert_same_step(exported, module, x, tolerance=1e-6)


# ----------------------------------------------------------------------------------- functional transforms


@pytest.mark.parametrize("name", MODULES)
def test_functional_call(name) -> None:
    module, other = (randomise(build(name, rf)) for _ in range(2))
    x = activation()
    state = {n: t.detach().clone().requires_grad_() for n, t in other.named_parameters()}
    y = torch.func.functional_call(module, state, (x,))
    grads = torch.autograd.grad(y.square().sum(), list(state.values()))
    other(x).square().sum().backward()
    for parameter, grad in zip(other.parameters(), grads, strict=True):
        assert torch.equal(parameter.grad, grad)


@pytest.mark.parametrize("name", MODULES)
def test_torch_func_grad(name) -> None:
    """Transforms run the composed form."""
    module = randomise(build(name, rf)).eval().double()
    x = activation().double()

    def loss(parameters: dict) -> torch.Tensor:
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    parameters = {n: t.detach() for n, t in module.named_parameters()}
    with recording() as calls:
        grads = torch.func.grad(loss)(parameters)
    assert [c.reason for c in calls] == ["inside a torch.func transform"]
    module(x).square().sum().backward()
    for n, parameter in module.named_parameters():
        assert relative_error(grads[n], parameter.grad) < 1e-12


@pytest.mark.parametrize("name", MODULES)
def test_vmap(name) -> None:
    module = randomise(build(name, rf)).eval()
    xs = torch.stack([activation().detach() for _ in range(3)])
    got = torch.vmap(module)(xs)
    for x, y in zip(xs, got, strict=True):
        assert relative_error(y, module(x)) < 1e-5


@pytest.mark.parametrize("name", MODULES)
def test_forward_mode_runs_composed(name) -> None:
    fused, eager = (m.eval().requires_grad_(False) for m in fused_and_eager(name))
    x, v = activation().detach(), activation().detach()

    def tangent(module: nn.Module) -> torch.Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(module(forward_ad.make_dual(x, v))).tangent

    torch.testing.assert_close(tangent(fused), tangent(eager))


def test_jvp_and_hessian_run_composed() -> None:
    """Forward mode and second derivatives through torch.func."""
    module = randomise(build("Bottleneck", rf)).eval().double()
    x, v = (activation(1, 3).detach().double() for _ in range(2))
    _, tangent = torch.func.jvp(module, (x,), (v,))
    step = 1e-6
    numeric = (module(x + step * v) - module(x - step * v)) / (2 * step)
    assert relative_error(tangent, numeric) < 1e-6
    hessian = torch.func.hessian(lambda x: module(x).square().sum())(x[:, :, :1, :1])
    assert torch.isfinite(hessian).all()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_checkpoint(name, reentrant) -> None:
    """Gradients are those of a plain step. Reentrant, the statistics move twice, as eager's do; otherwise the second
    run stops once it has what backward needs, and what moved by then is each module's own affair."""

    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    fused, eager = (Checkpointed(module) for module in fused_and_eager(name))
    runs = draw_modules(fused, eager, activation())
    if not reentrant:
        runs = tuple({n: t for n, t in run.items() if n == "y" or "gradient" in n} for run in runs)
    assert_agrees([runs], torch.float32)


# --------------------------------------------------------------------------------------------- fx and jit


@pytest.mark.parametrize("training", [True, False])
def test_symbolic_trace(training) -> None:
    """A block stays one node, and remains fused in the traced module."""
    model = nn.Sequential(*(randomise(build(name, rf)) for name in ("stem", "Bottleneck", "projection"))).train(
        training
    )
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    with recording() as calls:
        copy.deepcopy(traced)(activation())
    assert [c.reason for c in calls] == [None] * 3
    assert_same_step(traced, model, activation())


@pytest.mark.parametrize("name", MODULES)
def test_jit_trace(name) -> None:
    module = randomise(build(name, rf)).eval()
    x = activation().detach()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, x)
        other = activation().detach()
        assert relative_error(traced(other), module(other)) < 1e-6


@pytest.mark.parametrize("name", [*MODULES, "network", "optimized"])
def test_jit_script_is_refused(name) -> None:
    """Clearly, and the model stays as it was; what `unfuse_` gives back is scripted."""
    model: nn.Module = tv.resnet18()
    if name in MODULES:
        model = nn.Sequential(build(name, rf))
    else:
        rf.fuse_(model)
    x = torch.randn(2, 16 if name in MODULES else 3, 64, 64)
    if name == "optimized":
        model = rf.optimize_for_inference(model, x)
    kinds = [type(module) for module in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match=r"torch\.jit\.script does not take a"):
            torch.jit.script(model)
        assert [type(module) for module in model.modules()] == kinds
        if name == "network":
            scripted = torch.jit.script(rf.unfuse_(model.eval()))
            assert torch.equal(scripted(x), model(x))


def test_saved_tensor_hooks_and_cpu_offload() -> None:
    """What is saved can be packed away and comes back the same."""
    fused, eager = fused_and_eager("projection")
    x = activation()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        y = fused(x)
    grad = torch.autograd.grad(y.square().sum(), x)[0]
    assert relative_error(grad, torch.autograd.grad(eager(x).square().sum(), x)[0]) < 1e-5


def test_backward_twice_and_retain_graph() -> None:
    for name in MODULES:
        module = randomise(build(name, rf))
        x = activation()
        y = module(x).sum()
        (first,) = torch.autograd.grad(y, x, retain_graph=True)
        (second,) = torch.autograd.grad(y, x)
        assert torch.equal(first, second)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(y, x)


def test_input_changed_in_place_before_backward_is_noticed() -> None:
    """As in eager: an input that backward needs and that was overwritten raises instead of giving wrong numbers."""
    module = build("Bottleneck", rf)
    x = activation().detach()
    y = module(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_first_thing_that_a_process_does_may_be_to_compile() -> None:
    code = """if True:
        import torch, resnet_fused as rf
        model = torch.nn.Sequential(rf.BNReLUMaxPool(8), rf.Bottleneck(8, 2), rf.BasicBlock(8, 8))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        compiled(torch.randn(2, 8, 9, 9)).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=Path(__file__).parents[1])
