"""Builds resnet_fused/_C.abi3.so from every csrc/**/*.cpp and, where a CUDA toolkit is found, csrc/**/*.cu.

Everything else about the package is in pyproject.toml. Environment variables:
RESNET_FUSED_CPU_ONLY=1      no CUDA, whatever the machine has
TORCH_CUDA_ARCH_LIST         architectures, as for every torch extension; default: the visible GPUs', else 8.0+PTX
RESNET_FUSED_NO_EXTENSION=1  Python files only: the Makefile installs like this, then builds in place, incrementally
"""

import os
import runpy
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
TORCH_TARGET = "0x020a000000000000"  # torch 2.10: one binary serves it and every later one


def sources(suffix: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob(f"*{suffix}"))


def extension():
    import torch

    toolchain = runpy.run_path(str(ROOT / "resnet_fused/_toolchain.py"))
    home, why = toolchain["find_cuda_home"](torch.version.cuda)
    if home:
        os.environ["CUDA_HOME"] = str(home)  # before cpp_extension is imported: it looks once
        if not torch.cuda.device_count():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0+PTX")
    print(f"resnet_fused: CUDA build with {why}" if home else f"resnet_fused: CPU-only build ({why})", flush=True)
    from torch.utils.cpp_extension import CppExtension, include_paths

    # torch's headers as system headers: our warnings are errors, theirs are not ours to mend
    cxx = ["-O3", "-std=c++17", "-fvisibility=hidden", *WARNINGS]
    cxx += [flag for path in include_paths() for flag in ("-isystem", path)]
    # A flag with "arch" in it would make torch ignore TORCH_CUDA_ARCH_LIST.
    nvcc = ["-O3", "-std=c++17", "-Werror", "all-warnings", "-Xcompiler", "-fvisibility=hidden"]
    return CppExtension(
        name="resnet_fused._C",
        sources=sources(".cpp") + (sources(".cu") if home else []),
        depends=sources(".h") + sources(".cuh"),
        include_dirs=[str(ROOT / "csrc")] + ([str(home / "include")] if home else []),
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)] + ([("RESNET_FUSED_CUDA", None)] if home else []),
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        # The static runtime, and neither torch_cuda nor c10_cuda: the CUDA wheel also imports on a CPU-only torch.
        extra_objects=[str(toolchain["cudart_static"](home))] if home else [],
        extra_link_args=["-Wl,-s"] + (["-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-lpthread"] if home else []),
        py_limited_api=True,
    )


if os.environ.get("RESNET_FUSED_NO_EXTENSION") == "1":
    setup()
else:
    module = extension()
    from torch.utils.cpp_extension import BuildExtension  # not earlier: extension() sets CUDA_HOME

    setup(
        ext_modules=[module],
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
