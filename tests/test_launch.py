"""csrc/common/launch.cpp on a machine with several GPUs, which is made up: see fake_cuda.cpp."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from resnet_fused._toolchain import find_cuda_home

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
TORCH = """
extern "C" { __attribute__((visibility("default"))) void* fake_streams[3];
__attribute__((visibility("default"))) int aoti_torch_get_current_cuda_stream(int device, void** stream) {
  return *stream = fake_streams[device], 0; } }
"""
EXPECTED = """\
the current device
  first on device 0, stream a0, 7x2 blocks of 32x8
  first on device 0, stream a0, 7x2 blocks of 32x8
  current device 0
another device
  first on device 2, stream c2, 7x2 blocks of 32x8
  current device 0
its other stream
  first on device 2, stream side, 7x2 blocks of 32x8
  current device 0
shared memory
  limit of first on device 1: 60000
  first on device 1, stream b1, 7x2 blocks of 32x8
  current device 0
less of it
  first on device 1, stream b1, 7x2 blocks of 32x8
  current device 0
more of it
  limit of first on device 1: 70000
  first on device 1, stream b1, 7x2 blocks of 32x8
  current device 0
on another device
  limit of first on device 0: 60000
  first on device 0, stream a0, 7x2 blocks of 32x8
  current device 0
an unknown kernel
  error: resnet_fused: kernel third: other
  current device 0
a device that is not there
  error: cudaSetDevice: invalid device
  current device 0
from another current device
  first on device 0, stream a0, 7x2 blocks of 32x8
  current device 1
the default stream
  first on device 0, stream default, 7x2 blocks of 32x8
  current device 0
arch of 0: 80
arch of 1: 90
arch of 2: 120
one launch
  first on device 2, stream side, 1x1 blocks of 32x1
  fine, current device 0
  cudaSetDevice: invalid device, current device 0
contention: 0 failures
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program: launch.cpp, the made-up runtime, and a library with the name of torch's."""
    home, why = find_cuda_home(torch.version.cuda)
    assert home, why
    folder = tmp_path_factory.mktemp("launch")
    (folder / "torch.cpp").write_text(TORCH)
    library, program = folder / "libtorch_cuda.so", folder / "program"
    compiler = ["c++", "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror"]
    shared = ["-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so"]
    subprocess.run([*compiler, *shared, folder / "torch.cpp", "-o", library], check=True)
    sources = [TESTS / "fake_cuda.cpp", CSRC / "common/launch.cpp"]
    flags = [f"-I{CSRC}", f"-isystem{home / 'include'}", "-DRESNET_FUSED_CUDA", "-pthread"]
    libraries = [f"-L{folder}", "-Wl,--no-as-needed", "-ltorch_cuda", f"-Wl,-rpath,{folder}", "-ldl"]
    subprocess.run([*compiler, *flags, *sources, *libraries, "-o", program], check=True)
    return program


def test_devices_streams_and_threads(machine: Path) -> None:
    """Kernels run on their tensors' device and on its current stream, and the current device stays what it was."""
    output = subprocess.run([machine], capture_output=True, text=True, check=True).stdout
    assert output == EXPECTED
