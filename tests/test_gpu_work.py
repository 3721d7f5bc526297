"""What the sections of `make gpu-check` do, with made-up clocks and timers; the GPU's part runs on the emulator."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device import Device
from op_cases import same_bits
from test_gpu_check import Clock

from benchmarks import gpu_work
from benchmarks.gpu_work import Budget, CudaTimer, Log, Times
from benchmarks.shapes import BlockShape
from resnet_fused import kernels, plans
from resnet_fused.ops.pointwise import as_on_a_gpu
from resnet_fused.problems import Problem, capturing, name_of_kernel, name_of_tile

SMALL = BlockShape("bottleneck", 40, 8, 2, 7)
TILE = re.compile(r"_(\d+x\d+x\d+|resident)$")  # how symbols of matrix kernels end


class Timer:
    """Runs what it is to time; each part takes a millisecond more than the one before it."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.count, self.clock = 0, clock

    def __call__(self, parts: Sequence[gpu_work.Part]) -> Times:
        times = []
        for part in parts:
            part()
            self.count += 1
            times.append(float(self.count))
        if self.clock:
            self.clock.now += 1
        return Times(times, ahead=True)


def test_rounds_take_turns_and_end_in_time() -> None:
    seen = ""

    def call(name: str) -> gpu_work.Part:
        def run() -> None:
            nonlocal seen
            seen += name

        return run

    calls = {"a": [call("a"), call("A")], "b": [call("b")]}
    found = gpu_work.interleaved(calls, Timer(), 3, Budget(1e9))
    assert seen == "aA" * 3 + "bbb" + "aAb" + "baA" + "aAb"
    assert found["a"] == ([14.0, 15.0], 3, True)
    clock = Clock()
    found = gpu_work.interleaved(calls, Timer(clock), 99, Budget(11, clock))
    assert {name: rounds for name, (_, rounds, _) in found.items()} == {"a": 3, "b": 3}
    assert gpu_work.interleaved(calls, Timer(clock), 99, Budget(0, clock))["a"][1] == 1


def test_logs_are_complete_after_every_row(tmp_path: Path) -> None:
    log = Log(tmp_path / "rows.json")

    def written() -> dict:
        return json.loads(log.path.read_text())

    assert written() == {"summary": "", "rows": []}
    log.add(a=1)
    log.add(a=2)
    assert written() == {"summary": "", "rows": [{"a": 1}, {"a": 2}]}
    log.finish("two")
    assert written()["summary"] == "two"


def test_blocks_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_work, "BOTTLENECKS", (SMALL, BlockShape("bottleneck", 32, 8, 1, 5)))
    monkeypatch.setattr(gpu_work, "ROUNDS", 3)
    log = Log(tmp_path / "rows.json")
    with as_on_a_gpu():
        gpu_work.benchmark(log, Budget(1e9), Timer(), 2, "cpu", ["eager", "lean"])
    assert [(row["block"], row["variant"]) for row in log.rows] == [
        (shape.name, variant) for shape in gpu_work.BOTTLENECKS for variant in ("eager", "lean")
    ]
    for row in log.rows:
        assert row["rounds"] == gpu_work.ROUNDS
        assert not row["host_bound"]
    eager, ours = log.rows[:2]
    # In activations of the narrow width, 2 images of 4 x 4 pixels of 8 channels; by `info --traffic`, but for the sizes
    # that a stride leaves: the input is 40 channels of 7 x 7.
    moved = [row["forward_gbs"] * row["forward_ms"] * 1e6 for row in (eager, ours)]
    assert moved[0] > 1.5 * moved[1] > 0
    assert log.summary == "2 of 2 blocks, eager, lean"
    clock = Clock()
    gpu_work.benchmark(log, Budget(0, clock), Timer(clock), 2, "cpu", ["eager", "lean"])
    assert log.summary == "0 of 2 blocks, eager, lean"


def captured(shape: BlockShape, memory: str = "lean") -> list[Problem]:
    step = gpu_work.make_step(shape, memory, 2, "cpu")
    with capturing() as problems:
        step.run()
    return problems


@pytest.mark.parametrize("memory", ["lean", "fast"])
def test_problems_are_those_of_the_run(memory: str) -> None:
    """Their plans are what was launched, and launched again give the same; every tile is another kernel's."""
    device = Device("emulated")

    def run() -> None:
        problems = captured(SMALL, memory)
        launched = [launch.symbol for launch in device_emulator().launches if TILE.search(launch.symbol)]
        planned = [problem.ready(80)[0].steps[0].symbol for problem in problems]
        assert planned == launched
        for problem in problems:
            before = {name: problem.tensors[name].clone() for name in problem.outputs}
            for name in problem.outputs:
                problem.tensors[name].untyped_storage().fill_(255)
            plan, _workspace = problem.ready(80)
            plans.run(plan.steps, problem.device)
            for name, t in before.items():
                assert same_bits(problem.tensors[name], t), (problem, name)
            tiles = [name_of_tile(plan) for _, plan, _ in problem.tiles(80)]
            assert len(set(tiles)) == len(tiles) >= 2
            assert name_of_tile(plan) in tiles
            assert {name_of_kernel(plan) for _, plan, _ in problem.tiles(80)} == {name_of_kernel(plan)}

    device.run(run)


def device_emulator() -> Any:
    from device import _emulator

    return _emulator()


def test_blocks_are_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_work, "BOTTLENECKS", (BlockShape("bottleneck", 16, 8, 1, 3),))
    monkeypatch.setattr(gpu_work, "TUNE_ROUNDS", 1)
    log = Log(tmp_path / "rows.json")
    Device("emulated").run(lambda: gpu_work.tune_blocks(log, Budget(1e9), Timer(), 1, "cpu"))
    ops = {row["problem"].split()[0] for row in log.rows}
    assert {"last", "conv1x1", "conv2d", "gram", "expand", "expand_dgrad"} <= ops
    for row in log.rows:
        assert row["winner"] == min(row["ms"], key=row["ms"].get)
        assert row["ratio"] == pytest.approx(row["ms"].get("cuda", row["ms"][row["winner"]]) / row["ms"][row["winner"]])
        assert row["problem"].startswith(("last", "projection")) or {"cuda", "cuda:2", "aten"} < row["ms"].keys()
    other = sum(row["ratio"] >= 1.05 for row in log.rows)
    assert log.summary.startswith(f"{len(log.rows)} problems; another plan is 5 % faster on {other}")


def test_every_kernel_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the sanitizers watch, in one element type."""
    device, log = Device("emulated"), Log(tmp_path / "rows.json")
    device.run(lambda: gpu_work.every_kernel(log, "cpu", 80, [torch.bfloat16]))
    assert sum(row["launches_by_tile"] for row in log.rows) > 100
    families = {re.split(r"_b?f16", symbol)[0] for symbol in device.symbols}
    assert families >= {"conv1x1_fprop", "expand_dual", "gram_strided", "bn_act", "bn_act_pool", "bn_act_pool_backward"}


def test_static_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_source(source: str, arch: str) -> list[kernels.Kernel]:
        spills = 8 if source == "bad.cu" else 0
        return [kernels.Kernel(source[:-3], source, arch, 256, 32, 0, 0, spills, {"EXIT": 1})]

    monkeypatch.setattr(kernels, "compile_source", compile_source)
    monkeypatch.setattr(kernels, "sources", lambda: ["good.cu", "fine.cu"])
    log = Log(tmp_path / "rows.json")
    assert gpu_work.static_checks(log, Budget(60), "sm_90")
    assert log.summary == "2 kernels for sm_90, 0 with faults"
    monkeypatch.setattr(kernels, "sources", lambda: ["good.cu", "bad.cu"])
    assert not gpu_work.static_checks(log, Budget(60), "sm_90")
    assert log.rows == [{"kernel": "bad", "arch": "sm_90", "faults": ["8 bytes of spills"]}]


def test_static_checks_end_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not compiled was not checked."""
    done = threading.Event()
    monkeypatch.setattr(
        kernels, "compile_source", lambda source, arch: [] if source == "fine.cu" else done.wait(60) or []
    )
    monkeypatch.setattr(kernels, "sources", lambda: ["fine.cu", "slow.cu"])
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    log = Log(tmp_path / "rows.json")
    assert not gpu_work.static_checks(log, Budget(0.5), "sm_90")
    done.set()
    assert log.rows == [{"kernel": "slow.cu", "arch": "sm_90", "faults": ["not compiled in time"]}]


class FakeEvent:
    now = 0.0  # of the GPU, ms
    busy = False

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = FakeEvent.now

    def query(self) -> bool:
        return not FakeEvent.busy

    def elapsed_time(self, other: FakeEvent) -> float:
        return other.time - self.time


def test_the_gpu_waits_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """It spins for longer until all is queued before it begins; each part has a flushed L2."""
    log: list[str] = []
    slept: list[int] = []

    def sleep(cycles: int) -> None:
        slept.append(cycles)
        log.append("sleep")
        FakeEvent.busy = cycles >= 2**23

    def take(milliseconds: float) -> None:
        log.append("work")
        FakeEvent.now += milliseconds

    class Flush:
        def zero_(self) -> None:
            log.append("flush")
            FakeEvent.now += 100

    sizes = []
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: sizes.append(size) or Flush())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(L2_cache_size=50 << 20))
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    timer = CudaTimer()
    assert sizes == [100 << 20]
    assert timer([lambda: take(1.5), lambda: take(4.0)]) == Times([1.5, 4.0], ahead=True)
    assert slept == [2**21, 2**22, 2**23]
    assert log[-7:] == ["wait", "sleep", "flush", "work", "flush", "work", "wait"]
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    FakeEvent.busy = False
    assert timer([lambda: take(1.0)]) == Times([1.0], ahead=False)
    assert slept[-1] == CudaTimer.MOST_CYCLES
