"""What a measurement is of: the machine, the versions, and how its file is called."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpus import recognise
from resnet_fused import __version__
from resnet_fused.data import require
from resnet_fused.timing import CudaTimer, HostTimer

RESULTS = Path(__file__).parents[1] / "results"


def machine() -> dict[str, Any]:
    found: dict[str, Any] = {"host": platform.machine(), "cpus": os.cpu_count(), "gpu": None}
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": gpu.name, "compute_capability": f"{gpu.major}.{gpu.minor}", "gpus": torch.cuda.device_count(),
            "multiprocessors": gpu.multi_processor_count, "memory": gpu.total_memory, "l2": gpu.L2_cache_size,
            # What the memory can move: two transfers a cycle of a clock in kHz.
            "peak_gbs": 2 * getattr(gpu, "memory_clock_rate", 0) * getattr(gpu, "memory_bus_width", 0) / 8 / 1e6,
        }  # fmt: skip
    return found


def versions() -> dict[str, Any]:
    driver = shutil.which("nvidia-smi")
    query = [driver, "--query-gpu=driver_version", "--format=csv,noheader"] if driver else []
    version = subprocess.run(query, capture_output=True, text=True).stdout.split() if driver else []
    return {
        "resnet_fused": __version__, "python": platform.python_version(), "torch": torch.__version__,
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "driver": version[0] if version else None,
    }  # fmt: skip


def slug(name: str | None) -> str:
    return re.sub(r"[^a-z0-9]+", "-", (name or "no gpu").lower()).strip("-")


def processor() -> str:
    """The CPU's own name."""
    return require("cpuinfo", "the benchmark", "py-cpuinfo").get_cpu_info().get("brand_raw") or platform.machine()


def malloc_setting() -> str:
    """Which of the two allocator settings this process runs under."""
    kept = os.environ.get("MALLOC_MMAP_MAX_") == "0"
    return "malloc keeps its pages" if kept else "default malloc"


def result_path(device: str, folder: Path = RESULTS) -> Path:
    """<machine>-<version>.json: of the GPU where that is what is measured."""
    name = machine()["gpu"] if device == "cuda" else processor()
    return folder / f"{slug(name)}-{__version__}.json"


def roof(device: str, dtypes: dict[str, torch.dtype]) -> dict[str, Any]:
    """Bytes and, by dtype, FLOPs a second that nothing here exceeds: published ones of a GPU that is known, else what a
    copy and a large product reach, which is "measured"."""
    if device == "cuda" and (gpu := recognise(torch.cuda.get_device_name())):
        return {"kind": "published", "bandwidth": gpu.bandwidth, "peak": gpu.peak}
    x = torch.zeros(1 << 28, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    bandwidth = 2 * x.nbytes / _quickest(lambda: y.copy_(x), device)
    peak = {}
    for name, dtype in dtypes.items():
        side = 8192 if device == "cuda" else 1024
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        peak[name] = 2 * side**3 / _quickest(lambda a=a, b=b: a @ b, device)
    return {"kind": "measured", "bandwidth": bandwidth, "peak": peak}


def _quickest(call: Callable[[], object], device: str) -> float:
    """Seconds of the best of a few calls."""
    timer = CudaTimer() if device == "cuda" else HostTimer()
    return min(timer([call]).milliseconds[0] for _ in range(5)) / 1e3
