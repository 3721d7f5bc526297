"""functional.residual_block and conv_bn_act: gradcheck, and agreement with eager over shapes, layouts and dtypes."""

from __future__ import annotations

import pytest
import torch
from conftest import Case, assert_agrees, random_case, random_unit, relative_error
from hypothesis import assume, given
from hypothesis import strategies as st

from resnet_fused import functional, reference
from resnet_fused.recorder import recording


def plans_of(case: Case) -> list[str]:
    """The plan of each unit, as a recording reports it."""
    with recording() as calls:
        case.fused()
    assert len(calls) == 1
    assert calls[0].reason is None
    return [u.plan for u in calls[0].spec.units]


def gradcheck(case: Case) -> None:
    leaves = case.leaves()
    names = list(leaves)

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return case.with_tensors(dict(case.named()) | dict(zip(names, tensors, strict=True))).fused()

    assert torch.autograd.gradcheck(call, tuple(leaves.values()), fast_mode=True)


# -------------------------------------------------------------------------------------------------- gradcheck


@pytest.mark.parametrize("memory", ["lean", "fast"])
@pytest.mark.parametrize("shortcut", [None, "identity", "tensor", "projection"])
@pytest.mark.parametrize("units", [1, 2, 3])
@pytest.mark.parametrize(("training", "last_kernel"), [(True, 1), (True, 3), (False, 1), (False, 3)])
def test_gradcheck(memory, shortcut, units, training, last_kernel) -> None:
    case = random_case(
        units, shortcut, last_kernel=last_kernel, memory=memory, training=training, size=5 if units == 1 else 3
    )
    plan = plans_of(case)[units - 1]
    if memory == "fast" or last_kernel == 3:
        assert plan == "keep"
    elif not training or units == 1:  # one unit is [C, C]: its Gram matrix costs as much as the convolution
        assert plan == "recompute"
    else:
        assert plan == "gram"
    gradcheck(case)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(
    "unit",
    [
        {"bias": True},
        {"bias": True, "training": False},
        {"norm": False},
        {"norm": False, "bias": True},
        {"affine": False},
        {"track": False, "training": False},
        {"eps": 0.1},
    ],
    ids=str,
)
def test_gradcheck_of_units_without_the_usual_parts(unit, relu) -> None:
    for shortcut in ("identity", "projection"):
        gradcheck(random_case(3, shortcut, relu=relu, size=3, **unit))
    gradcheck(random_case(2, None, last_kernel=3, relu=relu, size=3, **unit))


@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("memory", ["lean", "fast"])
def test_gradcheck_strided(stride, memory) -> None:
    """A strided Gram operand: most pixels, the last row and column among them, get nothing from the projection."""
    steps = {"stride": (stride, stride)}
    units = (random_unit(4, 4), random_unit(4, 4, 3, padding=(1, 1), **steps), random_unit(4, 16))
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64).requires_grad_()
    case = Case(x, units, random_unit(4, 16, **steps), memory=memory)
    assert plans_of(case) == ["keep"] * 2 + (["gram"] if memory == "lean" else ["keep"]) * 2
    gradcheck(case)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gradcheck_groups_and_dilation(groups) -> None:
    units = (
        random_unit(8, 4, 3, groups=groups, dilation=(2, 1), padding=(2, 1)),
        random_unit(4, 8, (1, 3), groups=groups, padding=(0, 1)),
    )
    gradcheck(Case(torch.randn(2, 8, 5, 4, dtype=torch.float64).requires_grad_(), units, "identity"))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("memory", ["lean", "fast"])
def test_conv_bn_act_gradcheck(relu, residual, memory) -> None:
    case = random_case(1, "tensor" if residual else None, relu=relu, memory=memory)

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        own = case.with_tensors(dict(case.named()) | dict(zip(case.leaves(), tensors, strict=True)))
        return functional.conv_bn_act(own.x, own.units[0], own.shortcut, own.relu, own.memory)

    assert torch.autograd.gradcheck(call, tuple(case.leaves().values()), fast_mode=True)
    y = functional.conv_bn_act(case.x, case.units[0], case.shortcut, relu)
    assert relative_error(y, case.eager()) < 1e-12


def test_exhaustive_gradcheck() -> None:
    """Every element of every Jacobian of a whole bottleneck with projection, in the Gram form."""
    case = random_case(3, "projection", width=2, size=3)
    leaves = case.leaves()

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return case.with_tensors(dict(case.named()) | dict(zip(leaves, tensors, strict=True))).fused()

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))


# ---------------------------------------------------------------------------------------- agreement with eager


# Enough pixels for several signs to flip by rounding, however rare that is in the dtype: one flip is chance.
SIZES = {torch.float64: 12, torch.float32: 12, torch.bfloat16: 20, torch.float16: 40}
DRAWS = {torch.float64: 1, torch.float32: 1, torch.bfloat16: 4, torch.float16: 2}


@pytest.mark.parametrize("memory", ["lean", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("units", "shortcut", "last_kernel", "stride"),
    [
        (3, "identity", 1, 1),
        (3, "projection", 1, 2),
        (2, "identity", 3, 1),
        (2, "projection", 3, 2),
        (1, "tensor", 1, 1),
    ],
)
def test_agrees_with_eager(units, shortcut, last_kernel, stride, training, dtype, memory) -> None:
    options = {"last_kernel": last_kernel, "stride": stride, "memory": memory, "training": training}
    cases = [random_case(units, shortcut, size=SIZES[dtype], width=16, **options) for _ in range(DRAWS[dtype])]
    assert_agrees([case.to(dtype).draw() for case in cases], dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_norms_of_the_low_precision_dtype(dtype, training) -> None:
    """model.bfloat16() makes every vector bfloat16, running statistics too."""
    cases = [random_case(3, "projection", training=training, size=SIZES[dtype], width=16) for _ in range(DRAWS[dtype])]
    assert_agrees([case.to(dtype, vectors=dtype).draw() for case in cases], dtype)


LAYOUTS = {
    "nhwc": lambda x: x.contiguous(memory_format=torch.channels_last),
    "nchw": lambda x: x.contiguous(),
    "every second row": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
    "a slice of channels": lambda x: torch.cat([x, x], dim=1)[:, x.shape[1] :],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x: x[:1].expand_as(x),
}


@st.composite
def cases(draw) -> Case:
    """Blocks of one to three units of any geometry, with a shortcut that fits."""

    def pair(least: int, most: int) -> tuple[int, int]:
        return draw(st.integers(least, most)), draw(st.integers(least, most))

    torch.manual_seed(draw(st.integers(0, 999)))
    n, c = draw(st.integers(0, 3)), draw(st.integers(1, 9))
    h, w = pair(1, 10)
    training = draw(st.booleans())
    shape, units = (n, c, h, w), []
    for _ in range(draw(st.integers(1, 3))):
        groups = draw(st.sampled_from([g for g in range(1, 5) if shape[1] % g == 0]))
        unit = random_unit(
            shape[1],
            groups * draw(st.integers(1, 5)),
            draw(st.sampled_from([1, 2, 3, (1, 3), (5, 2)])),
            groups=groups,
            stride=pair(1, 2),
            padding=pair(0, 2),
            dilation=pair(1, 2),
            training=draw(st.just(training) | st.booleans()),
            bias=draw(st.booleans()),
            norm=draw(st.sampled_from([True, True, True, False])),
            affine=draw(st.sampled_from([True, True, False])),
            dtype=torch.float32,
        )
        shape = unit.geometry.out_shape(shape, unit.weight.shape)
        assume(min(shape[2:]) >= 1)
        # Two or three values a channel make 1/std anything: eager's own error then says nothing.
        assume(not unit.batch_stats or n == 0 or n * shape[2] * shape[3] >= 4)
        units.append(unit)
    choices = [None, "tensor"] + ["identity"] * (shape == (n, c, h, w))
    choices += ["projection"] * (shape[2] <= h and shape[3] <= w)
    shortcut = draw(st.sampled_from(choices))
    if shortcut == "tensor":
        shortcut = torch.randn(shape).requires_grad_()
    elif shortcut == "projection":
        shortcut = random_unit(
            c, shape[1], (h - shape[2] + 1, w - shape[3] + 1), training=training, dtype=torch.float32
        )
    layout = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]
    x = layout(torch.randn(n, c, h, w)).requires_grad_()
    return Case(x, tuple(units), shortcut, draw(st.booleans()), draw(st.sampled_from(["lean", "fast"])))


@given(cases(), st.sampled_from([torch.float32, torch.float64]))
def test_any_block_agrees_with_eager(case: Case, dtype: torch.dtype) -> None:
    (case.to(dtype) if dtype == torch.float64 else case).check()


@given(cases(), st.sampled_from([torch.bfloat16, torch.float16]))
def test_any_low_precision_block_runs_as_eager_does(case: Case, dtype: torch.dtype) -> None:
    """On a few pixels one rounding decides a norm error: here each value must lie where roundings can put it."""
    case = case.to(dtype)
    dy = torch.randn(reference.residual_block(case.x, case.map(torch.clone).units, case.shortcut).shape)
    fused, eager = case.observe("fused", dy), case.observe("eager", dy)
    assert {n: (t.shape, t.dtype) for n, t in fused.items()} == {n: (t.shape, t.dtype) for n, t in eager.items()}
    # One way: eager's gradient of a bias now and then comes out of oneDNN as what was in memory.
    assert all(torch.isfinite(t).all() or not torch.isfinite(eager[n]).all() for n, t in fused.items())


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("shortcut", ["identity", "projection", "tensor"])
def test_layouts(layout, shortcut) -> None:
    case = random_case(3, shortcut, size=6).to(torch.float32)
    x = LAYOUTS[layout](case.x.detach()).requires_grad_()
    Case(x, case.units, case.shortcut).check()
    if shortcut == "tensor":
        residual = LAYOUTS[layout](case.shortcut.detach()).requires_grad_()
        Case(x, case.units, residual).check()


def test_output_is_channels_last() -> None:
    for case in (random_case(3, "identity"), random_case(2, None, last_kernel=3), random_case(1, "tensor")):
        case = Case(case.x.detach().contiguous().requires_grad_(), case.units, case.shortcut)
        assert case.fused().is_contiguous(memory_format=torch.channels_last)


def test_residual_may_be_the_input_itself() -> None:
    """The same tensor as x and as residual: its gradient is the sum of both."""
    case = random_case(3, None).to(torch.float64)
    own = Case(case.x, case.units, case.x)
    grads = [torch.autograd.grad(how().square().sum(), case.x)[0] for how in (own.fused, own.eager)]
    assert relative_error(*grads) < 1e-12


def test_inputs_are_left_alone() -> None:
    """Forward and backward write to nothing they were given but the running statistics."""
    for shortcut in ("identity", "tensor", "projection"):
        case = random_case(3, shortcut, relu=False).to(torch.float32)
        before = case.map(lambda t: t.detach().clone())
        y = case.fused()
        dy = torch.randn_like(y)
        kept = dy.clone()
        torch.autograd.grad(y, list(case.leaves().values()), dy)
        assert torch.equal(dy, kept)
        for (name, t), (_, old) in zip(case.named(), before.named(), strict=True):
            moved = "running" in name or "num_batches" in name
            assert torch.equal(t.detach(), old) != moved, name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_bit_equal(training, dtype) -> None:
    case = random_case(3, "projection", training=training, size=14, width=16).to(dtype)
    dy = torch.randn(2, 64, 14, 14)
    first, second = (case.observe("fused", dy) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("memory", ["lean", "fast"])
def test_thread_count_changes_only_roundings(memory) -> None:
    case = random_case(3, "projection", size=14, width=16, memory=memory).to(torch.float32)
    dy = torch.randn(2, 64, 14, 14)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            runs.append(case.observe("fused", dy))
    finally:
        torch.set_num_threads(threads)
    for name, t in runs[0].items():
        assert relative_error(runs[1][name], t) < 1e-5, name


@pytest.mark.parametrize("frozen", ["x", "weight", "gamma", "beta", "bias"])
@pytest.mark.parametrize("shortcut", ["identity", "projection"])
@pytest.mark.parametrize("training", [True, False])
def test_any_tensor_may_refuse_its_gradient(frozen, shortcut, training) -> None:
    case = random_case(3, shortcut, bias=True, training=training, size=6).to(torch.float32)
    for name, t in case.named():
        if name.endswith(frozen):
            t.requires_grad_(False)
    case.check()


def test_nothing_asks_for_gradients() -> None:
    case = random_case(3, "projection", size=6).to(torch.float32)
    with torch.no_grad():
        silent = case.fused()
    assert not silent.requires_grad
    frozen = case.map(torch.detach)
    assert not frozen.fused().requires_grad
    assert relative_error(silent, frozen.eager()) < 1e-6


@pytest.mark.parametrize("shortcut", ["identity", "projection"])
def test_second_derivative_raises(shortcut) -> None:
    case = random_case(3, shortcut)
    (dx,) = torch.autograd.grad(case.fused().square().sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(dx.sum(), case.x)


@pytest.mark.parametrize("training", [True, False])
def test_only_the_added_tensor_asks_for_a_gradient(training) -> None:
    case = random_case(2, "tensor", training=training, size=6).to(torch.float32)
    for name, t in case.named():
        t.requires_grad_(name == "shortcut")
    case.check()


def test_sums_over_many_pixels_stay_finite_in_float16() -> None:
    """Pixels times the operand's variance leave float16's range long before the operand does."""
    case = random_case(2, "identity", size=96).to(torch.float16)
    case.units[0].gamma.data.fill_(8)
    assert plans_of(case)[-1] == "recompute"
    assert case.fused().isfinite().all()
    assert case.units[-1].running_var.isfinite().all()
