"""The networks of the catalogue: sizes, definitions in float64, what explain shows, state dicts, inference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import plain
import pytest
import torch
from conftest import observe_module, randomise, relative_error
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused import models, network, reference
from resnet_fused.cifar import cifar_resnet
from resnet_fused.models import CifarPreActResNet, CifarResNet, MNISTResNet, PreActResNet, ResNet

# ------------------------------------------------------------------------------------------------- parameters

COUNTS = {  # the last digits as torchvision's and others' implementations of the papers have them
    "resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032, "resnet101": 44_549_160,
    "resnet152": 60_192_808, "resnext50_32x4d": 25_028_904, "wide_resnet50_2": 68_883_240,
    "cifar_resnet20": 269_722, "cifar_resnet32": 464_154, "cifar_resnet44": 658_586, "cifar_resnet56": 853_018,
    "cifar_resnet110": 1_727_962, "cifar_resnet1202": 19_421_274,
    "cifar_stem_resnet18": 11_173_962, "cifar_stem_resnet34": 21_282_122, "cifar_stem_resnet50": 23_520_842,
    "mnist_resnet": 210_882,
}  # fmt: skip
PAPERS = {  # millions, as He et al. print them (2015: table 6; 2016: table 4)
    "cifar_resnet20": "0.27", "cifar_resnet32": "0.46", "cifar_resnet44": "0.66", "cifar_resnet56": "0.85",
    "cifar_resnet110": "1.7", "cifar_resnet1202": "19.4", "preact_resnet110": "1.7", "preact_resnet164": "1.7",
}  # fmt: skip


def conv(k: int, c: int, out: int) -> int:
    return k * k * c * out


def norm(c: int) -> int:
    return 2 * c


def counted(
    kind: str, layers: tuple[int, ...], widths: tuple[int, ...], stem: int, classes: int, shortcut: str, preact: bool
) -> int:
    """Parameters of a network, from the paper's description alone."""
    total, c = conv(stem, 3, widths[0]) + norm(widths[0]), widths[0]
    for i, (blocks, width) in enumerate(zip(layers, widths, strict=True)):
        out = 4 * width if kind == "bottleneck" else width
        for j in range(blocks):
            sizes = [(3, c, width), (3, width, width)]
            if kind == "bottleneck":
                sizes = [(1, c, width), (3, width, width), (1, width, out)]
            total += sum(conv(*size) for size in sizes)
            normed = [a for _, a, _ in sizes] if preact else [b for _, _, b in sizes]
            total += sum(map(norm, normed[1:] if preact and i == j == 0 else normed))
            changes = c != out or (i > 0 and j == 0)
            if shortcut == "C" or (shortcut == "B" and changes):
                total += conv(1, c, out) + (0 if preact else norm(out))
            c = out
    return total + (norm(c) if preact else 0) + c * classes + classes


WIDE, NARROW = (64, 128, 256, 512), (16, 32, 64)
TWOS, RESNET50 = (2, 2, 2, 2), (3, 4, 6, 3)
BY_HAND: dict[str, int] = {
    "plain18": counted("basic", TWOS, WIDE, 7, 1000, "none", False),
    "plain34": counted("basic", RESNET50, WIDE, 7, 1000, "none", False),
    "preact_resnet18": counted("basic", TWOS, WIDE, 7, 1000, "B", True),
    "preact_resnet50": counted("bottleneck", RESNET50, WIDE, 7, 1000, "B", True),
    "preact_resnet110": counted("basic", (18,) * 3, NARROW, 3, 10, "B", True),
    "preact_resnet164": counted("bottleneck", (18,) * 3, NARROW, 3, 10, "B", True),
    **{f"cifar_plain{6 * n + 2}": counted("basic", (n,) * 3, NARROW, 3, 10, "none", False) for n in (3, 5, 7, 9, 18)},
    # (1-g) x + g F(x): a biased 1x1 convolution more in each of the two blocks
    "mnist_gated_resnet": COUNTS["mnist_resnet"] + (16 * 16 + 16) + (32 * 32 + 32),
}


def parameters(name: str, **options: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in models.create(name, **options).parameters())


@pytest.mark.parametrize("name", models.MODELS)
def test_parameter_counts(name: str) -> None:
    count = parameters(name)
    assert count == (COUNTS | BY_HAND)[name]
    if name in PAPERS:
        # 853,018 is printed as 0.85: the papers round, and cut
        digits = len(PAPERS[name].split(".")[1])
        assert abs(count / 1e6 - float(PAPERS[name])) < 10**-digits


@pytest.mark.parametrize("shortcut", ["A", "B", "C", "none"])
@pytest.mark.parametrize(
    ("name", "kind", "layers"), [("resnet18", "basic", TWOS), ("resnet50", "bottleneck", RESNET50)]
)
def test_counts_of_every_shortcut(name: str, kind: str, layers: tuple[int, ...], shortcut: str) -> None:
    assert parameters(name, shortcut=shortcut) == counted(kind, layers, WIDE, 7, 1000, shortcut, False)


def test_the_registry_is_whole() -> None:
    depths = (20, 32, 44, 56, 110)
    expected = {
        *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
        *(f"plain{depth}" for depth in (18, 34)),
        *(f"cifar_{kind}{depth}" for kind in ("resnet", "plain") for depth in depths),
        *(f"cifar_stem_resnet{depth}" for depth in (18, 34, 50)),
        *(f"preact_resnet{depth}" for depth in (18, 50, 110, 164)),
        *("resnext50_32x4d", "wide_resnet50_2", "cifar_resnet1202", "mnist_resnet", "mnist_gated_resnet"),
    }
    assert set(models.MODELS) == expected
    assert all(name in models.__all__ and getattr(models, name) is models.MODELS[name] for name in expected)
    assert set(network.MODELS) == set(models.TORCHVISION)


@pytest.mark.parametrize("name", [name for name in models.MODELS if name != "cifar_resnet1202"])
def test_the_image_it_is_for(name: str) -> None:
    with torch.device("meta"):
        model = models.create(name).eval()
        x = torch.empty(2, *models.image_shape(model))
        assert model(x).shape == (2, 1000 if models.image_shape(model)[1] == 224 else 10)


# ------------------------------------------------------------------------------------------------ definitions

ONES, THREE = (1, 1, 1, 1), (2, 1, 1)
LARGE, SMALL, MNIST = (3, 33, 33), (3, 12, 12), (1, 28, 28)
N1 = partial(ResNet, rf.Bottleneck, ONES, 7, width_per_group=16)
N3 = partial(CifarResNet, "basic", THREE)
N6 = partial(CifarPreActResNet, "basic", THREE)
FAMILIES: dict[str, tuple[Callable[..., nn.Module], tuple[int, int, int]]] = {
    "N1, shortcut A": (partial(N1, shortcut="A"), LARGE),
    "N1, shortcut B, v1": (partial(N1, stride_on="conv1"), LARGE),
    "N1, shortcut C": (partial(N1, shortcut="C"), LARGE),
    "N2": (partial(ResNet, rf.BasicBlock, ONES, 7, shortcut="none"), LARGE),
    "N3": (partial(N3, shortcut="A"), SMALL),
    "N3, plain": (partial(N3, shortcut="none"), SMALL),
    "N3, scaled": (partial(N3, residual_scale=0.1, stride_on="conv2"), SMALL),
    "N3, relu_before_add": (partial(N3, placement="relu_before_add", shortcut="A"), SMALL),
    "N3, bn_after_add": (partial(CifarResNet, "bottleneck", THREE, placement="bn_after_add"), SMALL),
    "N3, relu_preact": (partial(N3, placement="relu_preact"), SMALL),
    "N4": (partial(CifarResNet, rf.Bottleneck, ONES, (8, 16, 24, 32)), (3, 16, 16)),
    "N5": (MNISTResNet, MNIST),
    "N5, gated": (models.mnist_gated_resnet, MNIST),
    "N6, large images": (partial(PreActResNet, "basic", ONES, 7), LARGE),
    "N6": (partial(CifarPreActResNet, "bottleneck", THREE), SMALL),
    "N6, shortcut A": (partial(N6, shortcut="A"), SMALL),
    "N6, shortcut C": (partial(N6, shortcut="C"), SMALL),
}


def family(name: str, training: bool = True) -> tuple[nn.Module, Tensor]:
    """A small network of it, and images."""
    make, shape = FAMILIES[name]
    return randomise(make()).double().train(training), torch.randn(4, *shape, dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", FAMILIES)
def test_equals_its_definition(name: str, training: bool) -> None:
    model, x = family(name, training)
    plain.assert_equal(model, x, plain.network, within=1e-7)


@pytest.mark.parametrize("name", FAMILIES)
def test_explain_shows_nothing_unfused_without_a_reason(name: str) -> None:
    """What is eager is no part of a block: the classifier, and the convolution in front of the pooled stem."""
    model, x = family(name)
    rows = rf.explain(model, x).rows
    eager = {row.name: row.reason for row in rows if row.plan == "eager"}
    pooled = {"conv1"} if hasattr(model, "maxpool") else set()
    assert set(eager) == ({"fc1", "fc2"} if name.startswith("N5") else {"fc", *pooled})
    assert set(eager.values()) == {"not part of a block or stem"}
    shown = {row.name.removesuffix(".join").rsplit(".", 1)[0] if "gated" in name else row.name for row in rows}
    blocks = [n for n, m in model.named_modules() if isinstance(m, rf.blocks.FusedBlock | rf.blocks.PreActBlock)]
    assert set(blocks) <= shown


@pytest.mark.parametrize("name", FAMILIES)
def test_optimized_for_inference(name: str) -> None:
    model, x = family(name, training=False)
    with torch.no_grad():
        want = plain.network(model, x)
        folded: Any = rf.optimize_for_inference(model, x)
        assert relative_error(folded(x), want) < 1e-9
    left = {"its last norm is behind the sum"} if "bn_after_add" in name else set()
    assert set(folded.report.left.values()) == left
    assert not any(isinstance(m, nn.BatchNorm2d) for n, m in folded.named_modules() if n not in folded.report.left
                   and n.rsplit(".", 1)[0] not in folded.report.left)  # fmt: skip


@pytest.mark.parametrize("name", ["N1, shortcut A", "N3", "N6"])
def test_a_copy_and_a_state_dict(name: str) -> None:
    model, x = family(name, training=False)
    twin = copy.deepcopy(model)
    other = FAMILIES[name][0]().double().eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))
        assert torch.equal(other(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["N3", "N6"])
def test_compiles(name: str) -> None:
    torch.compiler.reset()
    model, x = family(name)
    dy = torch.randn(4, 10, dtype=torch.float64)
    want = observe_module(copy.deepcopy(model), x, dy)
    got = observe_module(torch.compile(copy.deepcopy(model), fullgraph=True), x, dy)
    got = {key.replace("_orig_mod.", ""): t for key, t in got.items()}
    assert all(relative_error(got[key], t) < 1e-7 for key, t in want.items())


def test_fuse_fuses_plain_networks_of_the_reference_blocks() -> None:
    """`block` may be a plain class: that is the twin to compare with, and fuse_ makes the one the other."""
    for options in ({"shortcut": "A"}, {"shortcut": "none"}, {"placement": "relu_preact"}):
        model = randomise(CifarResNet(reference.BasicBlock, THREE, **options)).double()
        x = torch.randn(4, 3, 12, 12, dtype=torch.float64)
        plain.assert_equal(model, x, lambda net, x: copy.copy(net)(x))
        report = rf.fuse_(model)
        assert all(row.fused for row in report.rows)
        assert len(report.rows) == 5
        plain.assert_equal(model, x, plain.network, within=1e-7)


def test_a_stem_with_a_hook_runs_module_by_module() -> None:
    model, x = family("N3")
    seen: list[Any] = []
    model.relu.register_forward_hook(lambda *a: seen.append(a))
    rows = {row.name: row for row in rf.explain(model, x).rows}
    assert seen
    assert (rows["bn1"].plan, rows["bn1"].reason) == ("eager", "relu has a forward hook")
    assert relative_error(model.eval()(x), plain.network(copy.deepcopy(model), x)) < 1e-9


def test_the_last_norm_gets_its_statistics_from_the_block_in_front() -> None:
    counts: dict[str, int] = {}

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._opname == "bn_stats":
                counts["taken"] = counts.get("taken", 0) + 1
            if func._opname == "preact_block":
                for key, at in (("handed", 6), ("handed on", 9)):
                    counts[key] = counts.get(key, 0) + bool(args[at])
            return func(*args, **(kwargs or {}))

    model, x = family("N6")  # of four blocks the first has no norm in front
    with Count():
        model(x)
    assert counts == {"handed": 2, "handed on": 3}
    model.layer2.register_forward_hook(lambda *_: None)  # who watches a stage sees it called
    counts.clear()
    with Count():
        model(x)
    assert counts["handed"] == 0


def test_another_norm_at_the_end() -> None:
    """One that torch has converted runs fused too, any other as it is."""
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(CifarPreActResNet("basic", THREE)).double()
    grouped = CifarPreActResNet("basic", THREE, norm_layer=partial(nn.GroupNorm, 4)).double()
    plain.assert_equal(grouped, x, plain.network)
    rows = [
        {row.name: (row.plan, row.reason) for row in rf.explain(m.eval(), x).rows}["norm"] for m in (converted, grouped)
    ]
    assert rows == [("fused", "batch norm and ReLU in one pass"), ("eager", "bn is a GroupNorm")]


# ------------------------------------------------------------------------------------------------ state dicts


class Others(nn.Module):
    """A CIFAR ResNet in the names of others: `shortcut` in the blocks, `linear` behind them."""

    class Block(nn.Module):
        def __init__(self, c: int, k: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(c, k, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(k)
            self.conv2 = nn.Conv2d(k, k, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(k)
            self.shortcut = nn.Sequential()
            if stride != 1 or c != k:
                self.shortcut = nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=False), nn.BatchNorm2d(k))

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            return torch.relu(y + self.shortcut(x))

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        for i, (c, k) in enumerate(((64, 64), (64, 128), (128, 256), (256, 512)), 1):
            setattr(self, f"layer{i}", nn.Sequential(self.Block(c, k, 1 if i == 1 else 2), self.Block(k, k, 1)))
        self.linear = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
        return self.linear(x.mean((2, 3)))


def test_loads_what_others_call_shortcut() -> None:
    theirs = randomise(Others()).eval()
    state = theirs.state_dict()
    ours = models.cifar_stem_resnet18()
    ours.load_state_dict(state)
    assert list(state) == list(theirs.state_dict())  # the caller's dict is as it was
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert relative_error(ours.eval()(x), theirs(x)) < 1e-5
    inside = nn.Sequential(models.cifar_stem_resnet18())
    inside.load_state_dict({f"0.{key}": t for key, t in state.items()})
    assert torch.equal(inside[0].fc.weight, theirs.linear.weight)
    ours.load_state_dict(inside[0].state_dict())  # torchvision's names


def test_a_state_dict_of_another_network_is_refused() -> None:
    state = Others().state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*layer2\.0\.downsample\.0\.weight"):
        models.cifar_stem_resnet18(shortcut="A").load_state_dict(state)
    del state["layer2.0.shortcut.0.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*layer2\.0\.downsample\.0\.weight"):
        models.cifar_stem_resnet18().load_state_dict(state)


# ----------------------------------------------------------------------------------------------------- errors

BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "depth": (lambda: cifar_resnet(21), "depth is 21, expected 6n \\+ 2, as 8, 14, ..."),
    "letter": (lambda: models.resnet18(shortcut="D"), "shortcut is 'D', expected one of"),
    "placement": (lambda: models.resnet18(placement="full_preact"), "placement is 'full_preact', whose networks are"),
    "small placement": (lambda: models.cifar_resnet20(placement="full_preact"), "whose networks are PreActResNet"),
    "zero blocks": (lambda: models.plain18(zero_init_residual=True), "the blocks would give zeros"),
    "zero sums": (
        lambda: models.cifar_resnet20(zero_init_residual=True, placement="bn_after_add"),
        "the blocks would give zeros",
    ),
    "stages": (lambda: CifarResNet("basic", (1, 1), (16, 32, 64)), "expected one entry each a stage"),
    "no stages": (lambda: CifarPreActResNet("basic", (), ()), "widths is empty"),
    "placed": (
        lambda: CifarPreActResNet("basic", THREE, placement="original"),
        "placement is 'original', expected none",
    ),
    "layers": (lambda: ResNet("basic", (1, 1, 1)), r"layers is \(1, 1, 1\), expected 4 entries"),
    "empty stage": (lambda: CifarResNet("basic", (1, 0, 1)), "a stage of 0 blocks, expected at least 1"),
    "pre-activation's stages": (lambda: PreActResNet("basic", (1, 1)), r"layers is \(1, 1\), expected 4 entries"),
    "gate": (lambda: models.resnet18(gate=True), "gate is True, expected False"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_options(what: str) -> None:
    call, message = BAD[what]
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        call()


def test_zero_init_makes_identities() -> None:
    model = CifarResNet("basic", THREE, shortcut="A", zero_init_residual=True)
    assert all(bool((block.bn2.weight == 0).all()) for block in model.layer1)
