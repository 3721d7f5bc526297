"""Compiles the emulator on first use and keeps the result, keyed by everything that it depends on."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11
import torch

_HERE = Path(__file__).resolve().parent
_FLAGS = ["-std=c++17", "-O2", "-ftree-vectorize", "-march=native", "-fPIC", "-fvisibility=hidden"]
_FLAGS += ["-Wall", "-Wextra", "-Werror"]
# PTX says itself what is fused and what wraps; a register is read as whatever type the instruction has.
_FLAGS += ["-ffp-contract=off", "-fwrapv", "-fno-strict-aliasing", "-fno-math-errno"]
_TORCH = Path(torch.__file__).parent


def _cpu() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def cache_dir() -> Path:
    """build/ of the repository, or the user's cache where that cannot be written."""
    build = _HERE.parents[1] / "build"
    if os.access(build if build.exists() else build.parent, os.W_OK):
        return build
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))


def _compile(sources: Sequence[Path], library: Path, includes: Sequence[str], links: Sequence[str]) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    objects = [library.with_name(f"{source.stem}.o") for source in sources]

    def one(pair: tuple[Path, Path]) -> None:
        command = [compiler, *_FLAGS, *includes, "-c", str(pair[0]), "-o", str(pair[1])]
        subprocess.run(command, check=True)

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        list(pool.map(one, zip(sources, objects, strict=True)))
    subprocess.run([compiler, "-shared", "-pthread", "-o", str(library), *map(str, objects), *links], check=True)


def _load(name: str, sources: Sequence[Path], headers: Sequence[Path], with_torch: bool = False) -> ModuleType:
    """The extension module `name`; builds it if no build of these sources is there."""
    key = hashlib.sha256()
    for path in [*sources, *headers]:
        key.update(path.name.encode() + path.read_bytes())
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    includes = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_paths()['include']}"]
    links: list[str] = []
    if with_torch:
        includes.append(f"-isystem{_TORCH / 'include'}")
        links = [f"-L{_TORCH / 'lib'}", "-lc10"]
    versions = [pybind11.__version__, torch.__version__ if with_torch else "", os.environ.get("CXX", "")]
    key.update(" ".join([*_FLAGS, *includes, suffix, *versions, _cpu()]).encode())
    folder = cache_dir() / f"ptx-emulator-{key.hexdigest()[:16]}"
    library = folder / f"{name}{suffix}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # parallel test workers build once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                built = Path(scratch) / library.name
                _compile(sources, built, includes, links)
                built.rename(library)
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_emulator() -> ModuleType:
    return _load("_ptx", sorted(_HERE.glob("*.cpp")), sorted(_HERE.glob("*.h")))


def load_allocations() -> ModuleType:
    """The tracker of torch's host allocations, the one part that knows torch."""
    return _load("_allocations", [_HERE / "allocations.cc"], [], with_torch=True)
