"""Every block of the catalogue, made by `blocks.create` and its neighbours, against its definition in plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import plain
import pytest
import torch
from conftest import observe_module, randomise, relative_error
from hypothesis import given
from hypothesis import strategies as st
from op_cases import activation
from torch import nn
from torchvision.models import resnet as tv

import resnet_fused as rf
from resnet_fused import blocks, reference
from resnet_fused.blocks import BlockOptions, create
from resnet_fused.recorder import recording

Builder = Callable[[], nn.Module]
IN = 16  # channels of the input
PLACEMENTS = ("bn_after_add", "relu_before_add", "relu_preact", "full_preact")


def of(kind: str, stride: int = 1, wider: int = 1, **options: Any) -> Builder:
    """A block from IN channels to IN * wider."""
    return partial(create, kind, IN, IN * wider // (4 if kind == "bottleneck" else 1), stride, **options)


def shared(block: Builder, **options: Any) -> Builder:
    return lambda: rf.Shared(block(), 3, **options)


def connect(connection: str, **options: Any) -> Builder:
    return lambda: rf.Connect(of("basic", wider=2)(), of("bottleneck", wider=2)(), connection, **options)


def placements() -> dict[str, Builder]:
    made: dict[str, Builder] = {}
    for placement in PLACEMENTS:
        for kind in ("basic", "bottleneck"):
            row = f"B12 {placement}, {kind}"
            made[row] = of(kind, placement=placement)
            for letter in ("A", "B"):
                made[f"{row}, shortcut {letter}"] = of(kind, 2, 2, placement=placement, shortcut=letter)
        made[f"B12 {placement}, shortcut C"] = of("basic", placement=placement, shortcut="C")
    return made


ROWS: dict[str, Builder] = {
    "B1": of("basic"),
    "B1, shortcut A": of("basic", 2, 2, shortcut="A"),
    "B1, shortcut B": of("basic", 2, 2),
    "B1, shortcut C": of("basic", shortcut="C"),
    "B2": of("basic", 2, 2, stride_on="conv2"),
    "B2, shortcut A": of("basic", 2, 2, stride_on="conv2", shortcut="A"),
    "B3, v1.5": of("bottleneck", 2, 2),
    "B3, v1": of("bottleneck", 2, 2, stride_on="conv1"),
    "B3, groups": of("bottleneck", 2, 2, groups=2, base_width=64),
    "B3, wide": of("bottleneck", base_width=128),
    "B4, basic": of("basic", placement="full_preact"),
    "B4, stride on conv2": of("basic", 2, 2, placement="full_preact", stride_on="conv2"),
    "B4, first": lambda: BlockOptions("bottleneck", placement="full_preact").build(IN, 8, first=True),
    "B4, first, shortcut A": lambda: BlockOptions(placement="full_preact", shortcut="A").build(IN, 32, 2, first=True),
    "B5": of("basic", shortcut="C", projection_norm=False),
    "B5, strided": of("bottleneck", 2, 2, shortcut="C", projection_norm=False),
    "B6": of("mnist"),
    "B7": of("mnist", gate=True),
    "B8": of("basic", residual_scale=0.1),
    "B8, both": of("bottleneck", 2, 2, residual_scale=0.1, shortcut_scale=0.5),
    "B8, mnist": of("mnist", shortcut_scale=0.5),
    "B9": of("basic", connection="concat"),
    "B9, bottleneck": of("bottleneck", connection="concat"),
    "B9, bottleneck connection": of("basic", connection="bottleneck"),
    "B9, bottleneck connection of two convolutions": lambda: blocks.BottleneckConnection(rf.ConcatBottleneck(IN, 4), 2),
    "B9b, add": connect("add"),
    "B9b, concat": connect("concat"),
    "B9b, bottleneck": connect("bottleneck"),
    "B9b, bottleneck of two": connect("bottleneck", channels=8, convs=2),
    "B9b, nested": lambda: rf.Connect(connect("concat")(), of("mnist", gate=True)(), "bottleneck"),
    "B10": shared(of("basic")),
    "B10, separate statistics": shared(of("bottleneck"), separate_stats=True),
    "B10, pre-activation": shared(of("basic", placement="full_preact")),
    "B11": of("basic", shortcut="none"),
    "B11, bottleneck": of("bottleneck", 2, 2, shortcut="none"),
    **placements(),
}


def made(row: str, training: bool = True) -> nn.Module:
    return randomise(ROWS[row]()).double().train(training)


def image(size: int = 6) -> torch.Tensor:
    return activation(3, IN, size, size - 1, torch.float64).requires_grad_()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("row", ROWS)
def test_equals_its_definition(row: str, training: bool) -> None:
    plain.assert_equal(made(row, training), image())


@pytest.mark.parametrize("row", ROWS)
def test_explain_shows_it_fused(row: str) -> None:
    block = made(row)
    rows = rf.explain(block, image()).rows
    assert rows
    assert all(r.plan != "eager" and r.reason for r in rows), rows
    with recording() as calls:
        block(image())
    assert len(rows) == len(calls)  # nothing runs that explain does not show


@pytest.mark.parametrize("row", ROWS)
def test_composed_and_folded_it_is_the_same(row: str) -> None:
    """With a hook on an inner layer a block runs module by module, as `reference` has it."""
    block, x = made(row, training=False), image().detach()
    with torch.no_grad():
        want = plain.forward(block, x)
        folded = rf.optimize_for_inference(block, x)
        assert relative_error(folded(x), want) < 1e-9
        assert folded.report.folded or folded.report.left
        assert all(folded.report.left.values())
        for conv in (m for m in block.modules() if type(m) is nn.Conv2d):
            conv.register_forward_hook(lambda *_: None)
        with recording() as calls:
            assert relative_error(block(x), want) < 1e-9
    assert any("forward hook" in (call.reason or "") for call in calls)


SLOW_TO_COMPILE = ("B12 relu_before_add, basic, shortcut A", "B12 relu_preact, bottleneck", "B9b, bottleneck")


@pytest.mark.parametrize("row", ["B12 bn_after_add, basic, shortcut B", "B12 full_preact, basic, shortcut A",
                                 *(pytest.param(row, marks=pytest.mark.slow) for row in SLOW_TO_COMPILE)])  # fmt: skip
def test_compiles(row: str) -> None:
    torch.compiler.reset()
    block, x = made(row).float(), image().detach().float().requires_grad_()
    dy = torch.randn_like(copy.deepcopy(block)(x))
    want = observe_module(copy.deepcopy(block), x, dy)
    got = observe_module(torch.compile(copy.deepcopy(block), fullgraph=True), x, dy)
    got = {name.replace("_orig_mod.", ""): t for name, t in got.items()}
    assert all(relative_error(got[name], t) < 1e-5 for name, t in want.items())


@pytest.mark.parametrize("row", [row for row in ROWS if row.startswith("B12")])
def test_placements_under_autocast(row: str) -> None:
    """The output has the type that the block's modules would give, where they run one by one."""
    block, x = made(row).float(), image(9).detach().float()
    modules = copy.deepcopy(block)
    modules.conv1.register_forward_hook(lambda *_: None)
    with torch.autocast("cpu", torch.bfloat16):
        y, want = block(x), modules(x)
    if row.startswith("B12 full"):  # whose join is of the types of both: there the modules promote
        want = want.to(y.dtype)
    assert y.dtype == want.dtype
    assert relative_error(y, want) < 3e-2


# ---------------------------------------------------------------------------------------------- what they are


def test_the_stride_is_where_it_was_asked_for() -> None:
    strides = {
        row: [m.stride[0] for m in (block.conv1, block.conv2)]
        for row in ("B1, shortcut B", "B2", "B3, v1.5", "B3, v1", "B4, stride on conv2")
        for block in [ROWS[row]()]
    }
    assert strides == {
        "B1, shortcut B": [2, 1],
        "B2": [1, 2],
        "B3, v1.5": [1, 2],
        "B3, v1": [2, 1],
        "B4, stride on conv2": [1, 2],
    }


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_shortcuts_are_the_papers(kind: str) -> None:
    """A never has parameters, B where shapes change, C always; a projection without a norm has a bias."""

    def parameters(block: Any) -> list[str]:
        return [] if block.downsample is None else [name for name, _ in block.downsample.named_parameters()]

    projection = ["0.weight", "1.weight", "1.bias"]
    for letter, same, other in (("A", [], []), ("B", [], projection), ("C", projection, projection)):
        assert parameters(of(kind, shortcut=letter)()) == same
        assert parameters(of(kind, 2, 2, shortcut=letter)()) == other
        assert parameters(of(kind, 2, 1, shortcut=letter)()) == other
    assert parameters(of(kind, shortcut="C", projection_norm=False)()) == ["0.weight", "0.bias"]
    assert [n for n, _ in of(kind, shortcut="none")().named_parameters() if "downsample" in n] == []


def test_options_are_shown() -> None:
    text = repr(of("basic", residual_scale=0.1)())
    assert "branch_scale=0.1" in text
    assert "placement" not in text
    assert "placement='relu_preact'" in repr(of("basic", placement="relu_preact")())


@pytest.mark.parametrize("placement", ["original", "bn_after_add", "relu_before_add", "relu_preact"])
def test_a_class_as_kind(placement: str) -> None:
    """The plain reference block takes the same options, and fuse_ makes it the fused one."""
    block = create(reference.Bottleneck, IN, 8, 2, placement=placement, stride_on="conv1", shortcut="A").double()
    x = image()
    want = plain.Plain(copy.deepcopy(block), plain.residual)(x)
    assert relative_error(copy.deepcopy(block)(x), want) < 1e-12
    assert [row.fused for row in rf.fuse_(block).rows] == [True]
    assert relative_error(block(x), want) < 1e-9
    theirs = create(tv.BasicBlock, IN, 32, 2, shortcut="A")
    assert isinstance(theirs.downsample, rf.PaddedShortcut)


def test_norm_is_the_callers() -> None:
    block = create("basic", IN, 32, 2, norm=partial(nn.BatchNorm2d, eps=0.5), shortcut="C").double()
    assert {m.eps for m in block.modules() if isinstance(m, nn.BatchNorm2d)} == {0.5}
    plain.assert_equal(block, image())
    without = create("bottleneck", IN, 4, norm=nn.Identity).double()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in without.modules())
    plain.assert_equal(without, image())


def test_shared_weights_are_one_parameter() -> None:
    one, separate = (rf.Shared(rf.BasicBlock(8, 8), 3, separate_stats=flag) for flag in (False, True))
    single = sum(p.numel() for p in rf.BasicBlock(8, 8).parameters())
    assert [sum(p.numel() for p in m.parameters()) for m in (one, separate)] == [single, single]
    x = activation(2, 8, 5, 5, torch.float32)
    one(x), separate(x)
    assert [int(b.bn1.num_batches_tracked) for b in one] == [3, 3, 3]
    assert [int(b.bn1.num_batches_tracked) for b in separate] == [1, 1, 1]
    assert not torch.equal(separate[0].bn1.running_mean, separate[1].bn1.running_mean)
    loaded = rf.Shared(rf.BasicBlock(8, 8), 3, separate_stats=True)
    loaded.load_state_dict(separate.state_dict())
    assert torch.equal(loaded.eval()(x), separate.eval()(x))


def test_what_comes_out() -> None:
    """`out_channels` says it before, and a bottleneck connection brings it back."""
    x = image().detach().float()
    for connection, channels in (("add", 16), ("concat", 32), ("bottleneck", 16)):
        assert create("basic", IN, 16, connection=connection)(x).shape[1] == channels
        assert BlockOptions(connection=connection).out_channels(IN, 16) == channels
    for row in ("B9b, add", "B9b, concat", "B9b, bottleneck", "B9b, bottleneck of two", "B9b, nested"):
        module: Any = ROWS[row]()
        assert module(x).shape[1] == module.out_channels


# ------------------------------------------------------------------------------------------------- errors

BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "letter": (of("basic", shortcut="D"), "shortcut is 'D', expected one of 'A', 'B', 'C', 'none'"),
    "kind": (of("wide"), "kind is 'wide', expected one of 'basic', 'bottleneck', 'mnist', or a block class"),
    "stride_on": (of("bottleneck", stride_on="conv3"), "stride_on is 'conv3', expected one of None, 'conv1', 'conv2'"),
    "placement": (of("basic", placement="post"), "placement is 'post', expected one of 'original', "),
    "connection": (of("basic", connection="cat"), "connection is 'cat', expected one of 'add', 'concat', 'bottleneck'"),
    "gate": (of("basic", gate=True), "gate is True, expected False with kind='basic'"),
    "gate and scale": (
        of("mnist", gate=True, residual_scale=0.5),
        "residual_scale is 0.5, expected 1.0 with gate=True",
    ),
    "mnist's shortcut": (of("mnist", shortcut="C"), "shortcut is 'C', expected 'B' with kind='mnist'"),
    "mnist's channels": (lambda: create("mnist", 8, 16), r"planes is 16, expected 8 \(inplanes\) with kind='mnist'"),
    "mnist's stride": (of("mnist", 2), "stride is 2, dilation 1, expected 1 and 1 with kind='mnist'"),
    "plain and scaled": (
        of("basic", shortcut="none", shortcut_scale=0.5),
        "shortcut_scale is 0.5, expected 1.0 with shortcut='none'",
    ),
    "A and a norm": (
        of("basic", shortcut="A", projection_norm=False),
        "projection_norm is False, expected True with shortcut='A'",
    ),
    "A to fewer channels": (lambda: create("basic", 16, 8, shortcut="A"), r"before is 0, expected 0 to -8"),
    "placed and scaled": (
        of("basic", placement="relu_preact", residual_scale=0.1),
        "residual_scale is 0.1, expected 1.0 with placement='relu_preact'",
    ),
    "pre-activation in groups": (
        of("bottleneck", placement="full_preact", groups=2),
        "groups is 2, expected 1 with placement='full_preact'",
    ),
    "strided concatenation": (
        of("basic", 2, connection="concat"),
        "stride is 2, dilation 1, expected 1 and 1 with connection='concat'",
    ),
    "projected concatenation": (
        of("basic", connection="concat", shortcut="C"),
        "shortcut is 'C', expected 'B' with connection='concat'",
    ),
    "basic in groups": (of("basic", groups=2), "BasicBlock only supports groups=1"),
    "a foreign class": (
        lambda: create(tv.BasicBlock, 8, 8, placement="relu_preact"),
        "placement is 'relu_preact', expected 'original' with kind=BasicBlock",
    ),
    "a foreign plain class": (
        lambda: create(tv.BasicBlock, 8, 8, shortcut="none"),
        "shortcut is 'none', which BasicBlock does not have",
    ),
    "pre-activation's shortcut": (
        lambda: rf.PreActBasicBlock(8, 8, shortcut="D"),  # type: ignore[arg-type]
        "shortcut is 'D', expected 'A', 'B' or 'C'",
    ),
    "times": (lambda: rf.Shared(rf.BasicBlock(8, 8), 0), "times is 0, expected at least 1"),
    "Connect's connection": (
        lambda: rf.Connect(rf.BasicBlock(8, 8), rf.BasicBlock(8, 8), "sum"),  # type: ignore[arg-type]
        "connection is 'sum', expected one of",
    ),
    "Connect's channels": (
        lambda: rf.Connect(rf.BasicBlock(8, 8), rf.BasicBlock(8, 8), "add", 8),
        "channels=8, convs=1 with connection='add'",
    ),
    "Connect's unknown": (
        lambda: rf.Connect(nn.ReLU(), rf.BasicBlock(8, 8), "bottleneck"),
        "the output channels of ReLU and BasicBlock are unknown",
    ),
    "convs": (
        lambda: rf.Connect(rf.BasicBlock(8, 8), rf.BasicBlock(8, 8), "bottleneck", convs=0),
        "convs is 0, expected at least 1",
    ),
    "joined": (
        lambda: rf.Connect(of("basic")(), of("basic", wider=2)(), "add")(image().float()),
        r"Join: the outputs have shapes \[3, 16, 6, 5\] and \[3, 32, 6, 5\], expected the same shape",
    ),
    "joined pixels": (
        lambda: rf.Connect(of("basic")(), of("basic", 2)(), "concat")(image().float()),
        "expected the same N, H and W",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_options(what: str) -> None:
    call, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        call()


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'shortcuts'"):
        create("basic", 8, 8, shortcuts="A")


OPTIONS = {
    "shortcut": st.sampled_from(["A", "B", "C", "none"]),
    "projection_norm": st.booleans(),
    "stride_on": st.sampled_from([None, "conv1", "conv2"]),
    "placement": st.sampled_from(reference.PLACEMENTS),
    "residual_scale": st.sampled_from([1.0, 0.1]),
    "shortcut_scale": st.sampled_from([1.0, -0.5]),
    "connection": st.sampled_from(["add", "concat", "bottleneck"]),
    "norm": st.sampled_from([nn.BatchNorm2d, nn.Identity]),
    "gate": st.booleans(),
}


@given(
    kind=st.sampled_from(["basic", "bottleneck", "mnist"]), stride=st.integers(1, 3), wider=st.integers(1, 2),
    training=st.booleans(), options=st.fixed_dictionaries({}, optional=OPTIONS),
)  # fmt: skip
def test_any_options(kind: str, stride: int, wider: int, training: bool, options: dict[str, Any]) -> None:
    """They make a block that is what its definition says, or an error that names one of them."""
    message, block = "", nn.Identity()
    try:
        block = of(kind, stride, wider, **options)()
    except ValueError as error:
        message = str(error)
    if message:
        assert any(name in message for name in (*OPTIONS, "stride", "planes"))
        return
    plain.assert_equal(randomise(block).double().train(training), image(), within=1e-7)
