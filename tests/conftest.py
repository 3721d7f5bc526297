"""Tools of all tests: the tolerance rule, and builders of random blocks that run fused, eager and in float64."""

from __future__ import annotations

import copy
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device import device as device  # a fixture
from hypothesis import Phase, settings
from tiny_runs import mnist as mnist
from tiny_runs import no_pictures as no_pictures
from tiny_runs import tiny as tiny
from torch import Tensor, nn

from resnet_fused import functional, reference, tuned
from resnet_fused.functional import ConvBN

# Reproducible everywhere; a slow machine is no failure; and an example of a few pixels needs no shrinking.
settings.register_profile(
    "tests", derandomize=True, deadline=None, max_examples=40, database=None, phases=(Phase.explicit, Phase.generate)
)
settings.load_profile("tests")

# What a handful of roundings of the dtype amount to, as a relative norm error. (In float64 the reference is eager
# itself: there the floor also leaves room for how ill-conditioned a tiny batch can be.)
FLOOR = {torch.float64: 1e-9, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
TENSORS = ("weight", "bias", "gamma", "beta", "running_mean", "running_var", "num_batches_tracked")
TRAINABLE = ("weight", "bias", "gamma", "beta")

Observed = dict[str, Tensor]
_NONE = SimpleNamespace(params={})


os.environ.setdefault("RESNET_FUSED_BENCH_DEVICE", "cpu")  # of benchmarks/suite.py, before it is imported
if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores: threads of several would wait for each other. But on one thread and without AVX-512
    # oneDNN's wgrad of a strided 1x1 convolution with fewer than eight channels, eager's too, writes past its end.
    torch.set_num_threads(1 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 2)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what runs on a GPU: `make gpu-check` chooses by it; and as slow most of a test's emulated cases."""
    emulated: dict[Any, list[Any]] = {}
    for item in items:
        if isinstance(item, pytest.Function):
            values = [v for v in getattr(item, "callspec", _NONE).params.values() if isinstance(v, str)]
            if {"cuda", "triton-cuda"} & {*values}:
                item.add_marker("cuda")
            if "emulated" in values and not item.get_closest_marker("slow"):
                emulated.setdefault(item.function, []).append(item)
    for cases in emulated.values():
        for case in _left_to_slow(cases):
            case.add_marker("slow")


def _left_to_slow(cases: list[Any]) -> list[Any]:
    """Those that others stand for: kept are a quarter, and more until every value of every parameter occurs.

    They are chosen one by one: the case with the most new values, then with the most new pairs of values.
    """
    values: set[tuple[str, str]] = set()
    pairs: set[tuple[Any, ...]] = set()
    left = {case: _values_and_pairs(case) for case in cases}

    def news(case: Any) -> tuple[int, int]:
        own_values, own_pairs = left[case]
        return len(own_values - values), len(own_pairs - pairs)

    while left:
        best = max(left, key=news)
        if 4 * (len(cases) - len(left)) >= len(cases) and news(best)[0] == 0:
            break
        own_values, own_pairs = left.pop(best)
        values |= own_values
        pairs |= own_pairs
    return list(left)


def _values_and_pairs(case: Any) -> tuple[set[tuple[str, str]], set[tuple[Any, ...]]]:
    """The values of its parameters, by name, and all pairs of them."""
    values = {(name, str(value)) for name, value in case.callspec.params.items()}
    return values, {*itertools.combinations(sorted(values), 2)}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plans do not depend on what somebody has measured on this machine."""
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "tuned"))
    with tuned.forgotten():
        yield


# ---------------------------------------------------------------------------------------- the tolerance rule


def relative_error(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact||, absolute where that is 0; NaN counts as infinitely wrong."""
    got, exact = got.detach().double(), exact.detach().double()
    error = torch.linalg.vector_norm(got - exact) / (torch.linalg.vector_norm(exact) or 1)
    return float(error.nan_to_num(nan=float("inf")))


def root_mean_square(errors: Sequence[float]) -> float:
    return math.sqrt(sum(e * e for e in errors) / len(errors))


def geometric_mean(errors: Sequence[float]) -> float:
    """Of errors of which a few, by chance, are many times the others: where nearly everything cancels."""
    return math.exp(sum(math.log(max(e, 1e-30)) for e in errors) / len(errors))


def assert_agrees(
    draws: list[tuple[Observed, Observed, Observed]],
    dtype: torch.dtype,
    mean: Callable[[Sequence[float]], float] = root_mean_square,
) -> None:
    """The rule: no tensor's error against float64 exceeds twice eager's by more than rounding.

    `draws` are (fused, eager, exact) runs of independent data, whose errors are taken together: whether a ReLU's
    sign flips by rounding is chance, and one flip outweighs all other roundings. Shapes and dtypes are eager's;
    integers (the batch counters) are equal.
    """
    failures = []
    for fused, eager, exact in draws:
        assert fused.keys() == eager.keys() == exact.keys()
        for name, got in fused.items():
            assert (got.shape, got.dtype) == (eager[name].shape, eager[name].dtype), name
            assert got.is_floating_point() or torch.equal(got, eager[name]), name
    for name in draws[0][0]:
        errors = [[relative_error(run[name], exact[name]) for run in runs] for *runs, exact in draws]
        ours, theirs = (mean(column) for column in zip(*errors, strict=True))
        if not ours <= 2 * theirs + FLOOR[dtype]:
            failures.append(f"{name}: error {ours:.3g}, eager's {theirs:.3g}")
    assert not failures, failures


# ------------------------------------------------------------------------------- blocks as functional calls


@dataclass(frozen=True)
class Case:
    """The arguments of one `functional.residual_block` call."""

    x: Tensor
    units: tuple[ConvBN, ...]
    shortcut: Any = None  # "identity", a tensor, a ConvBN, a Padded or None
    relu: bool = True
    memory: str = "lean"
    branch_scale: float = 1.0
    shortcut_scale: float = 1.0

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        """For hypothesis: shapes and constants, not values."""
        shapes = [f"{name} {list(t.shape)}" for name, t in self.named()]
        units = [(*u.geometry, u.batch_stats) for u in self.units]
        printer.text(f"Case({shapes}, {units}, relu={self.relu}, memory={self.memory!r}, {self.x.dtype})")

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the call under a unique name."""
        yield "x", self.x
        projection = (("shortcut", self.shortcut),) if isinstance(self.shortcut, ConvBN) else ()
        for prefix, unit in (*((f"units[{i}]", u) for i, u in enumerate(self.units)), *projection):
            for field in TENSORS:
                if getattr(unit, field) is not None:
                    yield f"{prefix}.{field}", getattr(unit, field)
        if isinstance(self.shortcut, Tensor):
            yield "shortcut", self.shortcut

    def with_tensors(self, tensors: dict[str, Tensor]) -> Case:
        """The same call with other tensors, by the names of `named`."""

        def unit(prefix: str, u: ConvBN) -> ConvBN:
            own = {f: tensors[f"{prefix}.{f}"] for f in TENSORS if f"{prefix}.{f}" in tensors}
            return replace(u, **own)

        shortcut = tensors.get("shortcut", self.shortcut)
        if isinstance(shortcut, ConvBN):
            shortcut = unit("shortcut", shortcut)
        units = tuple(unit(f"units[{i}]", u) for i, u in enumerate(self.units))
        return replace(self, x=tensors["x"], units=units, shortcut=shortcut)

    def map(self, f: Callable[[Tensor], Tensor]) -> Case:
        return self.with_tensors({name: f(t) for name, t in self.named()})

    def to(self, dtype: torch.dtype, vectors: torch.dtype | None = None) -> Case:
        """x, weights, biases and the residual in `dtype`; the norms' vectors in `vectors`, by default the
        dtype of the statistics."""
        vectors = vectors or (torch.float64 if dtype == torch.float64 else torch.float32)

        def cast(name: str, t: Tensor) -> Tensor:
            if not t.is_floating_point():
                return t.clone()
            own = vectors if name.endswith(("gamma", "beta", "running_mean", "running_var")) else dtype
            return t.detach().to(own, copy=True).requires_grad_(t.requires_grad)

        return self.with_tensors({name: cast(name, t) for name, t in self.named()})

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that ask for a gradient."""
        return {name: t for name, t in self.named() if t.requires_grad}

    def fused(self) -> Tensor:
        return functional.residual_block(
            self.x, self.units, self.shortcut, self.relu, self.memory, self.branch_scale, self.shortcut_scale
        )

    def eager(self) -> Tensor:
        return reference.residual_block(
            self.x, self.units, self.shortcut, self.relu, self.branch_scale, self.shortcut_scale
        )

    def observe(self, how: str, dy: Tensor | None = None) -> Observed:
        """Output, gradients and running statistics of one "fused" or "eager" step on copies of the tensors."""
        # Strides are kept: a case may be about them.
        case = self.map(lambda t: t.detach()[...].requires_grad_(t.requires_grad))
        case = case.with_tensors({n: t.clone() if "running" in n or "num_batches" in n else t for n, t in case.named()})
        y = getattr(case, how)()
        seen = {"y": y.detach()}
        leaves = case.leaves()
        if leaves:
            grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
            seen |= {f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True)}
        return seen | {n: t for n, t in case.named() if "running" in n or "num_batches" in n}

    def draw(self) -> tuple[Observed, Observed, Observed]:
        """(fused, eager, exact) runs for a random output gradient."""
        with torch.no_grad():
            y = self.map(torch.clone).eager()
        dy = torch.randn(y.shape).to(y.dtype)
        exact = self.to(torch.float64).observe("eager", dy)
        for i, unit in enumerate(self.units):  # batch statistics take a bias away again: autograd leaves noise
            if unit.batch_stats and f"gradient of units[{i}].bias" in exact:
                exact[f"gradient of units[{i}].bias"].zero_()
        return self.observe("fused", dy), self.observe("eager", dy), exact

    def check(self) -> None:
        """Fused against eager, by the rule."""
        assert_agrees([self.draw()], self.x.dtype)


def random_unit(
    c: int,
    k: int,
    kernel: int | tuple[int, int] = 1,
    *,
    norm: bool = True,
    affine: bool = True,
    track: bool = True,
    bias: bool = False,
    dtype: torch.dtype = torch.float64,
    **constants: Any,
) -> ConvBN:
    """A unit [K, C/groups, R, S] with random tensors that ask for gradients; `constants` are ConvBN's."""
    r, s = (kernel, kernel) if isinstance(kernel, int) else kernel
    per_group = c // constants.get("groups", 1)

    def trained(t: Tensor) -> Tensor:
        return t.to(dtype).requires_grad_()

    fields: dict[str, Any] = {"weight": trained(torch.randn(k, per_group, r, s) / (per_group * r * s) ** 0.5)}
    if bias:
        fields["bias"] = trained(torch.randn(k))
    if not norm:
        return ConvBN(**fields, has_norm=False, **(constants | {"training": False}))
    if affine:
        fields |= {"gamma": trained(torch.rand(k) + 0.5), "beta": trained(torch.randn(k) / 2)}
    if track:
        fields |= {
            "running_mean": torch.randn(k, dtype=dtype) / 4,
            "running_var": torch.rand(k, dtype=dtype) + 0.5,
            "num_batches_tracked": torch.tensor(3),
        }
    return ConvBN(**fields, **constants)


def random_case(
    units: int = 3,
    shortcut: str | None = "identity",
    *,
    last_kernel: int = 1,
    size: int = 4,
    width: int = 4,
    stride: int = 1,
    relu: bool = True,
    memory: str = "lean",
    **unit: Any,
) -> Case:
    """A float64 chain C -> width -> ... -> C with C = 4*width, on [2, C, size, size].

    `shortcut` is None, "identity", "tensor" or "projection"; `stride` sits on the first 3x3 unit.
    """
    c = 4 * width
    x = torch.randn(2, c, size, size, dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    chain = []
    for i in range(units):
        last = i == units - 1
        kernel = last_kernel if last else (1 if i == 0 and units == 3 else 3)
        own = dict(unit, padding=(kernel // 2,) * 2)
        if stride > 1 and kernel == 3 and all(u.stride == (1, 1) for u in chain):
            own["stride"] = (stride, stride)
        chain.append(random_unit(c if i == 0 else width, c if last else width, kernel, **own))
    out = (size - 1) // stride + 1
    other: Any = shortcut
    if shortcut == "tensor":
        other = torch.randn(2, c, out, out, dtype=torch.float64).requires_grad_()
    elif shortcut == "projection":
        other = random_unit(c, c, 1, stride=(stride, stride), **unit)
    return Case(x, tuple(chain), other, relu, memory)


# ------------------------------------------------------------------------------------------ blocks as modules


def randomise(module: nn.Module) -> nn.Module:
    """Random norms (torch's defaults hide mistakes), in place."""
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._NormBase):
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, std=0.5)
            if m.running_mean is not None:
                nn.init.normal_(m.running_mean, std=0.25)
                nn.init.uniform_(m.running_var, 0.5, 1.5)
    return module


def observe_module(module: nn.Module, x: Tensor, dy: Tensor) -> Observed:
    """Output, gradients (of x and every parameter that asks for one) and buffers after one step."""
    x = x.detach()[...].requires_grad_(x.requires_grad)
    module.zero_grad(set_to_none=True)
    y = module(x)
    seen = {"y": y.detach()}
    if y.requires_grad:
        y.backward(dy.to(y.dtype))
    leaves = {"x": x, **dict(module.named_parameters())}
    seen |= {f"gradient of {n}": t.grad for n, t in leaves.items() if t.grad is not None}
    return seen | {name: b.clone() for name, b in module.named_buffers()}


def draw_modules(
    fused: nn.Module, eager: nn.Module, x: Tensor, autocast: torch.dtype | None = None
) -> tuple[Observed, Observed, Observed]:
    """(fused, eager, exact) runs of two modules, which get the same state; neither is left as it was.

    The exact run is a float64 copy of `eager`, without autocast.
    """
    fused.load_state_dict(eager.state_dict())
    exact_module = copy.deepcopy(eager).double()
    with torch.no_grad():
        y = copy.deepcopy(exact_module)(x.double())
    dy = torch.randn(y.shape).to(autocast or x.dtype)
    exact = observe_module(exact_module, x.double(), dy.double())
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        return observe_module(fused, x, dy), observe_module(eager, x, dy), exact


def check_modules(fused: nn.Module, eager: nn.Module, x: Tensor) -> None:
    """`fused` against `eager`, two modules of the same state, by the rule; neither is left as it was."""
    assert_agrees([draw_modules(fused, eager, x)], x.dtype)
