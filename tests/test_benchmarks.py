"""The benchmarks: shapes, what each file's smallest case computes, measurements by made-up clocks, report, roofline."""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import relative_error
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks import gpus, report, roofline, suite, table
from benchmarks.gpus import GPUS
from benchmarks.roofline import HEAD, TOTAL, Floor, Kernel, Roofline
from benchmarks.shapes import BLOCKS, CONVS, INNER, JOINS, NORMS, BlockShape, ConvShape, NormShape
from benchmarks.suite import Case, Measurement
from benchmarks.variants import UnavailableError
from resnet_fused import network
from resnet_fused.costs import Machine
from resnet_fused.network import Comparison
from resnet_fused.timing import Times

ROOT = Path(__file__).parents[1]
FILES = sorted(path.stem for path in (ROOT / "benchmarks").glob("bench_*.py"))
OPS = [name for name in FILES if name not in ("bench_blocks", "bench_networks")]


# ---------------------------------------------------------------------------------------------------------- shapes


def walked(name: str) -> Iterator[tuple[str, nn.Module, int, int]]:
    """Modules of a torchvision network with the sizes of their inputs and outputs, in the order in which they run."""
    seen: list[tuple[str, nn.Module, int, int]] = []
    model = network.create(name, torch.float32)
    for key, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)) or hasattr(module, "conv2"):
            module.register_forward_hook(
                lambda module, args, out, key=key: seen.append((key, module, args[0].shape[2], out.shape[2]))
            )
    with torch.no_grad():
        model(network.images(1, 224, torch.float32))
    return iter(seen)


def test_shapes_are_those_of_torchvision() -> None:
    """Every convolution, batch norm and block of both networks, and nothing else."""
    convs, norms, blocks, inner, joins = set(), set(), set(), set(), set()
    for name, kind in (("resnet18", "basic"), ("resnet50", "bottleneck")):
        for key, module, size, out in walked(name):
            if isinstance(module, nn.Conv2d):
                kernel, stride = module.kernel_size[0], module.stride[0]
                conv = ConvShape(module.in_channels, module.out_channels, kernel, stride, size)
                assert (module.padding[0], out) == (conv.padding, conv.output.size)
                convs.add(conv)
                if re.search(r"\.conv[23]$", key):
                    inner.add(conv)
            elif isinstance(module, nn.BatchNorm2d):
                norms.add(NormShape(module.num_features, size))
            elif re.fullmatch(r"layer\d\.\d", key):
                blocks.add(BlockShape(kind, module.conv1.in_channels, module.bn1.num_features, module.stride, size))
                joins.add(NormShape(module.bn1.num_features * module.expansion, out))
                assert BlockShape(kind, 64, module.bn1.num_features, 1, 56).stage == int(key[5])
    assert (convs, norms, blocks) == ({*CONVS}, {*NORMS}, {*BLOCKS})
    assert (inner, joins) == (INNER, {*JOINS})
    assert all(len({*group}) == len(group) for group in (CONVS, NORMS, BLOCKS, JOINS))


@pytest.mark.parametrize("shape", BLOCKS, ids=lambda shape: shape.name)
def test_units_of_a_block(shape: BlockShape) -> None:
    block = shape.build()
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0]) for c in convs] == [
        unit[:4] for unit in shape.units()
    ]


# ------------------------------------------------------------------------------------------------------- bench files


def module_of(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{name}")


def smallest(cases: Sequence[Case], dtype: str = "fp32") -> list[Case]:
    """One of each kind: of each name without its shape, and of each kind of work."""
    found: dict[Any, Case] = {}
    for case in sorted((c for c in cases if c.dtype == dtype), key=lambda c: c.size):
        found.setdefault((re.match(r"[a-z_]+(1x1|2d|-backward|-join)*", case.name)[0], case.works), case)
    return list(found.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", OPS)
def test_variants_compute_the_same(name: str, dtype: str) -> None:
    """What is timed beside each other: the plain function and the op, in the file's smallest case of each kind.

    In bfloat16 eager PyTorch rounds between its ops, which decides whose gradient a pool passes on: no backward there.
    """
    for case in smallest(module_of(name).CASES, dtype):
        build = case.make()
        eager, ours = ([part() for part in build(variant)] for variant in ("eager", "ours"))
        assert len(eager) == len(case.works)
        compared = len(case.works) if dtype == "fp32" else 1
        for plain, fused in zip(*map(tree_leaves, (eager[:compared], ours[:compared])), strict=True):
            if plain is None or fused is None:  # an image's gradient
                continue
            assert plain.shape == fused.shape
            assert relative_error(fused, plain) <= (1e-4 if dtype == "fp32" else 2e-2), case.id


@pytest.mark.parametrize("name", ["bench_blocks", "bench_networks"])
def test_models_run(name: str) -> None:
    """Every variant but torch.compile's, in the smallest case of each kind; the same loss or output."""
    for case in smallest(module_of(name).CASES)[:3]:
        build = case.make()
        outputs: dict[str, Tensor] = {}
        for variant in case.variants:
            parts = "not now" if variant == "compile" else suite._built(build, variant)
            if isinstance(parts, str):
                assert variant == "compile" or "not installed" in parts
                continue
            first, *others = parts
            outputs[variant] = first().detach().clone()
            for part in others:
                assert all(grad is not None for grad in part())
        assert {"eager", "lean"} <= outputs.keys()
        for variant, y in outputs.items():
            assert relative_error(y, outputs["eager"]) < 1e-4, (case.id, variant)


def test_every_file_has_quick_cases_on_some_device_and_unique_names() -> None:
    ids = [case.id + case.works[0] for name in FILES for case in module_of(name).CASES]
    assert len({*ids}) == len(ids)
    products = ("bench_conv1x1", "bench_conv2d", "bench_expand", "bench_gram")  # on a CPU compositions: not quick
    assert all(any(case.quick for case in module_of(name).CASES) != (name in products) for name in FILES)


def test_cudnn_says_why_it_is_not_there() -> None:
    (case, *_) = smallest(module_of("bench_conv2d").CASES)
    with pytest.raises(UnavailableError, match="run on a GPU only"):
        case.make()("cudnn")


@pytest.mark.parametrize("inner", [True, False])
def test_cudnn_graph(inner: bool) -> None:
    """Its frontend takes the operations and their tensors; without a driver it checks no more."""
    torch.backends.cudnn.version()  # loads the library that it looks for
    cudnn = pytest.importorskip("cudnn")
    from benchmarks.cudnn_graph import unit_graph
    from benchmarks.ops import affine

    conv = ConvShape(64, 64, 3, 1, 8)
    x, w = (
        torch.randn(shape).half().contiguous(memory_format=torch.channels_last)
        for shape in ((2, 64, 8, 8), (64, 64, 3, 3))
    )
    _, tensors = unit_graph(cudnn, x, w, affine(64) if inner else None, conv)
    assert len(tensors) == (7 if inner else 5)
    assert tensors[-3].get_dim() == [2, 64, 8, 8]


# ------------------------------------------------------------------------------------------------------ measurements


def made_up(parts: dict[str, list[float]], missing: str = "", works: tuple[str, ...] = ("forward", "backward")) -> Case:
    """A case whose variants' parts take so many milliseconds by `ticking`."""

    def make():
        def build(variant: str):
            if variant == missing:
                raise UnavailableError("it is not here")
            return [lambda t=t: t for t in parts[variant]]

        return build

    return Case("made-up", "fp32", works, tuple(parts), make, counts=False, rounds=4, warmups=0, about={"op": "block"})


@pytest.fixture
def _ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timer for which a part takes what it returns; the machine slows down from round to round."""

    class Timer:
        slower = 1.0

        def __call__(self, parts: Sequence[Any]) -> Times:
            Timer.slower *= 1.5
            return Times([part() for part in parts], True)

    monkeypatch.setattr(suite, "HostTimer", Timer)


@pytest.mark.usefixtures("_ticking")
def test_measurement() -> None:
    case = made_up({"eager": [4.0, 8.0], "lean": [2.0, 2.0], "fast": [1.0, 1.0]}, missing="fast")
    measured = Measurement(case, ["lean", "fast"])
    assert case.kinds == ("forward", "backward", "train")
    forward, train = measured.result("lean", "forward"), measured.result("lean", "train")
    assert forward.seconds == [2e-3] * 4
    assert train.seconds == [4e-3] * 4
    assert train.info["ratio"] == {"median": 3, "low": 3, "high": 3}
    assert measured.result("fast", "train") == "it is not here"
    assert (train.info["case"], train.info["work"], train.info["op"]) == ("made-up", "train", "block")


@pytest.mark.usefixtures("_ticking")
def test_eager_is_measured_if_it_was_not_selected() -> None:
    case = made_up({"eager": [4.0], "ours": [1.0]}, works=("forward",))
    assert Measurement(case, ["ours"]).result("ours", "forward").info["ratio"]["median"] == 4


def test_counts_and_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bn_act: x is read, y written, and two vectors; of a convolution the products."""
    (inner, _join) = smallest(module_of("bench_bn_act").CASES)
    build = inner.make()
    counts = suite._counts({v: build(v) for v in ("eager", "ours")})
    channels, size = 512, 7
    assert counts == {"bytes": [4 * (2 * suite.BATCH * channels * size**2 + 2 * channels)], "flops": [0]}
    unit = smallest(module_of("bench_conv2d").CASES)[0].make()
    flops = suite._counts({"eager": unit("eager")})["flops"]
    assert flops == [2 * suite.BATCH * size**2 * channels * channels * 9]
    monkeypatch.setattr(suite, "ON_GPU", True)
    monkeypatch.setattr(suite, "roof", lambda: {"bandwidth": 1e9, "peak": {"fp32": 1e12}})
    figures = suite._figures(inner, {"bytes": 2e6, "flops": 1e9}, 4e-3)
    assert figures == pytest.approx(
        {"bytes": 2e6, "flops": 1e9, "gbs": 0.5, "tflops": 0.25, "floor": 2e-3, "share": 0.5}
    )


def test_clock_replays_rounds() -> None:
    call = suite.replayed([0.5, 0.25])
    times = [suite.clock()]
    for _ in range(2):
        call()
        times.append(suite.clock())
    assert [b - a for a, b in itertools.pairwise(times)] == pytest.approx([0.5, 0.25])


def test_command_writes_one_table_and_json(tmp_path: Path) -> None:
    """One test for each variant; one table; what was not selected is not measured."""
    command = [sys.executable, "-m", "benchmarks", "-k", "bn_stats and not compile", "--device", "cpu"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # no worker of xdist
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("eager/ours") == 1
    assert "2 passed" in done.stdout
    (path,) = tmp_path.iterdir()
    results = report.Results.read(path)
    assert path.stem == results.name
    assert [(row.case, row.work, row.variant) for row in results.rows] == [
        ("bn_stats-64@56-fp32", "forward", variant) for variant in ("eager", "ours")
    ]
    assert all(row.info["gbs"] > 0 and row.info["ratio"]["low"] > 0 for row in results.rows)
    assert results.about["roof"]["kind"] == "measured"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        module_of("__main__").main(["--device", "cuda"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "benchmarks: error: --device cuda, but there is no GPU here\n"


# ------------------------------------------------------------------------------------------------------------ report


def stored(device: str = "cpu") -> dict[str, Any]:
    """A small result file: two blocks and an op, of three variants."""
    about = {
        "device": device, "gpu": "NVIDIA H100 80GB HBM3" if device == "cuda" else None, "processor": "Some CPU @ 2 GHz",
        "threads": 2, "malloc": "default malloc", "versions": {"resnet_fused": "1.2.3", "torch": "2.10"},
        "roof": {"kind": "published", "bandwidth": 1e12, "peak": {"bf16": 1e14}},
    }  # fmt: skip
    benchmarks = []
    for case, stage, ratio in (("bottleneck-a", 1, 2.0), ("bottleneck-b", 1, 8.0), ("bottleneck-c", 2, 3.0)):
        for variant in ("eager", "compile", "lean"):
            r = {"eager": 1.0, "compile": 1.5, "lean": ratio}[variant]
            info = {
                "case": case, "op": "block", "kind": "bottleneck", "stage": stage, "dtype": "bf16", "work": "forward",
                "variant": variant, "ratio": {"median": r, "low": r, "high": r}, "bytes": 1e6, "flops": 1e8,
                "gbs": 10.0, "share": 0.5,
            }  # fmt: skip
            benchmarks.append({"extra_info": info, "stats": {"data": [0.25 / r, 0.5 / r, 0.25 / r]}})
    return {"machine_info": {"resnet_fused": about}, "benchmarks": benchmarks}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_report(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(stored(device)))
    out = tmp_path / "out"
    assert report.main([str(path), "--out", str(out), "--model", "resnet18", "--batch", "8"]) == 0
    name = {"cpu": "some-cpu-2-ghz-1.2.3", "cuda": "nvidia-h100-80gb-hbm3-1.2.3"}[device]
    ends = (".md", "-speed.png", "-traffic.png", "-saved.png", "-roofline.png")
    assert {p.name for p in out.iterdir()} == {name + end for end in ends}
    assert capsys.readouterr().out.split() == [str(out / (name + end)) for end in ends]
    for end in ends[1:]:
        assert (out / (name + end)).read_bytes().startswith(b"\x89PNG")
    text = (out / f"{name}.md").read_text()
    assert (
        "| bottleneck-b-bf16 | forward | 250.000 | 166.667 | 31.250 | 1.50x (1.50-1.50) | 8.00x (8.00-8.00) |" in text
    )
    assert all(word in text for word in ("Measured", "counted", "modelled", "| stage 4 |", "resnet18, batch 8"))


def test_ratios_by_stage_are_geometric_means(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(stored()))
    found = report.stage_ratios(report.Results.read(path).rows)
    kind = "bottleneck bf16 forward"
    assert found["ours"] == pytest.approx({(kind, 1): 4.0, (kind, 2): 3.0})
    assert found["compile"] == pytest.approx({(kind, 1): 1.5, (kind, 2): 1.5})
    assert report.points(report.Results.read(path).rows)["block forward bf16"] == [(100.0, 1e10)] * 3


def test_bytes_by_stage_are_those_of_the_comparison() -> None:
    compared = Comparison.of("resnet18", 8)
    moved, kept = report.traffic(compared), report.saved(compared)
    assert moved["lean"] == [step.moved.passes for step in compared.ours["lean"]]
    assert moved["eager"][0] > moved["torch.compile (modelled)"][0] > moved["lean"][0] > 0
    assert sum(kept["eager"]) == sum(step.saved for step in compared.eager)


def test_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line each, and the others are read."""
    without_stats = copy.deepcopy(stored())
    del without_stats["benchmarks"][0]["stats"]
    bad = {
        "text.json": ("not json", "is not JSON"),
        "list.json": ("[]", "is not a result of `make bench`"),
        "other.json": ('{"machine_info": {}, "benchmarks": []}', "is not a result of `make bench`"),
        "empty.json": (json.dumps(stored() | {"benchmarks": []}), "is not a result of `make bench`"),
        "stats.json": (json.dumps(without_stats), "is not a result of `make bench`"),
        "gpu-check.json": ('{"schema": 1, "sections": {}}', "passed over"),
    }
    for name, (content, _) in bad.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "good.json").write_text(json.dumps(stored()))
    files = [str(tmp_path / name) for name in (*bad, "missing.json", "good.json")]
    assert report.main([*files, "--model", "resnet18", "--batch", "8"]) == 1
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == len(bad) + 1
    for line, (name, (_, message)) in zip(lines, bad.items(), strict=False):
        assert line.startswith(f"report: {tmp_path / name}: ")
        assert message in line
    assert lines[-1].endswith("No such file or directory")
    assert "some-cpu-2-ghz-1.2.3.md" in captured.out
    assert report.main([str(tmp_path / "gpu-check.json")]) == 0


def test_table_has_a_line_a_case(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(stored()))
    rows = report.Results.read(path).rows
    head, lines = table.cells(rows)
    assert head[:5] == ["case", "work", "eager, ms", "compile, ms", "ours, ms"]
    assert [line[0] for line in lines] == ["bottleneck-a-bf16", "bottleneck-b-bf16", "bottleneck-c-bf16"]
    assert all(len(line) == len(head) for line in lines)
    partial, (line,) = table.cells([row for row in rows if row.case == "bottleneck-a-bf16"][1:])
    assert partial[2:4] == ["compile, ms", "ours, ms"]
    assert line[-2:] == ["10.0", "50%"]


# ---------------------------------------------------------------------------------------------------------- roofline


@pytest.mark.parametrize("name", GPUS)
def test_figures_of_gpus_are_sane(name: str) -> None:
    """In their units, in the ratios that tensor cores have, and as the plans know the architecture."""
    gpu = GPUS[name]
    assert 1e12 <= gpu.bandwidth <= 10e12
    assert gpu.peak["bf16"] == gpu.peak["fp16"] == pytest.approx(2 * gpu.peak["fp32"])
    assert 50 <= gpu.peak["bf16"] / gpu.bandwidth <= 400  # FLOPs a byte
    assert 32 << 20 <= gpu.l2 <= 128 << 20
    assert 100 <= gpu.multiprocessors <= 160
    a_cycle = {80: 2048, 89: 512, 90: 4096, 100: 8192}[gpu.arch]  # dense FLOPs of one multiprocessor
    clock = gpu.peak["bf16"] / gpu.multiprocessors / a_cycle
    assert clock == pytest.approx({80: 1.41e9, 89: 2.52e9, 90: 1.83e9, 100: 1.86e9}[gpu.arch], rel=0.01)
    assert gpu.machine("bf16") == Machine(gpu.name, gpu.bandwidth, gpu.peak["bf16"], 0)


def test_gpus_are_found_by_name() -> None:
    assert gpus.find_gpu("RTX 4090") is gpus.find_gpu("rtx-4090") is GPUS["rtx4090"]
    assert gpus.recognise("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert gpus.recognise("NVIDIA A100-SXM4-80GB") is GPUS["a100"]
    assert gpus.recognise("NVIDIA GeForce RTX 4090") is GPUS["rtx4090"]
    assert gpus.recognise("NVIDIA H100 PCIe") is gpus.recognise("NVIDIA A100-SXM4-40GB") is None
    assert gpus.recognise("NVIDIA A10") is None
    with pytest.raises(ValueError, match="gpu is 'v100', expected one of a100, h100, h200, b200, rtx4090"):
        gpus.find_gpu("v100")


def test_floor_is_the_longer_of_memory_and_products() -> None:
    machine = Machine("made-up", 1e9, 1e12, 0)
    assert Kernel("a", False, 2e6, 1e9).floor(machine) == (2e-3, "memory")
    assert Kernel("a", False, 2e6, 4e9).floor(machine) == (4e-3, "tensor cores")
    both = Floor.of([Kernel("a", False, 2e6, 1e9), Kernel("a", True, 2e6, 4e9)], machine)
    assert both == (pytest.approx(6e-3), 4e6, 5e9, "tensor cores")


@pytest.fixture(scope="module")
def modelled() -> Roofline:
    return Roofline.of(GPUS["h100"], "resnet18", 256)


def test_a_unit_by_hand(modelled: Roofline) -> None:
    """layer1.0.conv1 at inference: 256 images of 56 x 56 with 64 channels, bf16."""
    gpu, activation, weight = GPUS["h100"], 2 * 256 * 56 * 56 * 64, 2 * 64 * 64 * 9
    vectors = 4 * 64
    flops = 2 * 256 * 56 * 56 * 64 * 64 * 9
    conv = max((2 * activation + weight) / gpu.bandwidth, flops / gpu.peak["bf16"])
    norm, relu = (2 * activation + 4 * vectors) / gpu.bandwidth, 2 * activation / gpu.bandwidth
    eager = modelled.floors["inference", "eager"]["layer1.0.conv1"]
    assert eager.flops == flops
    assert eager.seconds == pytest.approx(conv + norm + relu, rel=1e-3)
    ours = modelled.floors["inference", "ours"]["layer1.0.conv1"]  # conv2d; what follows is on load of the next
    assert ours.seconds == pytest.approx(conv, rel=1e-3)


def test_totals_add_up(modelled: Roofline) -> None:
    for floors in modelled.floors.values():
        parts = [floor for unit, floor in floors.items() if unit != TOTAL]
        for field in ("seconds", "moved", "flops"):
            total = getattr(floors[TOTAL], field)
            assert total == pytest.approx(sum(getattr(floor, field) for floor in parts))
    assert list(modelled.floors["training", "eager"])[-2:] == [HEAD, TOTAL]
    convs = [m for m in network.create("resnet18", torch.bfloat16).modules() if isinstance(m, nn.Conv2d)]
    assert len(modelled.floors["training", "ours"]) == len(convs) + 2


def test_bytes_are_those_of_the_networks(modelled: Roofline) -> None:
    """Beside passes of activations there are weights, a few hundredths."""
    compared = Comparison.of("resnet18", 256)
    for variant, steps in (("eager", compared.eager), ("ours", compared.ours["lean"])):
        counted = sum(step.moved.passes for step in steps)
        assert 1 <= modelled.floors["training", variant][TOTAL].moved / counted <= 1.06
    eager, ours = (modelled.floors["training", v][TOTAL] for v in ("eager", "ours"))
    assert eager.flops == pytest.approx(ours.flops, rel=0.05)  # but for Gram matrices
    assert eager.seconds > 1.5 * ours.seconds


def test_units_without_a_kernel_are_eagers() -> None:
    """The RTX 4090's shared memory does not hold the rows of a strided 3x3 convolution."""
    roof = Roofline.of(GPUS["rtx4090"], "resnet18", 8)
    floors = [roof.floors["inference", variant]["layer2.0.conv1"] for variant in ("eager", "ours")]
    assert floors[0] == floors[1]
    flops = [roof.floors["inference", variant][TOTAL].flops for variant in ("eager", "ours")]
    assert flops[0] == pytest.approx(flops[1])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_roofline_command(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--gpu", "b200", "--model", "resnet50", "--batch", "4", "--size", "64", "--dtype", dtype]
    assert roofline.main(command) == 0
    out = capsys.readouterr().out
    assert "8.00 TB/s" in out
    assert "layer4.2.conv3" in out
    assert len(re.findall(r"^modelled: (?:training|inference) takes eager [\d.]+ ms or more", out, re.MULTILINE)) == 2
    assert ("TF32" in out) == (dtype == "fp32")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu", "v100"], "gpu is 'v100', expected one of a100"),
        (["--batch", "0"], "'0' is not a whole number above 0"),
        (["--model", "vgg16"], "invalid choice: 'vgg16'"),
    ],
)
def test_roofline_errors(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        roofline.main(flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
