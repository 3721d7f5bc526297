"""`make gpu-check`: everything that only a GPU can show, in less than ten minutes.

    tests       those with a `cuda` device value
    static      the machine code of every kernel for this GPU
    memcheck    NVIDIA's compute-sanitizer, where it is installed, on every kernel once
    racecheck   the same for shared memory
    benchmark   ResNet-50's blocks in bfloat16, forward and backward, against eager PyTorch
    memory      what a training step of ResNet-50 allocates
    tune        every tile of the matrix kernels, and ATen, on those blocks' problems; the winners are kept

Each section runs in a process of its own with its own time, whatever became of the others. Results: one table, and
results/gpu-check-<gpu>.json.

Exit status: 0 all is well; 1 a test, a kernel's machine code, a sanitizer or a section failed, or was not finished in
its time where that proves nothing; 2 there is no GPU that could be used, and what can be done without was fine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import RESULTS, machine, slug, versions
from resnet_fused import kernels, plans
from resnet_fused._toolchain import find_cuda_home
from resnet_fused.console import make_console, make_table

ROOT = Path(__file__).parents[1]
LEAST = 5.0  # seconds that a section has at least, should those before it have been slow to die
GRACE = 10.0  # of its seconds, those that a process has to end by itself
CHECKS = ("tests", "static", "memcheck", "racecheck")  # sections that must come to their end
KERNELS = f"^({'|'.join([*plans.OPS, 'sum_'])})"  # how the names of ours begin
WORKERS = str(min(8, max(1, (os.cpu_count() or 1) // 2)))  # of the tests: each compares with the CPU's float64
NO_GPU = "skipped: no GPU"
Result = dict[str, Any]


@dataclass(frozen=True)
class Finished:
    """What became of a process."""

    code: int | None  # None: killed when its time was over
    output: str = ""

    @property
    def last_line(self) -> str:
        lines = [line for line in self.output.splitlines() if line.strip()]
        return lines[-1].strip()[:200] if lines else "no output"


def run_process(command: Sequence[str], seconds: float, environment: Mapping[str, str]) -> Finished:
    """Runs a command in the repository; when its time is over, it is killed with all that it has started."""
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds)
        return Finished(process.returncode, output)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return Finished(None, output)


@dataclass
class Check:
    """One run on one machine. `run` and `clock` are replaced by tests."""

    arch: int  # compute capability times ten; 0 without a GPU
    folder: Path  # for what the processes write
    run: Callable[[Sequence[str], float, Mapping[str, str]], Finished] = run_process
    clock: Callable[[], float] = time.monotonic
    batch: int = 64
    compile: bool = False
    sanitizer: str | None = None
    sections: dict[str, Result] = field(default_factory=dict)

    def work(self, name: str, section: str, seconds: float, prefix: Sequence[str] = (), **environment: str) -> Result:
        """A section of gpu_work.py: what it has written, and how it ended."""
        out = self.folder / f"{name}.json"
        arch = f"sm_{self.arch}" if self.arch else kernels.ARCHES[0]
        command = [*prefix, sys.executable, "-m", "benchmarks.gpu_work", section, "--out", str(out), "--arch", arch]
        command += ["--seconds", str(max(seconds - GRACE, 1)), "--batch", str(self.batch)]
        command += ["--compile"] * self.compile
        done = self.run(command, seconds, environment)
        written = json.loads(out.read_text()) if out.exists() else {"summary": "", "rows": []}
        outcome = _outcome(done)
        return outcome | {"rows": written["rows"], "summary": written["summary"] or outcome["summary"]}

    def tests(self, seconds: float) -> Result:
        report = self.folder / "tests.xml"
        files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if _has_devices(path)]
        chosen = ["-m", "cuda and not slow", f"--junitxml={report}"]
        done = self.run([sys.executable, "-m", "pytest", "-q", "-n", WORKERS, *chosen, *files], seconds, {})
        result = {**_outcome(done), "rows": []}
        if report.exists():
            cases = list(ElementTree.parse(report).iter("testcase"))
            bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
            result["rows"] = [{"test": f"{case.get('classname')}::{case.get('name')}"} for case in bad]
            result["summary"] = f"{len(cases) - len(bad)} of {len(cases)} passed"
        return result

    def sanitize(self, tool: str, seconds: float) -> Result:
        if self.sanitizer is None:
            return {"status": "absent", "summary": "no compute-sanitizer (CUDA toolkit, or nvidia-cuda-sanitizer-api)"}
        # Our kernels alone, and no report of calls that fail and are meant to, as libraries make them to probe.
        prefix = [self.sanitizer, "--tool", tool, "--error-exitcode", "99", "--kernel-name", f"regex={KERNELS}"]
        if tool == "memcheck":
            prefix += ["--report-api-errors", "no"]
        # Without torch's cache every tensor is an allocation of its own, whose bounds the tool knows.
        result = self.work(tool, "kernels", seconds, prefix, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if result["status"] == "ok" and not result["summary"]:
            result |= {"status": "failed", "summary": "the kernels did not run to their end"}
        return result


def _outcome(done: Finished) -> Result:
    """A section's status, a line about it and, unless all was well, the end of what it has printed."""
    if done.code == 0:
        return {"status": "ok", "summary": ""}
    status, summary = ("timeout", "killed when its time was over") if done.code is None else ("failed", done.last_line)
    return {"status": status, "summary": summary, "output": done.output[-4000:]}


def _has_devices(test: Path) -> bool:
    """Whether a test file has devices; those of the emulator itself have no cuda, and would compile it. Triton's, too,
    compile for minutes: pytest -m cuda tests/test_triton_*.py."""
    imported = re.findall(r"^(?:from|import) (\w+)", test.read_text(), re.MULTILINE)
    return "device" in imported and not {"ptx", "compiled"} & {*imported} and not test.name.startswith("test_triton")


SECTIONS: dict[str, tuple[float, Callable[[Check, float], Result]]] = {  # seconds of each, and what it does
    "static": (100, lambda check, seconds: check.work("static", "static", seconds)),
    "tests": (190, Check.tests),
    "memcheck": (70, lambda check, seconds: check.sanitize("memcheck", seconds)),
    "racecheck": (70, lambda check, seconds: check.sanitize("racecheck", seconds)),
    "benchmark": (70, lambda check, seconds: check.work("benchmark", "benchmark", seconds)),
    "memory": (30, lambda check, seconds: check.work("memory", "memory", seconds)),
    "tune": (60, lambda check, seconds: check.work("tune", "tune", seconds)),
}


def run_sections(check: Check, save: Callable[[], None]) -> None:
    """All sections in turn. Each has its own time and what those before it have left over; what is done without a GPU
    has all of it."""
    began = check.clock()
    total = reserved = sum(own for own, _ in SECTIONS.values())
    for name, (own, work) in SECTIONS.items():
        start = check.clock()
        reserved -= own if check.arch else reserved
        seconds = max(total - reserved - (start - began), LEAST)
        result: Result = {"status": NO_GPU, "summary": ""}
        if check.arch or name == "static":
            try:
                result = work(check, seconds)
            except Exception as error:
                result = {"status": "failed", "summary": f"{type(error).__name__}: {error}"}
        check.sections[name] = {
            "seconds": round(check.clock() - start, 1),
            "allowed": round(seconds, 1),
            "rows": [],
            **result,
        }
        save()


def exit_status(check: Check) -> int:
    status = {name: result["status"] for name, result in check.sections.items()}
    if any(s == "failed" or (name in CHECKS and s == "timeout") for name, s in status.items()):
        return 1
    return 0 if check.arch else 2


# ---------------------------------------------------------------------------------------------------- the machine


def obstacle() -> str | None:
    """Why nothing can run on a GPU here; None if it can."""
    if not torch.cuda.is_available():
        return "no GPU here"
    if not plans.has_cuda():
        return "the extension was built without CUDA kernels (see `make setup`)"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"the GPU has compute capability {major}.{minor}, the kernels need 8.0"


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH, of the toolkit, or of NVIDIA's wheels."""
    home = find_cuda_home(torch.version.cuda)[0]
    folders = [home / "bin", home / "compute-sanitizer"] if home else []
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)]))


# -------------------------------------------------------------------------------------------------------- report


def table_rows(sections: Mapping[str, Result], peak_gbs: float = 0) -> list[tuple[str, str, str, str]]:
    """(section, what, result, seconds): a row a section, and below it what it has measured or found."""
    rows = []
    for name, section in sections.items():
        rows.append((name, section["summary"], section["status"], f"{section['seconds']:.0f}"))
        if name == "benchmark":
            rows += _speed_rows(section["rows"], peak_gbs)
        elif name == "memory":
            baseline = next((row["bytes"] for row in section["rows"] if row["variant"] == "eager"), 0)
            rows += [
                ("", row["variant"], f"{row['bytes'] / 2**20:.0f} MiB ({row['bytes'] / (baseline or 1):.2f})", "")
                for row in section["rows"]
            ]
        elif name == "tune":
            worse = sorted((row for row in section["rows"] if row["ratio"] >= 1.05), key=lambda row: -row["ratio"])
            for row in worse[:10]:
                rows.append(("", row["problem"], f"{row['winner']} is {row['ratio']:.2f}x of the default", ""))
        else:
            rows += [("", *found, "") for found in map(_finding, section["rows"][:10]) if found]
    return rows


def _finding(row: Result) -> tuple[str, str] | None:
    if "test" in row:
        return row["test"], "failed"
    return (f"{row['kernel']} {row['arch']}", ", ".join(row["faults"])) if "faults" in row else None


def _speed_rows(rows: Sequence[Result], peak_gbs: float) -> list[tuple[str, str, str, str]]:
    found = []
    for row in rows:
        if row["variant"] == "eager":
            continue
        eager = next(r for r in rows if r["block"] == row["block"] and r["variant"] == "eager")
        for way in ("forward", "backward"):
            own, other, moved = row[f"{way}_ms"], eager[f"{way}_ms"], row[f"{way}_gbs"]
            text = f"{own:.3f} ms, eager {other:.3f} ms: {other / own:.2f}x"
            if row["variant"] != "compile":
                text += f"; {moved:.0f} GB/s" + (f" ({moved / peak_gbs:.0%})" if peak_gbs else "")
            marks = " (host-bound)" if row["host_bound"] or eager["host_bound"] else ""
            found.append(("", f"{row['block']} {way}, {row['variant']}", text + marks, ""))
    return found


def report(check: Check, about: Result, seconds: float) -> Result:
    """What is written as JSON."""
    return {
        "schema": 1, "machine": about, "versions": versions(), "batch": check.batch, "seconds": round(seconds, 1),
        "exit_status": exit_status(check), "sections": check.sections,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, help="of the measurements (default: 128, or 32 with less than 40 GB)")
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    began = time.monotonic()
    about, reason = machine(), obstacle()
    arch = 0 if reason else int(about["compute_capability"].replace(".", ""))
    batch = args.batch or (128 if about.get("memory", 0) >= 40e9 else 32)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"gpu-check-{slug(about['gpu'])}.json"
    with tempfile.TemporaryDirectory() as folder:
        check = Check(arch, Path(folder), batch=batch, compile=args.compile, sanitizer=find_sanitizer())

        def save() -> None:
            path.write_text(json.dumps(report(check, about, time.monotonic() - began), indent=1) + "\n")

        run_sections(check, save)
    title = f"{about['gpu'] or 'no GPU'}, batch {batch}, {time.monotonic() - began:.0f} s; {path}"
    table = make_table("section", "what", "result", "seconds", title=title)
    for row in table_rows(check.sections, about.get("peak_gbs", 0)):
        table.add_row(*row)
    make_console().print(table)
    status = exit_status(check)
    if reason:
        print(f"gpu-check: {reason}: only the static checks were made (exit status {status})", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
