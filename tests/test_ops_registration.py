"""Every op of the namespace: schema, fake, autograd and tracing by opcheck, and gradients of direct calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Case, random_case, random_unit
from torch import Tensor

from resnet_fused.ops.residual_block import encode
from resnet_fused.recorder import recording

OPS = torch.ops.resnet_fused
DTYPES = [torch.float32, torch.bfloat16]
# Steps of a larger op: a gradient asked of them raises.
STEPS = (
    "relu_mask", "gram_operand", "bn_act_backward_reduce", "bn_act_backward_apply", "bn_act_pool_backward",
    "gate_act_backward", "concat_act_backward", "conv1x1", "conv1x1_dgrad", "conv1x1_wgrad", "gram", "expand",
    "expand_dgrad",
    "conv2d", "conv2d_bn_act", "conv2d_dgrad", "conv2d_wgrad",
)  # fmt: skip


def activation(c: int, dtype: torch.dtype, *, grad: bool = False, n: int = 2, h: int = 5, w: int = 4) -> Tensor:
    x = torch.randn(n, c, h, w).to(dtype).to(memory_format=torch.channels_last)
    return x.requires_grad_(grad)


def vectors(count: int, c: int, dtype: torch.dtype, *, grad: bool = False) -> list[Tensor]:
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return [torch.randn(c, dtype=acc).requires_grad_(grad) for _ in range(count)]


def block_args(case: Case) -> tuple:
    """The arguments of torch.ops.resnet_fused.residual_block for a case with norms and without biases."""
    with recording() as calls:
        case.fused()
    spec = calls[0].spec
    projected = spec.shortcut == "projection"
    units = [*case.units, case.shortcut] if projected else list(case.units)
    empty = case.x.new_empty(0)
    given = [(empty, empty) if u.batch_stats else (u.running_mean, u.running_var) for u in units]
    lists = [[u.weight for u in units], [u.gamma for u in units], [u.beta for u in units]]
    residual = case.shortcut if isinstance(case.shortcut, Tensor) else None
    return (case.x, residual, *lists, *(list(t) for t in zip(*given, strict=True)), *encode(spec), True)


def detached(arg: Any) -> Any:
    """A tensor, or a list of them, cut from its graph; anything else as it is."""
    if isinstance(arg, list):
        return [detached(a) for a in arg]
    return arg.detach() if isinstance(arg, Tensor) else arg


def backward_args(case: Case) -> tuple:
    """The arguments of torch.ops.resnet_fused.residual_block_backward after such a forward."""
    args = tuple(map(detached, block_args(case)))
    x, residual, *lists = args[:7]
    config, eps = args[7:-1], args[8]
    y, *rest = OPS.residual_block(*args)
    n_stats = 2 * sum(args[7][7::10])  # the units' batch_stats flags
    needs = (True, residual is not None, [True] * len(eps))
    return (torch.randn_like(y), x, *lists, rest[:n_stats], rest[n_stats:], *config, *needs)


def blocks(dtype: torch.dtype) -> list[Case]:
    return [
        random_case(3, "projection", size=6, width=2).to(dtype),
        random_case(2, "tensor", last_kernel=3, width=2, training=False, relu=False).to(dtype),
    ]


def samples(name: str, dtype: torch.dtype) -> list[tuple]:
    """Argument lists of op `name`; where it has a derivative, its tensors ask for gradients."""
    if name == "residual_block":
        return [block_args(case) for case in blocks(dtype)]
    if name == "residual_block_backward":
        return [backward_args(case) for case in blocks(dtype)]
    if name in STEM:
        return STEM[name](dtype)
    if name.startswith("preact_block"):
        return preact_samples(name, dtype)
    if name in POINTWISE:
        return POINTWISE[name](dtype)
    grad = name not in STEPS
    out: list[tuple] = []
    for c in (3, 40):
        x, dy = activation(c, dtype, grad=grad), activation(c, dtype, grad=grad)
        scale, shift, mean, *coefs = vectors(6, c, dtype, grad=grad)
        mask = OPS.relu_mask(activation(c, dtype))
        f, v = activation(c, dtype, grad=grad), activation(c, dtype, grad=grad)
        pooled = activation(c, dtype, h=3, w=2, grad=grad)
        argmax = torch.full_like(pooled, 4, dtype=torch.int8)
        out += {
            "bn_stats": [(x,)],
            "bn_act": [
                (x, scale, shift, None, None, None, True, True),
                (x, scale, shift, dy, None, None, True, False),
                (x, scale, shift, dy, mean, coefs[0], False, False),
                (x, scale, shift, activation(c - 2, dtype, grad=grad, h=9, w=7), None, None, True, True, 2, 1),
            ],
            "add_stats": [(x, dy, None, None), (x, dy, scale, shift)],
            "gate_act": [(x, dy, f, True, True), (x, dy, f, False, False)],
            "concat_act": [(x, dy, scale, shift, True, True), (x, dy, scale, shift, False, False)],
            "concat_act_backward": [
                (dy, OPS.relu_mask(dy[:, 1:].contiguous(memory_format=torch.channels_last)), *rest, 1)
                for rest in ((f[:, 1:].contiguous(memory_format=torch.channels_last), mean[1:]), (None, None))
            ],
            "gate_act_backward": [(dy, mask, x, f, v), (dy, None, x, f, v)],
            "relu_mask": [(x,)],
            "gram_operand": [(x, scale, shift, True, mean, 1), (x, None, None, False, mean, 2)],
            "bn_act_backward_reduce": [
                (dy, mask, x, None, None, mean, True),
                (dy, None, x, scale, shift, mean, False),
                (dy, None, None, None, None, None, False),
            ],
            "bn_act_backward_apply": [
                (dy, mask, x, None, None, mean, *coefs),
                (dy, None, x, scale, shift, mean, *coefs),
                (dy, mask, x, None, None, mean, *coefs, activation(c, dtype)),
            ],
            "bn_act_pool": [(x, scale, shift, 3, 2, 1), (x, scale, shift, 2, 1, 0)],
            "bn_act_pool_backward": [(pooled, argmax, 5, 4, 3, 2, 1)],
        }[name]
    return out


def conv1x1_samples(dtype: torch.dtype) -> list[tuple]:
    x, w = activation(24, dtype), torch.randn(40, 24, 1, 1).to(dtype)
    affine = vectors(2, 24, dtype)
    return [
        (x, w, None, None, 1, False),
        (x, w, *affine, 2, True),
        (activation(1, dtype, n=1, h=1, w=1), w[:, :1].contiguous(), None, None, 1, True),
    ]


def bn_backward(k: int, dtype: torch.dtype, gate: bool, **size: int) -> tuple:
    """dy and what a batch norm's backward needs beside it, gated by a mask or by the sign of scale*u + shift."""
    dy, u = activation(k, dtype, **size), activation(k, dtype, **size)
    scale, shift, mean, *coefs = vectors(6, k, dtype)
    given = (None, u, scale, shift) if gate else (OPS.relu_mask(u), u, None, None)
    return (dy, *given, mean, *coefs)


def plain_dy(k: int, dtype: torch.dtype, **size: int) -> tuple:
    return (activation(k, dtype, **size), *[None] * 8)


def conv1x1_dgrad_samples(dtype: torch.dtype) -> list[tuple]:
    w, x = torch.randn(40, 24, 1, 1).to(dtype), activation(24, dtype)
    none, gate = (None, None, None, None), (activation(24, dtype), *vectors(3, 24, dtype))
    return [
        (*plain_dy(40, dtype), w, 5, 4, 1, None, None, *none),
        (*bn_backward(40, dtype, True), w, 5, 4, 1, None, None, *gate),
        (*bn_backward(40, dtype, False), w, 5, 4, 1, x, OPS.relu_mask(x), *none),
        (*plain_dy(40, dtype, h=3, w=2), w, 5, 4, 2, x, None, *none),
        (*plain_dy(40, dtype), w, 5, 4, 1, activation(32, dtype, h=3, w=2), None, *none, 0.5, 2, 8),
    ]


def conv1x1_wgrad_samples(dtype: torch.dtype) -> list[tuple]:
    x, affine, dy = activation(24, dtype), vectors(2, 24, dtype), activation(40, dtype)
    return [
        (*bn_backward(40, dtype, True), x, *affine, 1, False, False),
        (dy, OPS.relu_mask(dy), *[None] * 7, x, *affine, 1, True, True),
        (*plain_dy(40, dtype, h=3, w=2), x, None, None, 2, False, True),
    ]


def kernel(k: int, c: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(k, c, 3, 2).to(dtype).to(memory_format=torch.channels_last)


SAME, GROUPED = [1, 1, 1, 1, 1, 2, 1], [2, 2, 2, 0, 2, 1, 2]  # of 5 x 4 pixels: 5 x 4, and 3 x 2


def conv2d_samples(dtype: torch.dtype) -> list[tuple]:
    x, affine = activation(24, dtype), vectors(2, 24, dtype)
    return [
        (x, kernel(40, 24, dtype), *affine, SAME, True),
        (activation(48, dtype), kernel(16, 24, dtype), None, None, GROUPED, False),
    ]


def conv2d_bn_act_samples(dtype: torch.dtype) -> list[tuple]:
    x, (s, t), halves = activation(24, dtype), vectors(2, 40, dtype), vectors(2, 16, dtype)
    return [
        (x, kernel(40, 24, dtype), *vectors(2, 24, dtype), SAME, s, t, activation(40, dtype), True, True),
        (activation(48, dtype), kernel(16, 24, dtype), None, None, GROUPED, *halves, None, False, False),
    ]


def conv2d_dgrad_samples(dtype: torch.dtype) -> list[tuple]:
    none, gate = (None,) * 4, (activation(24, dtype), *vectors(3, 24, dtype))
    w, grouped, wide = kernel(40, 24, dtype), kernel(16, 24, dtype), activation(48, dtype)
    return [
        (*plain_dy(40, dtype), w, 5, 4, SAME, None, None, *none),
        (*bn_backward(40, dtype, True), w, 5, 4, SAME, None, None, *gate),
        (*bn_backward(16, dtype, False, h=3, w=2), grouped, 5, 4, GROUPED, wide, OPS.relu_mask(wide), *none),
    ]


def conv2d_wgrad_samples(dtype: torch.dtype) -> list[tuple]:
    x = activation(24, dtype)
    return [
        (*bn_backward(40, dtype, True), x, *vectors(2, 24, dtype), [3, 2], SAME),
        (*plain_dy(16, dtype, h=3, w=2), activation(48, dtype), None, None, [3, 2], GROUPED),
    ]


def gram_samples(dtype: torch.dtype) -> list[tuple]:
    x, (scale, shift, center) = activation(24, dtype), vectors(3, 24, dtype)
    return [(x, scale, shift, center, 1), (x, None, None, center, 2)]


def expand_samples(dtype: torch.dtype) -> list[tuple]:
    x, y, x2 = activation(24, dtype), activation(40, dtype), activation(8, dtype, h=9, w=8)
    w, w2 = torch.randn(40, 24, 1, 1).to(dtype), torch.randn(40, 8, 1, 1).to(dtype)
    affine, (s, t, s2) = vectors(2, 24, dtype), vectors(3, 40, dtype)
    none = (None, None, None)
    return [
        (x, *affine, w, s, t, *none, 1, y, True, True),
        (x, None, None, w, s, t, *none, 1, None, False, False),
        (x, *affine, w, s, t, x2, w2, s2, 2, None, True, True),
    ]


def expand_dgrad_samples(dtype: torch.dtype) -> list[tuple]:
    x, dy, w = activation(24, dtype), activation(40, dtype), torch.randn(40, 24, 1, 1).to(dtype)
    q, (scale, shift, constant, mean) = torch.randn(24, 24).to(dtype), vectors(4, 24, dtype)
    return [
        (dy, OPS.relu_mask(dy), w, x, scale, shift, q, constant, mean, 1, None, None),
        (activation(40, dtype, h=3, w=2), None, w, x, None, None, q, constant, None, 2, x.clone(), OPS.relu_mask(x)),
    ]


def stem_samples(dtype: torch.dtype) -> list[tuple]:
    gamma, beta, mean, var = vectors(4, 8, dtype, grad=True)
    x, empty = activation(3, dtype, h=9, w=8), vectors(2, 0, dtype)
    w = torch.randn(8, 3, 5, 3).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    norm, where = (gamma, beta), ([2, 1, 2, 1, 1, 1, 1], [3, 2, 1])
    return [
        (x, w, *norm, *empty, 1e-5, True, "", *where),
        (x.detach().requires_grad_(), w, *norm, mean.detach(), var.detach().square(), 1e-3, False, "", *where),
    ]


def stem_backward_samples(dtype: torch.dtype) -> list[tuple]:
    found = []
    for args in stem_samples(dtype):
        x, w, gamma, beta, mean, var, eps, batch_stats, group, *where = (detached(a) for a in args)
        y, *own, _count, u, argmax = OPS.stem(x, w, gamma, beta, mean, var, eps, batch_stats, group, *where)
        stats = own if batch_stats else [mean, var]
        config = (eps, batch_stats, group, *where, not batch_stats, True)
        found.append((torch.randn_like(y), x, w, gamma, beta, *stats, u, argmax, *config))
    return found


def preact_samples(name: str, dtype: torch.dtype) -> list[tuple]:
    """With an identity and statistics handed in and on; with a projection and given statistics."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    out = []
    for wide, stride, handed in ((4, 1, True), (6, 2, False)):
        own = name == "preact_block"
        x = activation(4, dtype, grad=own)
        shapes = [(3, 4, 3, 3), (wide, 3, 3, 3), *([(wide, 4, 1, 1)] if stride > 1 else [])]
        weights = [torch.randn(s).to(dtype).requires_grad_(own) for s in shapes]
        gammas, betas = ([torch.rand(c, dtype=acc).add_(0.5).requires_grad_(own) for c in (4, 3)] for _ in range(2))
        sizes = (0, 0) if handed else (4, 3)
        means, vars = ([torch.rand(c, dtype=acc) for c in sizes] for _ in range(2))
        given = [torch.rand(4, dtype=acc) for _ in range(2)] if handed else []
        geometry = [stride, stride, 1, 1, 1, 1, 1, int(handed), 1, 1, 1, 1, 1, 1, 1, int(handed)]
        geometry += [2, 2, 0, 0, 1, 1, 1, 0] if stride > 1 else []
        lists, config = (weights, gammas, betas, means, vars, given), (geometry, [1e-5, 1e-5], ",")
        if own:
            out.append((x, *lists, *config, handed, True))
            continue
        y, *rest = OPS.preact_block(x, *lists, *config, False, True)
        out.append(
            (
                torch.randn_like(y),
                x,
                *lists,
                rest[: 4 * handed],
                rest[4 * handed :],
                *config,
                True,
                [True] * len(weights),
            )
        )
    return out


POINTWISE = {
    "conv1x1": conv1x1_samples,
    "conv1x1_dgrad": conv1x1_dgrad_samples,
    "conv1x1_wgrad": conv1x1_wgrad_samples,
    "gram": gram_samples,
    "expand": expand_samples,
    "expand_dgrad": expand_dgrad_samples,
    "conv2d": conv2d_samples,
    "conv2d_bn_act": conv2d_bn_act_samples,
    "conv2d_dgrad": conv2d_dgrad_samples,
    "conv2d_wgrad": conv2d_wgrad_samples,
}


STEM = {"stem": stem_samples, "stem_backward": stem_backward_samples}


def op_names() -> list[str]:
    prefix = "resnet_fused::"
    names = {
        name.removeprefix(prefix).split(".")[0] for name in torch._C._dispatch_get_all_op_names() if prefix in name
    }
    return sorted(names)


def test_ops_are_found() -> None:
    assert {"bn_stats", "bn_act", "bn_act_pool", "residual_block", "residual_block_backward", *STEPS} <= set(op_names())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", op_names())
def test_opcheck(name, dtype) -> None:
    """A new op fails here until it has samples."""
    for args in samples(name, dtype):
        torch.library.opcheck(getattr(OPS, name).default, args)


@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_ops_compile(name) -> None:
    torch.compiler.reset()
    op, args = getattr(OPS, name), samples(name, torch.bfloat16)[-1]
    got = torch.compile(lambda *a: [t + 1 for t in op(*a)], fullgraph=True)(*args)
    for result, want in zip(got, op(*args), strict=True):
        torch.testing.assert_close(result, want + 1)
        assert result.stride() == want.stride()


@pytest.mark.parametrize("name", [*STEPS, "residual_block_backward", "stem_backward", "preact_block_backward"])
def test_steps_refuse_gradients(name) -> None:
    def asking(arg):
        if isinstance(arg, list):
            return [asking(a) for a in arg]
        floats = isinstance(arg, Tensor) and arg.is_floating_point()
        return arg.detach().requires_grad_() if floats else arg

    results = getattr(OPS, name)(*map(asking, samples(name, torch.float32)[0]))
    results = results if isinstance(results, (list, tuple)) else [results]
    asked = [r for r in results if r.requires_grad]
    if name == "relu_mask":  # integers carry no gradient
        assert not asked
        return
    assert asked
    with pytest.raises(RuntimeError, match=f"{name} has no derivative"):
        asked[0].sum().backward()


def direct(name: str, *constants, outputs: int = 1):
    """The op as a function of its tensors, with its first `outputs` outputs."""

    def call(*tensors: Tensor):
        result = getattr(OPS, name)(*tensors, *constants)
        return result if isinstance(result, Tensor) else tuple(result[:outputs])

    return call


def test_gradcheck_bn_stats() -> None:
    x = activation(5, torch.float64, grad=True)
    assert torch.autograd.gradcheck(direct("bn_stats", outputs=2), (x,))
    assert torch.autograd.gradgradcheck(direct("bn_stats", outputs=2), (x,))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("save_mask", [True, False])
@pytest.mark.parametrize("residuals", [0, 1, 3])
def test_gradcheck_bn_act(relu, save_mask, residuals) -> None:
    x = activation(5, torch.float64, grad=True)
    given = [activation(5, torch.float64, grad=True), *vectors(2, 5, torch.float64, grad=True)][:residuals]
    missing = (None,) * (3 - residuals)
    call = direct("bn_act", *missing, relu, relu and save_mask)
    assert torch.autograd.gradcheck(call, (x, *vectors(2, 5, torch.float64, grad=True), *given))


def test_gradcheck_add_stats() -> None:
    x, u = (activation(5, torch.float64, grad=True) for _ in range(2))
    call = direct("add_stats", outputs=3)
    assert torch.autograd.gradcheck(direct("add_stats", None, None, outputs=3), (x, u))
    assert torch.autograd.gradcheck(call, (x, u, *vectors(2, 5, torch.float64, grad=True)))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("save_mask", [True, False])
def test_gradcheck_gate_act(relu, save_mask) -> None:
    tensors = tuple(activation(5, torch.float64, grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(direct("gate_act", relu, relu and save_mask), tensors)


@pytest.mark.parametrize("pool", [(3, 2, 1), (2, 2, 0), (3, 1, 1)])
def test_gradcheck_bn_act_pool(pool) -> None:
    x = activation(5, torch.float64, grad=True)
    assert torch.autograd.gradcheck(
        direct("bn_act_pool", *pool), (x, *vectors(2, 5, torch.float64, grad=True)), fast_mode=True
    )


def test_direct_block_trains_as_the_function_does() -> None:
    for case in blocks(torch.float64):
        leaves = [t for name, t in case.leaves().items()]
        y = OPS.residual_block(*block_args(case))[0]
        got = torch.autograd.grad(y.square().sum(), leaves)
        want = torch.autograd.grad(case.fused().square().sum(), leaves)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_direct_block_without_saving_refuses_gradients() -> None:
    y = OPS.residual_block(*block_args(random_case(3))[:-1], False)[0]
    with pytest.raises(RuntimeError, match="save=False"):
        y.sum().backward()


def test_only_the_output_of_a_direct_block_carries_gradients() -> None:
    _, *others = OPS.residual_block(*block_args(random_case(3)))
    assert not any(t.requires_grad for t in others)


def test_double_backward_of_direct_calls_raises() -> None:
    x = activation(4, torch.float64, grad=True)
    scale, shift = vectors(2, 4, torch.float64, grad=True)
    calls = (
        lambda: OPS.bn_act(x, scale, shift, None, None, None, True, True)[0],
        lambda: OPS.bn_act_pool(x, scale, shift, 3, 2, 1)[0],
        lambda: OPS.residual_block(*block_args(Case(x, (random_unit(4, 4),))))[0],
    )
    for call in calls:
        (dx,) = torch.autograd.grad(call().square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            torch.autograd.grad(dx.sum(), x)
