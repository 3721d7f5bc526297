"""`make ptx`, and kernels driven by hand: nothing but the plan, the PTX that it names and the emulator."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import ptx
import pytest
import torch

from resnet_fused import plans

ROOT = Path(__file__).parents[1]


def run_plan(op: str, problem: dict, arguments: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]) -> None:
    """Every step of a plan, with the parameters that the plan has packed from the buffers' addresses."""
    buffers = {name: ptx.poison_(t) for name, t in outputs.items()} | arguments
    addresses = {name: t.data_ptr() for name, t in buffers.items()}
    floats = plans.plan(op, problem, arch=80, buffers=addresses).workspace
    if floats:
        buffers["workspace"] = torch.empty(floats)
        addresses["workspace"] = buffers["workspace"].data_ptr()
    for step in plans.plan(op, problem, arch=80, buffers=addresses).steps:
        text = (ROOT / "build/ptx" / f"{Path(step.source).stem}.sm_80.ptx").read_text()
        module = ptx.Module(text)
        module.launch(step.symbol, step.grid, step.block, [step.params], smem=step.smem, buffers=buffers.values())


@pytest.mark.slow
def test_make_ptx_and_kernels_by_hand() -> None:
    # -o: the environment is as it is; and it is this one
    subprocess.run(
        ["make", "-o", ".venv/.installed", "ptx", "ARCH=sm_80", f"PY={sys.executable}"], cwd=ROOT, check=True
    )

    named = {name: {field for field, _ in kind._fields_} for name, kind in plans._PROBLEMS.items()}
    sizes = {"M": 100, "N": 1, "H": 10, "W": 10, "kernel": 3, "stride": 1, "padding": 1}
    for op in plans.OPS:
        for dtype, channels in ((torch.float32, 7), (torch.bfloat16, 64), (torch.float16, 8)):
            problem = {"dtype": dtype, "C": channels, **{n: v for n, v in sizes.items() if n in named[op]}}
            for step in plans.plan(op, problem, arch=80).steps:
                text = (ROOT / "build/ptx" / f"{Path(step.source).stem}.sm_80.ptx").read_text()
                assert re.search(r"^\.target sm_80\b", text, re.MULTILINE)
                assert re.search(rf"^\.visible \.entry {step.symbol}\(", text, re.MULTILINE)

    x = torch.randn(2, 5, 9, 24).bfloat16()  # [N, H, W, C]
    mean, var = torch.empty(24), torch.empty(24)
    run_plan("bn_stats", {"dtype": x.dtype, "M": 90, "C": 24}, {"x": x}, {"mean": mean, "var": var})
    wide = x.double().view(90, 24)
    torch.testing.assert_close(mean, wide.mean(0).float())
    torch.testing.assert_close(var, wide.var(0, unbiased=False).float())

    scale, shift = torch.randn(24), torch.randn(24)
    y, mask = torch.empty_like(x), torch.empty(1, 90, dtype=torch.int32)
    problem = {"dtype": x.dtype, "M": 90, "C": 24, "relu": 1}
    run_plan("bn_act", problem, {"x": x, "scale": scale, "shift": shift}, {"y": y, "mask": mask})
    torch.testing.assert_close(y, torch.relu(scale * x.float() + shift).bfloat16())
    assert torch.equal((mask.view(90, 1) >> torch.arange(24)) & 1 > 0, y.view(90, 24) > 0)
