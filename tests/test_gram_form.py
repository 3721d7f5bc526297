"""The Gram form where its variance cancels: nearly dependent channels, and weight rows that ignore what they share."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import Case, assert_agrees, geometric_mean, random_unit
from torch import Tensor

from resnet_fused.functional import ConvBN
from resnet_fused.ops import block, end_unit
from resnet_fused.ops.gram_form import Gram, cancelling, conv_stats, gram_of, sample_center
from resnet_fused.recorder import recording

C, K = 16, 64  # operand channels and outputs: a shape that takes the Gram form
CORRELATIONS = [0.0, 0.9, 0.999, 0.9999, 1.0]
ROWS = ["random", "along", "across", "one across"]
MEANS = {torch.float32: [0.0, 1.0, 64.0, 1e3], torch.bfloat16: [0.0, 1.0, 16.0, 64.0]}


def correlated(shape: tuple[int, ...], correlation: float, dim: int = 1) -> Tensor:
    """Standard normal numbers whose slices along `dim` have this correlation with each other."""
    common = torch.randn([1 if i == dim else n for i, n in enumerate(shape)], dtype=torch.float64)
    return math.sqrt(correlation) * common + math.sqrt(1 - correlation) * torch.randn(shape, dtype=torch.float64)


def operand(correlation: float, mean: float = 0.0, size: int = 20) -> Tensor:
    """[2, C, size, size] with channels of this correlation, standard deviation 1 and this mean."""
    x = correlated((2, C, size, size), correlation) + mean
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def rows(kind: str) -> Tensor:
    """Weights [K, C] along the direction that correlated channels share, or across it."""
    random = torch.randn(K, C, dtype=torch.float64) / C**0.5
    across = random - random.mean(1, keepdim=True)
    along = across / 4 + 1 / C**0.5
    return {"random": random, "along": along, "across": across, "one across": torch.cat([across[:1], along[1:]])}[kind]


def with_weight(unit: ConvBN, weight: Tensor) -> ConvBN:
    return replace(unit, weight=weight.reshape(unit.weight.shape).clone().requires_grad_())


def gram_case(shortcut: str, correlation: float, kind: str, relu: bool = False, size: int = 20) -> Case:
    """A block whose end unit with weights `kind` is in the Gram form, on an operand of this correlation.

    "identity": the last of two units, on activations; "tensor": the only unit; "projection": the shortcut.
    """
    last = with_weight(random_unit(C, K), rows(kind))
    if shortcut == "projection":
        return Case(operand(correlation, size=size), (random_unit(C, K, 3, padding=(1, 1)),), last, relu)
    if shortcut == "tensor":
        residual = torch.randn(2, K, size, size, dtype=torch.float64).requires_grad_()
        return Case(operand(correlation, size=size), (last,), residual, relu)
    first = with_weight(random_unit(K, C), correlated((C, K), correlation, dim=0) / K**0.5)
    same = {"gamma": torch.ones(C, dtype=torch.float64), "beta": torch.full((C,), 0.5, dtype=torch.float64)}
    first = replace(first, **{name: t.requires_grad_() for name, t in same.items()})
    x = torch.randn(2, K, size, size, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    return Case(x, (first, last), "identity", relu)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The outputs found to cancel, one list a call: in forward, then in backward."""
    calls: list[list[int]] = []

    def spy(*args: Tensor) -> Tensor:
        calls.append(cancelling(*args).tolist())
        return cancelling(*args)

    for module in (block, end_unit):
        monkeypatch.setattr(module, "cancelling", spy)
    return calls


# ----------------------------------------------------------------------------------------- the tolerance rule


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("correlation", CORRELATIONS)
@pytest.mark.parametrize("shortcut", ["identity", "tensor", "projection"])
def test_agrees_with_eager(shortcut, correlation, kind, dtype) -> None:
    """Without the ReLU: in float32 one sign that flips by rounding, which is chance, outweighs what is tested.

    The channels' errors are one error where they are nearly dependent, and its tail is long: hence many draws.
    """
    draws = [gram_case(shortcut, correlation, kind).to(dtype).draw() for _ in range(16)]
    assert_agrees(draws, dtype, geometric_mean)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("correlation", [0.9, 0.9999])
@pytest.mark.parametrize("shortcut", ["identity", "tensor", "projection"])
def test_agrees_with_eager_with_relu(shortcut, correlation, kind) -> None:
    """In bfloat16 hundreds of signs flip: the mask is that of the outputs that were computed again."""
    draws = [gram_case(shortcut, correlation, kind, relu=True, size=32).to(torch.bfloat16).draw() for _ in range(3)]
    assert_agrees(draws, torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "mean"), [(dtype, mean) for dtype, means in MEANS.items() for mean in means[1:]], ids=str
)
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("correlation", [0.0, 0.9, 0.9999])
def test_agrees_with_eager_at_large_means(correlation, kind, dtype, mean) -> None:
    def case() -> Case:
        own = gram_case("tensor", correlation, kind)
        return replace(own, x=(own.x.detach() + mean).requires_grad_()).to(dtype)

    assert_agrees([case().draw() for _ in range(2)], dtype)


@pytest.mark.parametrize("frozen", ["x", "weight", "gamma", "beta"])
@pytest.mark.parametrize("shortcut", ["identity", "projection"])
def test_any_tensor_may_refuse_its_gradient(shortcut, frozen, found) -> None:
    case = gram_case(shortcut, 0.999, "across").to(torch.float32)
    for name, t in case.named():
        if name.endswith(frozen):
            t.requires_grad_(False)
    case.check()
    assert all(len(outputs) == K for outputs in found)


# ---------------------------------------------------------------------------------------------- the variance


def batch_variance(x: Tensor, weight: Tensor) -> Tensor:
    """The variance [K] of the 1x1 convolution's output, as the op makes it."""
    momentum = {"momentum": 1.0, "running_mean": torch.zeros(K), "running_var": torch.ones(K)}
    vectors = {"gamma": torch.ones(K), "beta": torch.zeros(K)}
    case = Case(x, (ConvBN(weight.view(K, C, 1, 1), **vectors, **momentum),))
    with recording() as calls:
        case.fused()
    assert [unit.plan for unit in calls[0].spec.units] == ["gram"]
    pixels = x.numel() // C
    return momentum["running_var"] * (pixels - 1) / pixels


def exact_variance(a: Tensor, weight: Tensor) -> Tensor:
    """In float64, of the operand as it was rounded."""
    pixels = a.detach().double().permute(0, 2, 3, 1).reshape(-1, C)
    return ((pixels - pixels.mean(0)) @ weight.double().t()).var(0, correction=0)


@pytest.mark.parametrize(("dtype", "mean"), [(dtype, mean) for dtype in MEANS for mean in MEANS[dtype]], ids=str)
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("correlation", CORRELATIONS[:-1])
def test_variance(correlation, kind, dtype, mean) -> None:
    x, weight = operand(correlation, mean).detach().to(dtype), rows(kind).to(dtype)
    exact = exact_variance(x, weight)
    assert ((batch_variance(x, weight) - exact).abs() / exact).max() <= 1e-3


def sum_error(gram: Gram, a: Tensor) -> float:
    """Of the covariances [C, C] of the operand a, as a share of the deviations' product: that of sums over pixels,
    which depends on how the CPU's library adds them up."""
    exact = torch.cov(a.double().permute(0, 2, 3, 1).reshape(-1, C).t(), correction=0)
    deviations = exact.diagonal().sqrt()
    return float(((gram.cov - exact) / deviations.outer(deviations)).abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_variance_that_the_gram_form_keeps(dtype) -> None:
    """The outputs left to it are within the bound that gram_form.py states; for those it gives up, it is not."""
    weight = torch.cat([rows("random"), rows("across")]).to(dtype)
    errors, given_up, eps = [], [], 0.0
    for correlation in (0.0, 0.5, 0.8, 0.9, 0.999, 0.9999):
        x = operand(correlation, size=40).detach().to(dtype)
        center = sample_center(x)
        a, mean = torch.ops.resnet_fused.gram_operand(x, None, None, False, center, 1)
        gram = gram_of(a, mean, center)
        eps = max(eps, sum_error(gram, a))
        _, variance = conv_stats(gram, weight.view(-1, C, 1, 1))
        lost = torch.zeros(len(weight), dtype=torch.bool)
        lost[cancelling(gram, weight, variance)] = True
        error = (variance / exact_variance(a, weight) - 1).abs()
        errors += error[~lost].tolist()
        given_up += error[lost].tolist()
    bound = 8 * 2 * eps
    assert eps < 16 * torch.finfo(torch.float32).eps, "of 3200 pixels"
    assert len(errors) > 300
    assert max(errors) <= bound
    assert max(given_up) > 16 * bound


# --------------------------------------------------------------------------------- which outputs leave the form


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shortcut", ["identity", "tensor", "projection"])
@pytest.mark.parametrize(
    ("correlation", "kind", "expected"),
    [
        (0.0, "random", []),
        (0.0, "across", []),
        (0.9999, "along", []),
        (0.9999, "one across", [0]),
        (0.9999, "across", list(range(K))),
    ],
)
def test_outputs_found_to_cancel(shortcut, correlation, kind, expected, dtype, found) -> None:
    """Usually none, and never more than those that cancel: forward and backward agree on them."""
    case = gram_case(shortcut, correlation, kind).to(dtype)
    case.observe("fused", torch.ones_like(case.fused()))
    assert found == 3 * [expected]


def test_nothing_cancels_in_what_is_constant() -> None:
    """Zero weights, dead channels and NaN: the variance is not below a share of nothing."""
    gram = gram_of(torch.zeros(2, C, 4, 4), torch.zeros(C), torch.zeros(C))
    weight = rows("random").float()
    assert cancelling(gram, weight, torch.zeros(K)).numel() == 0
    gram = gram._replace(cov=torch.eye(C))
    assert cancelling(gram, 0 * weight, torch.zeros(K)).numel() == 0
    assert cancelling(gram, weight, torch.full((K,), float("nan"))).numel() == 0
    assert cancelling(gram, weight, torch.zeros(K)).tolist() == list(range(K))


# ------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("kind", ["one across", "across"])
@pytest.mark.parametrize("shortcut", ["identity", "tensor", "projection"])
def test_gradcheck(shortcut, kind, relu, found) -> None:
    case = gram_case(shortcut, 0.99, kind, relu, size=6)
    leaves = case.leaves()

    def call(*tensors: Tensor) -> Tensor:
        return case.with_tensors(dict(case.named()) | dict(zip(leaves, tensors, strict=True))).fused()

    assert torch.autograd.gradcheck(call, tuple(leaves.values()), fast_mode=True)
    assert all(0 in outputs for outputs in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_strided_projection_beside_a_gram_unit(dtype, found) -> None:
    """Two Gram units, one strided, with outputs that cancel in one of them only: they are joined all the same."""
    draws = []
    for _ in range(3):
        first = random_unit(C, C, 3, stride=(2, 2), padding=(1, 1))
        projection = with_weight(random_unit(C, K, stride=(2, 2)), rows("one across"))
        case = Case(operand(0.999), (first, random_unit(C, K)), projection, relu=False)
        draws.append(case.to(dtype).draw())
    assert_agrees(draws, dtype)
    assert found == 3 * [[], [0], [], [0]]


def test_compiles_to_one_graph() -> None:
    """Which outputs cancel is decided inside the op: the graph does not depend on the data."""
    case = gram_case("identity", 0.999, "across").to(torch.float32)
    compiled = torch.compile(case.fused, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(how().square().sum(), case.x)[0] for how in (compiled, case.fused)]
    assert torch.equal(*grads)
