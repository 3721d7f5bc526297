"""`tune`: on the CPU's plans, and on the ops of a GPU as far as the emulator and a made-up clock show it."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from conftest import randomise, relative_error
from device import Device
from op_cases import activation
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused import backend, choice, planner, tuned
from resnet_fused.__main__ import main
from resnet_fused.backend import Choice
from resnet_fused.ops import dispatch
from resnet_fused.signature import Like, Signature
from resnet_fused.timing import Part, Times
from resnet_fused.tuned import Entry

CPU = torch.device("cpu")


class Clock:
    """Times by what a call launches or runs: seconds come from `cost`, of the candidates in the order of their first
    call after the warm-up's checks."""

    def __init__(self, cost: Callable[[Part], float]) -> None:
        self.cost, self.calls = cost, 0

    def __call__(self, parts: Sequence[Part]) -> Times:
        self.calls += 1
        for part in parts:
            part()
        return Times([self.cost(part) for part in parts], True)


def of_plans(gram: float, recompute: float) -> Clock:
    times = {"gram": gram, "recompute": recompute}
    return Clock(lambda part: times[part.args[0]])  # type: ignore[attr-defined]


def chain() -> nn.Module:
    """Two identity blocks alike, and one with a strided projection."""
    down = nn.Sequential(nn.Conv2d(32, 64, 1, 2, bias=False), nn.BatchNorm2d(64))
    return nn.Sequential(rf.Bottleneck(32, 8), rf.Bottleneck(32, 8), rf.Bottleneck(32, 16, 2, down))


def plans_of(model: nn.Module, x: Tensor) -> list[str]:
    return [row.plan for row in rf.explain(model, x).rows]


X = torch.randn(2, 32, 12, 10).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("gram", "recompute", "wanted"), [(1.0, 2.0, "gram"), (2.0, 1.0, "recompute")])
def test_the_plans_of_end_units_follow_the_clock(gram: float, recompute: float, wanted: str) -> None:
    model = chain()
    report = rf.tune(model, X, timer=of_plans(gram, recompute))
    assert len(report.entries) == len(report.measured) == 3, "two blocks are alike"
    assert {entry.winner for entry in report.entries.values()} == {wanted}
    assert plans_of(model, X) == [f"aten: {wanted}", f"aten: {wanted}", f"aten: {wanted} + {wanted}"]
    reason = rf.explain(model, X).rows[0].reason
    assert reason == f"measured: {wanted} 1.00 ms, {({'gram', 'recompute'} - {wanted}).pop()} 2.00 ms"


def test_results_stay_what_they_are() -> None:
    model = randomise(chain())
    want = copy.deepcopy(model)(X)
    rf.tune(model, X, timer=of_plans(2.0, 1.0))
    assert relative_error(copy.deepcopy(model)(X), want) < 1e-5


def test_the_model_is_left_as_it_was() -> None:
    model = chain()
    before = copy.deepcopy(model.state_dict())
    rf.tune(model, X, timer=of_plans(1.0, 2.0))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_what_is_known_is_not_measured_again() -> None:
    model = chain()
    rf.tune(model, X, timer=of_plans(1.0, 2.0))
    tuned._tables.clear()  # as in another process
    clock = of_plans(2.0, 1.0)
    report = rf.tune(model, X, timer=clock)
    assert (clock.calls, report.measured) == (0, [])
    assert {cells[1] for cells in report.cells()} == {"gram"}
    report = rf.tune(model, X, timer=clock, again=True)
    assert len(report.measured) == 3
    assert {cells[1] for cells in report.cells()} == {"recompute"}


def test_a_run_that_was_broken_off_goes_on_where_it_was() -> None:
    calls = 0

    def cost(part: Part) -> float:
        nonlocal calls
        calls += 1
        if calls > 30:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        rf.tune(chain(), X, timer=Clock(cost))
    tuned._tables.clear()
    report = rf.tune(chain(), X, timer=of_plans(1.0, 2.0))
    assert 0 < len(report.measured) < 3
    assert len(report.entries) == 3


def test_by_the_machines_own_clock() -> None:
    report = rf.tune(chain(), X, rounds=2)
    assert all(0 < s < 10 for entry in report.entries.values() for s in entry.seconds.values())


def test_in_eval_mode_nothing_is_to_be_planned() -> None:
    assert rf.tune(chain().eval(), X, timer=of_plans(1.0, 2.0)).entries == {}


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="model is a str"):
        rf.tune("resnet50", X)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="example_input is a list, expected a Tensor"):
        rf.tune(chain(), [X])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rounds is 0, expected at least 1"):
        rf.tune(chain(), X, rounds=0)
    with pytest.raises(ValueError, match="example_input is on meta, expected a CPU or a GPU"):
        rf.tune(chain(), X.to("meta"))
    with pytest.raises(ValueError, match="backends has cudnn, expected some of cuda, triton, aten"):
        rf.tune(chain(), X, backends=["cudnn"])


class Outputs(nn.Module):
    """As torchvision's segmentation models and Inception return them."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = chain()

    def forward(self, x: Tensor) -> dict[str, object]:
        y = self.chain(x)
        return {"out": y, "more": (y.mean(), 3)}


def test_any_outputs_and_modes_of_autograd() -> None:
    assert len(rf.tune(Outputs(), X, timer=of_plans(1.0, 2.0)).entries) == 3
    with torch.no_grad():
        assert len(rf.tune(chain(), X, timer=of_plans(1.0, 2.0), again=True).measured) == 3
    model = chain()
    with torch.inference_mode():
        assert len(rf.tune(model, X.clone(), timer=of_plans(1.0, 2.0), again=True).measured) == 3


def test_random_numbers_stay_where_they_are() -> None:
    model = chain()
    state = torch.get_rng_state()
    rf.tune(model, X, timer=of_plans(1.0, 2.0))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_candidate_that_does_not_compile_is_left_out() -> None:
    """Triton's errors are no RuntimeErrors."""

    class TritonError(Exception):
        pass

    def fails() -> None:
        raise TritonError("out of resource: shared memory")

    module = sys.modules["resnet_fused.tune"]
    assert isinstance(module._refusal(fails), TritonError)


def test_a_cache_that_cannot_be_written_is_found_out_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "file" / "folder"))
    clock = of_plans(1.0, 2.0)
    with pytest.raises(OSError, match="folder"):
        rf.tune(chain(), X, timer=clock)
    assert clock.calls == 0


def test_compiled_models_do_not_look_at_files() -> None:
    model = chain()[0]
    rf.tune(model, X, timer=of_plans(2.0, 1.0))
    torch.compiler.reset()
    assert relative_error(torch.compile(model, fullgraph=True)(X), model(X)) < 1e-5


# ------------------------------------------------------------------------------------------------ ops of a GPU


def fastest_is(name: str) -> Clock:
    """Candidates are known by what they run."""

    def cost(part: Part) -> float:
        seen: list[str] = []
        real = dispatch.run

        def spy(op: str, args: tuple, chosen: Choice) -> object:
            seen.append(str(chosen))
            return real(op, args, chosen)

        dispatch.run = spy
        try:
            part()
        finally:
            dispatch.run = real
        return 1.0 if seen[0] == name else 2.0

    return Clock(cost)


def test_tiles_and_backends_are_candidates() -> None:
    block = rf.Bottleneck(32, 8).bfloat16().to(memory_format=torch.channels_last)
    block.memory = "fast"
    x = activation(1, 32, 3, 2, torch.bfloat16)
    device = Device("emulated")
    report = device.run(lambda: rf.tune(block, x, rounds=1, timer=fastest_is("cuda:2")))
    names = {problem.split()[0] for problem in report.entries}
    assert {"conv1x1", "conv2d", "conv1x1_dgrad", "conv1x1_wgrad", "conv2d_dgrad", "conv2d_wgrad"} <= names
    for problem, entry in report.entries.items():
        assert {"aten", "cuda:2"} < entry.seconds.keys(), problem
        assert entry.winner == "cuda:2"
    assert report.left_out == {}


def test_the_winner_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In "auto", as a GPU's tensors would ask."""
    x, weight = activation(1, 32, 6, 5, torch.bfloat16), activation(48, 32, 1, 1, torch.bfloat16)
    args = (x, weight, None, None, 1, False)
    device = Device("emulated")
    default = device.run(lambda: dispatch.run("conv1x1", args, Choice("cuda")))[0]
    for number, tile in enumerate(("256x128x64", "256x128x32", "128x128x32", "128x64x32"), start=1):
        tuned.table(CPU).add(str(Signature.of("conv1x1", args)), Entry.of({f"cuda:{number}": 1e-3, "aten": 2e-3}))
        choice.forget()
        decision = choice.decide(Signature.of("conv1x1", args), CPU, 80)
        assert str(decision) == f"cuda:{number} 1.000 ms, aten 2.000 ms (tuned)"
        got = device.run(lambda chosen=decision.choice: dispatch.run("conv1x1", args, chosen))[0]
        assert device.symbols[0].endswith(tile)
        assert torch.equal(got, default)
    with pytest.raises(RuntimeError, match="tile 9 does not exist"):
        device.run(lambda: dispatch.run("conv1x1", args, Choice("cuda", 9)))


def test_signatures() -> None:
    bits = torch.zeros(1, 6, dtype=torch.int32)
    args = (activation(1, 8, 2, 3, torch.bfloat16), None, [1, 2], 3, True, 0.5, torch.zeros(8), bits)
    signature = Signature.of("conv1x1", args)
    assert str(signature) == "conv1x1 bf16[1,8,2,3] - (1,2) 3 True 0.5 fp32[8] i32[1,6]"
    made = signature.arguments(CPU)
    assert Signature.of("conv1x1", made) == signature
    assert made[0].is_contiguous(memory_format=torch.channels_last)
    assert made[2] == [1, 2]
    assert ((made[6] >= 0.5) & (made[6] <= 1)).all()
    assert hash(signature) == hash(Signature.of("conv1x1", args))
    assert Like(torch.int8, (1, 2, 3, 4)).made_up(CPU).max() <= 1


# -------------------------------------------------------------------------------------------------- the model


def decided(op: str, shapes: tuple, *rest: object, arch: int = 80) -> choice.Decision:
    tensors = tuple(None if s is None else Like(torch.bfloat16 if len(s) == 4 else torch.float32, s) for s in shapes)
    return choice.decide(Signature(op, (*tensors, *rest)), None, arch)


def test_the_model_prefers_what_moves_less_where_memory_binds() -> None:
    n = 256
    wide = decided("conv1x1", ((n, 256, 56, 56), (64, 256, 1, 1), (256,), (256,)), 1, True)
    assert wide.choice == Choice("cuda")
    assert (wide.source, wide.runner_up) == ("modelled", "aten")
    assert wide.seconds is not None
    assert wide.runner_up_seconds is not None
    assert wide.seconds < 0.6 * wide.runner_up_seconds, "the activation and the statistics are passes of their own"


def test_the_model_prefers_aten_where_the_products_bind() -> None:
    shapes = ((256, 512, 14, 14), (512, 512, 3, 3), None, None)
    geometry = (1, 1, 1, 1, 1, 1, 1)
    assert decided("conv2d", shapes, geometry, False, arch=90).choice == Choice("aten")
    assert decided("conv2d", shapes, geometry, False, arch=80).choice == Choice("aten"), "not clearly ahead"


def test_the_model_knows_what_kernels_refuse() -> None:
    decision = decided("conv1x1", ((8, 12, 5, 5), (8, 12, 1, 1), None, None), 1, False)
    assert (decision.choice, decision.runner_up) == (Choice("aten"), None)


def test_tails_have_nothing_to_choose() -> None:
    decision = decided("bn_stats", ((8, 12, 5, 5),))
    assert str(decision) == "cuda (only)"


# --------------------------------------------------------------------------------------------- forced backends


@pytest.mark.parametrize("name", ["cuda", "aten"])
def test_a_forced_backend(name: str) -> None:
    block = randomise(rf.Bottleneck(32, 8)).bfloat16().to(memory_format=torch.channels_last)
    x = activation(1, 32, 6, 5, torch.bfloat16)
    device = Device("emulated")
    with backend.forced(name):  # type: ignore[arg-type]
        got = device.run(copy.deepcopy(block), x)
    matrix = [s for s in device.symbols if s.startswith(("conv", "gram_bf16", "expand"))]
    assert bool(matrix) == (name == "cuda")
    assert relative_error(got, copy.deepcopy(block)(x)) < 1e-2


def test_bad_backends() -> None:
    message = "backend is 'cudnn', expected one of auto, cuda, triton, aten"
    with pytest.raises(ValueError, match=message), backend.forced("cudnn"):  # type: ignore[arg-type]
        pass
    assert backend.current() == "auto"


def test_forced_plans() -> None:
    for plan in backend.LEAN_PLANS:
        with planner.forced_plan(plan):
            assert plans_of(chain()[0], X) == [f"aten: {plan}"]


# ------------------------------------------------------------------------------------------- the command line


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model", "resnet50", "--batch", "2", "--size", "32", "--rounds", "1"]
    assert main(["tune", *small]) == 0
    out = capsys.readouterr().out
    assert "winner" in out
    assert " measured, " in out
    assert main(["tune", *small]) == 0
    assert "0 measured, " in capsys.readouterr().out
    assert main(["tune", *small, "--inference", "--dtype", "bf16"]) == 0


@pytest.mark.parametrize(("value", "wanted"), [("aten", "aten"), ("", "auto"), ("x", None)])
def test_environment(value: str, wanted: str | None) -> None:
    code = "import resnet_fused.backend as b; print(b.current())"
    environment = {**os.environ, backend.VARIABLE: value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if wanted is None:
        assert "RESNET_FUSED_BACKEND is 'x', expected one of auto, cuda, triton, aten" in done.stderr
    else:
        assert done.stdout.strip() == wanted
