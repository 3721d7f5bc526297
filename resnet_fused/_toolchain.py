"""Where the CUDA compiler is. Standard library only, since setup.py runs this file before the package exists."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


def _candidates() -> Iterator[tuple[str, Path]]:
    """(where it was named, toolkit folder), best first."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield variable, Path(os.environ[variable])
    if nvcc := shutil.which("nvcc"):
        # nvcc may be a wrapper script or a link: it knows its own folder best
        dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        if top := re.search(r"^#\$ _HERE_=(.+)$", dry_run, re.MULTILINE):
            yield "nvcc on PATH", Path(top[1]).parent
    spec = importlib.util.find_spec("nvidia")  # the namespace package of NVIDIA's wheels
    for root in (spec.submodule_search_locations if spec else None) or ():
        for home in sorted(Path(root).glob("cu[0-9]*"), reverse=True):
            yield "NVIDIA's wheels", home


def nvcc_version(home: Path) -> tuple[int, int] | None:
    """(major, minor) of the nvcc of a toolkit folder, None if it has none that runs."""
    try:
        text = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    release = re.search(r"release (\d+)\.(\d+)", text)
    return (int(release[1]), int(release[2])) if release else None


def cudart_static(home: Path) -> Path | None:
    """The static CUDA runtime library of a toolkit folder."""
    folders = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
    return next((p for f in folders if (p := home / f / "libcudart_static.a").exists()), None)


def find_cuda_home(torch_cuda: str | None) -> tuple[Path | None, str]:
    """The toolkit to build with and a line that says why; (None, why not) for a CPU-only build.

    A toolkit serves if its nvcc has the major version of the CUDA that torch was built with (`torch.version.cuda`)
    and it brings the static runtime.
    """
    if os.environ.get("RESNET_FUSED_CPU_ONLY") == "1":
        return None, "RESNET_FUSED_CPU_ONLY=1"
    if torch_cuda is None:
        return None, "this torch was built without CUDA"
    refused = []
    for origin, home in _candidates():
        version = nvcc_version(home)
        if version is None:
            continue
        name = f"nvcc {version[0]}.{version[1]} ({origin}: {home})"
        if version[0] != int(torch_cuda.split(".")[0]):
            refused.append(f"{name} is not of torch's CUDA {torch_cuda}")
        elif cudart_static(home) is None:
            refused.append(f"{name} has no libcudart_static.a")
        else:
            return home, name
    return None, "; ".join(refused or ["no nvcc found"]) + "; `pip install resnet_fused[cuda]` brings one"


if __name__ == "__main__":
    import torch

    found, why = find_cuda_home(torch.version.cuda)
    if found is None:
        sys.exit(f"resnet_fused: no CUDA toolkit ({why})")
    print(found / "bin/nvcc")
