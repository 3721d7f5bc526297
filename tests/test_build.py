"""The toolchain's choice, what the extension links, and the flags of its kernels."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.utils import cpp_extension

import resnet_fused._C
from resnet_fused import _toolchain, kernels

ROOT = Path(__file__).parents[1]


@pytest.fixture
def toolkit(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder that looks like a CUDA toolkit of some version."""

    def make(name: str, version: str, runtime: bool = True) -> Path:
        home = tmp_path / name
        (home / "bin").mkdir(parents=True)
        (home / "lib").mkdir()
        nvcc = home / "bin/nvcc"
        nvcc.write_text(
            f"#!/bin/sh\necho '#$ _HERE_={home}/bin' >&2\necho 'Cuda tools, release {version}, V{version}.1'\n"
        )
        nvcc.chmod(0o755)
        if runtime:
            (home / "lib/libcudart_static.a").touch()
        return home

    return make


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine without any toolkit."""
    for variable in ("CUDA_HOME", "CUDA_PATH", "RESNET_FUSED_CPU_ONLY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(_toolchain.shutil, "which", lambda name: None)
    monkeypatch.setattr(_toolchain.importlib.util, "find_spec", lambda name: None)
    return monkeypatch


def test_no_toolkit(bare: pytest.MonkeyPatch) -> None:
    home, why = _toolchain.find_cuda_home("13.0")
    assert home is None
    assert "no nvcc found" in why
    assert "pip install resnet_fused[cuda]" in why


def test_torch_without_cuda(bare: pytest.MonkeyPatch) -> None:
    assert _toolchain.find_cuda_home(None) == (None, "this torch was built without CUDA")


def test_cuda_home_comes_first(bare: pytest.MonkeyPatch, toolkit: Callable[..., Path]) -> None:
    first, second = toolkit("first", "13.0"), toolkit("second", "13.0")
    bare.setenv("CUDA_HOME", str(first))
    bare.setattr(_toolchain.shutil, "which", lambda name: str(second / "bin/nvcc"))
    assert _toolchain.find_cuda_home("13.0")[0] == first
    bare.delenv("CUDA_HOME")
    assert _toolchain.find_cuda_home("13.0")[0] == second


def test_other_major_version_is_passed_over(bare: pytest.MonkeyPatch, toolkit: Callable[..., Path]) -> None:
    old = toolkit("old", "12.4")
    bare.setenv("CUDA_HOME", str(old))
    home, why = _toolchain.find_cuda_home("13.0")
    assert home is None
    assert "nvcc 12.4" in why
    wheels = toolkit("nvidia/cu13", "13.0")
    spec = type("Spec", (), {"submodule_search_locations": [str(wheels.parent)]})
    bare.setattr(_toolchain.importlib.util, "find_spec", lambda name: spec)
    assert _toolchain.find_cuda_home("13.0")[0] == wheels


def test_toolkit_without_static_runtime(bare: pytest.MonkeyPatch, toolkit: Callable[..., Path]) -> None:
    bare.setenv("CUDA_HOME", str(toolkit("partial", "13.0", runtime=False)))
    home, why = _toolchain.find_cuda_home("13.0")
    assert home is None
    assert "libcudart_static.a" in why


def test_cpu_only_by_request(bare: pytest.MonkeyPatch, toolkit: Callable[..., Path]) -> None:
    bare.setenv("CUDA_HOME", str(toolkit("first", "13.0")))
    bare.setenv("RESNET_FUSED_CPU_ONLY", "1")
    assert _toolchain.find_cuda_home("13.0") == (None, "RESNET_FUSED_CPU_ONLY=1")


def test_setup_runs_the_toolchain_without_the_package() -> None:
    assert "find_cuda_home" in runpy.run_path(str(ROOT / "resnet_fused/_toolchain.py"))


def test_extension_links_no_cuda_library() -> None:
    """So that the CUDA wheel imports where torch has no CUDA; and abi3, so that one wheel serves every Python."""
    library = resnet_fused._C.__file__
    assert library.endswith(".abi3.so")
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", subprocess.check_output(["readelf", "-d", library], text=True))
    assert needed
    assert not [name for name in needed if "cuda" in name or "cudart" in name or "python" in name]


def test_kernels_are_examined_as_setup_compiles_them() -> None:
    """test_static.py looks at what kernels.FLAGS give: warnings are errors there too."""
    found = re.search(r"nvcc = (\[.*\])", (ROOT / "setup.py").read_text())
    assert found
    flags = ast.literal_eval(found[1])
    host = flags.index("-Xcompiler")
    assert [*flags[:host], *flags[host + 2 :]] == list(kernels.FLAGS)


def test_architectures_of_a_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine code for six, and the PTX that the tests execute for every other capability from 8.0 on."""
    found = re.search(r"^ARCHES \?= (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", found[1])
    flags = " ".join(cpp_extension._get_cuda_arch_flags())
    assert set(re.findall(r"code=sm_(\w+)", flags)) == {"80", "86", "89", "90", "100", "120"}
    assert re.findall(r"code=compute_(\w+)", flags) == ["80"]
