"""`make gpu-check` with made-up processes and clocks: its sections, their time, and its table."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check, gpu_work
from benchmarks.gpu_check import SECTIONS, Check, Finished
from resnet_fused import kernels

ROOT = Path(__file__).parents[1]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# ------------------------------------------------------------------------------------------------- the sections

REPORT = """<testsuites><testsuite><testcase classname="tests.test_a" name="good[cuda]"/>
<testcase classname="tests.test_a" name="bad[cuda]"><failure/></testcase></testsuite></testsuites>"""


class Machine:
    """Processes that take `takes` seconds, end as `ends` says (by section) and write what the real ones would."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.ends: dict[str, Finished] = {}
        self.takes = 7.0
        self.commands: dict[str, Sequence[str]] = {}
        self.allowed: dict[str, float] = {}
        self.clock = Clock()
        options = {"arch": 90, "sanitizer": "/opt/compute-sanitizer", **options}
        self.check = Check(folder=folder, run=self.run, clock=self.clock, **options)

    def run(self, command: Sequence[str], seconds: float, environment: Mapping[str, str]) -> Finished:
        if "pytest" in command:
            name = "tests"
            (self.check.folder / "tests.xml").write_text(REPORT.replace("<failure/>", "") if not self.ends else REPORT)
        else:
            out = Path(command[command.index("--out") + 1])
            name = out.stem
            rows = [{"kernel": "k", "arch": "sm_90", "faults": ["atomics"]}] if self.ends.get(name) else []
            out.write_text(json.dumps({"summary": f"{name} is done", "rows": rows}))
        self.commands[name], self.allowed[name] = command, seconds
        self.clock.now += self.takes
        return self.ends.get(name, Finished(0, "fine"))

    def go(self) -> dict[str, dict]:
        gpu_check.run_sections(self.check, lambda: None)
        return self.check.sections


def test_all_is_well(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    sections = machine.go()
    assert list(sections) == list(SECTIONS)
    assert {s["status"] for s in sections.values()} == {"ok"}
    assert {s["seconds"] for s in sections.values()} == {7.0}
    assert sections["tests"]["summary"] == "2 of 2 passed"
    assert sections["tune"]["summary"] == "tune is done"
    assert gpu_check.exit_status(machine.check) == 0


def test_less_than_ten_minutes() -> None:
    assert sum(seconds for seconds, _ in SECTIONS.values()) <= 590


def test_what_is_left_over_goes_to_the_next(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.takes = 0
    machine.go()
    own = [seconds for seconds, _ in SECTIONS.values()]
    assert list(machine.allowed.values()) == [sum(own[: i + 1]) for i in range(len(own))]


def test_no_section_takes_another_ones_time(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    for name in SECTIONS:
        machine.ends[name] = Finished(None)
    machine.run, run = lambda command, seconds, environment: run(command, seconds, environment), machine.run

    def slow(command: Sequence[str], seconds: float, environment: Mapping[str, str]) -> Finished:
        machine.takes = seconds
        return run(command, seconds, environment)

    machine.check.run = slow
    sections = machine.go()
    assert machine.allowed == {name: seconds for name, (seconds, _) in SECTIONS.items()}
    assert {s["status"] for s in sections.values()} == {"timeout"}
    assert gpu_check.exit_status(machine.check) == 1


@pytest.mark.parametrize("name", SECTIONS)
def test_a_failure_stops_no_other_section(name: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.ends[name] = Finished(1, "Traceback\nRuntimeError: no such kernel\n\n")
    sections = machine.go()
    assert {n for n, s in sections.items() if s["status"] != "ok"} == {name}
    assert len(machine.commands) == len(SECTIONS)
    assert "no such kernel" in sections[name]["output"]
    assert gpu_check.exit_status(machine.check) == 1
    if name == "tests":
        assert sections[name]["rows"] == [{"test": "tests.test_a::bad[cuda]"}]


@pytest.mark.parametrize(("name", "status"), [("tests", 1), ("static", 1), ("racecheck", 1), ("benchmark", 0)])
def test_what_was_not_finished(name: str, status: int, tmp_path: Path) -> None:
    """A check that was not finished proves nothing; a measurement has its rows."""
    machine = Machine(tmp_path)
    machine.ends[name] = Finished(None, "")
    assert machine.go()[name]["status"] == "timeout"
    assert gpu_check.exit_status(machine.check) == status


def test_an_exception_is_a_failure(tmp_path: Path) -> None:
    machine = Machine(tmp_path)

    def run(command: Sequence[str], seconds: float, environment: Mapping[str, str]) -> Finished:
        if "memory" in command:
            raise OSError("no more processes")
        return Finished(0)

    machine.check.run = run
    sections = machine.go()
    assert (sections["memory"]["status"], sections["memory"]["summary"]) == ("failed", "OSError: no more processes")
    assert sections["tune"]["status"] == "ok"


def test_commands(tmp_path: Path) -> None:
    machine = Machine(tmp_path, compile=True, batch=16)
    machine.go()
    benchmark = list(machine.commands["benchmark"])
    assert benchmark[:4] == [sys.executable, "-m", "benchmarks.gpu_work", "benchmark"]
    assert gpu_work.parser().parse_args(benchmark[3:]).batch == 16
    assert "--compile" in benchmark
    tests = machine.commands["tests"]
    assert "cuda and not slow" in tests
    assert str(ROOT / "tests/test_conv1x1.py") in tests
    assert str(ROOT / "tests/test_streams.py") in tests
    assert str(ROOT / "tests/test_ptx_faults.py") not in tests
    assert str(ROOT / "tests/test_triton_block.py") not in tests
    assert str(ROOT / "tests/test_large_tensors.py") not in tests
    memcheck, racecheck = machine.commands["memcheck"], machine.commands["racecheck"]
    assert memcheck[:3] == ["/opt/compute-sanitizer", "--tool", "memcheck"]
    assert racecheck[:3] == ["/opt/compute-sanitizer", "--tool", "racecheck"]
    assert {"--report-api-errors", "--error-exitcode"} <= set(memcheck)


def test_without_a_sanitizer(tmp_path: Path) -> None:
    machine = Machine(tmp_path, sanitizer=None)
    sections = machine.go()
    assert sections["memcheck"]["status"] == sections["racecheck"]["status"] == "absent"
    assert gpu_check.exit_status(machine.check) == 0


def test_a_sanitizer_that_saw_nothing(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.check.run = lambda command, seconds, environment: Finished(0)
    assert machine.go()["memcheck"]["status"] == "failed"


def test_without_a_gpu(tmp_path: Path) -> None:
    machine = Machine(tmp_path, arch=0)
    sections = machine.go()
    assert list(machine.commands) == ["static"]
    assert machine.allowed["static"] == sum(seconds for seconds, _ in SECTIONS.values())
    assert {name: s["status"] for name, s in sections.items() if name != "static"} == dict.fromkeys(
        [name for name in SECTIONS if name != "static"], "skipped: no GPU"
    )
    assert gpu_check.exit_status(machine.check) == 2
    machine.ends["static"] = Finished(1)
    machine.go()
    assert gpu_check.exit_status(machine.check) == 1


@pytest.mark.parametrize("broken", [False, True])
def test_the_command(
    broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a machine without a GPU: one line on stderr, the table, the JSON and the exit status."""
    status = "failed" if broken else "ok"
    found = {
        "status": status,
        "summary": "311 kernels",
        "rows": [{"kernel": "k", "arch": "sm_80", "faults": ["spills"]}],
    }
    monkeypatch.setitem(SECTIONS, "static", (1, lambda check, seconds: found))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path)]) == (1 if broken else 2)
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert err.startswith("gpu-check: no GPU here")
    assert "311 kernels" in out
    written = json.loads((tmp_path / "gpu-check-no-gpu.json").read_text())
    assert written["schema"] == 1
    assert written["exit_status"] == (1 if broken else 2)
    assert written["versions"]["torch"] == torch.__version__
    assert written["machine"]["gpu"] is None
    assert list(written["sections"]) == list(SECTIONS)
    for section in written["sections"].values():
        assert {"status", "summary", "seconds", "allowed", "rows"} <= section.keys()


def test_processes_end_in_time() -> None:
    """With what they have started."""
    done = gpu_check.run_process(
        [sys.executable, "-c", "print('one'); import os; print(os.environ['X'])"], 60, {"X": "y"}
    )
    assert done == Finished(0, "one\ny\n")
    sleeper = "[sys.executable, '-c', 'import time; time.sleep(99)']"
    code = f"import subprocess, sys; print('begun', flush=True); subprocess.run({sleeper})"
    done = gpu_check.run_process([sys.executable, "-c", code], 2, {})
    assert done.code is None
    assert done.last_line in ("begun", "no output")
    assert gpu_check.run_process([sys.executable, "-c", "raise SystemExit(3)"], 60, {}).code == 3


def test_names_of_gpus() -> None:
    assert gpu_check.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert gpu_check.slug(None) == "no-gpu"


def test_sanitizers_see_every_kernel() -> None:
    macros = re.compile(r"^RESNET_FUSED_(?:\w*)KERNELS?(?:_\d)?\((\w+),", re.MULTILINE)
    names = [name for source in kernels.sources() for name in macros.findall((ROOT / "csrc" / source).read_text())]
    assert len(names) > 30
    assert all(re.search(gpu_check.KERNELS, name) for name in names)
    assert not re.search(gpu_check.KERNELS, "_ZN2at6native29vectorized_elementwise_kernel")


SPEED = [
    {"block": "b", "variant": v, "forward_ms": f, "backward_ms": 4.0, "forward_gbs": 800.0, "backward_gbs": 900.0,
     "host_bound": v == "lean"}
    for v, f in (("eager", 3.0), ("compile", 2.0), ("lean", 1.5))
]  # fmt: skip
TUNED = [
    {"problem": "conv1x1 bf16[64,256,56,56]", "winner": winner, "ratio": ratio, "ms": {}}
    for winner, ratio in (("cuda:2", 1.31), ("cuda:1", 1.0))
]


def test_table() -> None:
    base = {"status": "ok", "summary": "s", "seconds": 3.4, "rows": []}
    rows = gpu_check.table_rows(
        {
            "static": {
                **base,
                "status": "failed",
                "rows": [{"kernel": "k", "arch": "sm_90", "faults": ["atomics", "x"]}],
            },
            "tests": {**base, "rows": [{"test": "tests.test_a::bad"}]},
            "memcheck": {**base, "rows": [{"block": "b", "launches_by_tile": 3}]},
            "benchmark": {**base, "rows": SPEED},
            "memory": {**base, "rows": [{"variant": "eager", "bytes": 2**30}, {"variant": "lean", "bytes": 2**29}]},
            "tune": {**base, "rows": TUNED},
        },
        peak_gbs=2000,
    )
    assert rows == [
        ("static", "s", "failed", "3"),
        ("", "k sm_90", "atomics, x", ""),
        ("tests", "s", "ok", "3"),
        ("", "tests.test_a::bad", "failed", ""),
        ("memcheck", "s", "ok", "3"),
        ("benchmark", "s", "ok", "3"),
        ("", "b forward, compile", "2.000 ms, eager 3.000 ms: 1.50x", ""),
        ("", "b backward, compile", "4.000 ms, eager 4.000 ms: 1.00x", ""),
        ("", "b forward, lean", "1.500 ms, eager 3.000 ms: 2.00x; 800 GB/s (40%) (host-bound)", ""),
        ("", "b backward, lean", "4.000 ms, eager 4.000 ms: 1.00x; 900 GB/s (45%) (host-bound)", ""),
        ("memory", "s", "ok", "3"),
        ("", "eager", "1024 MiB (1.00)", ""),
        ("", "lean", "512 MiB (0.50)", ""),
        ("tune", "s", "ok", "3"),
        ("", "conv1x1 bf16[64,256,56,56]", "cuda:2 is 1.31x of the default", ""),
    ]
