"""What takes the place of Triton's own launch in tests: its interpreter, its PTX on the emulator, and ptxas alone."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import ptx
import torch
from ptx import compilers
from ptx.launcher import Launched
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.nvidia import compiler as nvidia
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from resnet_fused import kernels
from resnet_fused.kernels import Kernel
from resnet_fused.triton import launch


@contextmanager
def interpreted() -> Iterator[None]:
    """Kernels run in Triton's interpreter, as if they had been decorated under TRITON_INTERPRET=1."""

    def run(kernel: Any, grid: tuple[int, ...], args: Any, constexprs: Any, _warps: int, _stages: int) -> None:
        InterpretedFunction(kernel.fn)[grid](*args, **constexprs)

    def call(function: JITFunction, *args: Any, **constants: Any) -> Any:  # by a kernel
        scope = interpreter._patch_lang(function.fn)
        try:
            return InterpretedFunction(function.fn).rewrite()(*args, **constants)
        finally:
            scope.restore()

    with mock.patch.object(JITFunction, "__call__", call), launch.launcher(run):
        yield


class TritonEmulator:
    """Launches the PTX that Triton compiles for compute capability cc / 10 on the emulator, with CPU tensors."""

    def __init__(self, cc: int, seed: int = 0, **options: Any) -> None:
        """options: those of ptx.Module.launch."""
        self.cc, self.seed, self.options = cc, seed, options
        self.launches: list[Launched] = []

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], args: Any, constexprs: Any, num_warps: int, num_stages: int
    ) -> None:
        options = {"num_warps": num_warps, "num_stages": num_stages}
        compiled, passed = compilers.triton_launch(kernel, args, constexprs, self.cc, **options)
        symbol, block, smem = compiled.metadata.name, 32 * compiled.metadata.num_warps, compiled.metadata.shared
        module = ptx.Module(compiled.asm["ptx"])
        seed = self.seed + len(self.launches)
        stats = module.launch(symbol, grid, block, passed, smem=smem, seed=seed, allow_same_values=True, **self.options)
        self.launches.append(Launched(symbol, grid, (block,), smem, stats))


class ByTriton(TorchDispatchMode):
    """Calls the Triton twins of the ops that have one."""

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        namespace, _, name = op._schema.name.partition("::")
        if namespace == "resnet_fused" and hasattr(torch.ops.resnet_fused_triton, name):
            op = getattr(torch.ops.resnet_fused_triton, name).default
        return op(*args, **(kwargs or {}))


class Assembler:
    """Compiles what is launched for compute capability cc / 10 to `kernels`; its tensors become 0, as nothing runs."""

    def __init__(self, cc: int) -> None:
        self.cc = cc
        self.kernels: list[Kernel] = []
        self.advice = ""  # of ptxas

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], args: Any, constexprs: Any, num_warps: int, num_stages: int
    ) -> None:
        options = {"num_warps": num_warps, "num_stages": num_stages}
        text = compilers.triton_launch(kernel, args, constexprs, self.cc, **options)[0].asm["ptx"]
        report, code = _assembled(text, self.cc)
        self.kernels += kernels.read("", f"sm_{self.cc}", report, text, code)
        self.advice += "".join(line for line in report.splitlines() if "(C7" in line)
        for tensor in args:
            if isinstance(tensor, torch.Tensor):
                tensor.zero_()


def _assembled(text: str, cc: int) -> tuple[str, str]:
    """ptxas -v's report and the machine code of a PTX text, with the flags that Triton gives."""
    ptxas = nvidia.get_ptxas(cc).path
    flags = ["-lineinfo", "-v", "--regAllocOptLevel=2", f"--gpu-name={nvidia.sm_arch_from_capability(cc)}"]
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(text)
        run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
        report = run([ptxas, *flags, source, "-o", cubin]).stderr
        code = run([Path(ptxas).with_name("cuobjdump"), "-sass", cubin]).stdout
    return report, code
