"""PTX from the compilers that are at hand: nvcc for CUDA C++, Triton for its kernels. Neither needs a GPU."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def find_nvcc() -> str | None:
    """nvcc on the PATH, under CUDA_HOME, or from the wheels of the CUDA toolkit; None if there is none."""
    candidates = [shutil.which("nvcc")]
    if os.environ.get("CUDA_HOME"):
        candidates.append(os.path.join(os.environ["CUDA_HOME"], "bin", "nvcc"))
    for site in {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]}:
        candidates += [str(p) for p in sorted(Path(site).glob("nvidia/cu*/bin/nvcc"))]
    return next((c for c in candidates if c and os.access(c, os.X_OK)), None)


@functools.cache
def nvcc(source: str, arch: str = "sm_80", flags: tuple[str, ...] = ()) -> str:
    """The PTX of CUDA C++ source text."""
    compiler = find_nvcc()
    if compiler is None:
        raise FileNotFoundError("no nvcc: install the CUDA toolkit or its nvidia-cuda-nvcc wheel")
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "kernel.cu", Path(folder) / "kernel.ptx"
        path.write_text(source)
        command = [compiler, "-ptx", f"-arch={arch}", "-std=c++17", *flags, str(path), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc failed:\n{done.stderr}")
        return out.read_text()


def triton(fn, signature: dict[str, str], constants: dict, cc: int = 80, divisible: tuple[str, ...] = (), **options):
    """A compiled Triton kernel (its .asm["ptx"], .metadata.shared, .metadata.num_warps, .metadata.name).

    signature: argument name -> type ("*fp32", "i32", ...); the names in `constants` are constexpr.
    divisible: the arguments that are known to be multiples of 16, as Triton's launcher finds out by itself.
    """
    import triton as tt
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = fn.arg_names
    full = {name: "constexpr" if name in constants else signature[name] for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    return tt.compile(ASTSource(fn, full, constants, attributes), target=GPUTarget("cuda", cc, 32), options=options)


def triton_launch(kernel, args, constexprs: Mapping[str, Any], cc: int, **options) -> tuple[Any, list]:
    """(compiled kernel, its arguments): what Triton compiles when this is launched on a GPU, specialised alike.

    options: num_warps and num_stages. Of `args` those are left that are no constants of the compiled kernel.
    """
    import triton as tt
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", cc, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, special, given = bind(*args, **constexprs, **options, debug=False, instrumentation_mode="")
    options, signature, constants, attributes = kernel._pack_args(backend, given, bound, special, given)
    compiled = tt.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options.__dict__)
    return compiled, [bound[name] for name, kind in signature.items() if kind != "constexpr"]
