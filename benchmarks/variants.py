"""What is compared: eager PyTorch (channels_last), torch.compile, the fused model, and for inference on a CPU other
engines where they are installed (`pip install resnet_fused[bench]`), all built from one seed.

A variant is a model and calls without arguments: a forward and a backward of a training step, or an inference.
"""

from __future__ import annotations

import copy
import importlib
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused.timing import Part

VARIANTS = ("eager", "compile", "lean", "fast")
ENGINES = ("onnxruntime", "openvino")
INFERENCE_VARIANTS = ("eager", "compile", "lean", *ENGINES)  # `memory` is about training only
WORK = ("forward", "train", "inference")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class UnavailableError(Exception):
    """A variant that there is not here, and why."""


def photos_like(batch: int, size: int, device: str = "cpu") -> Tensor:
    """Random images [batch, 3, size, size], channels_last: speed does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, size, size, generator=generator).contiguous(memory_format=torch.channels_last)
    return x.to(device)


def compiled(run: Callable, **options: Any) -> Callable:
    """torch.compile for the shapes that come first, whatever was compiled before: without a limit on how often."""
    torch.compiler.reset()
    return torch.compile(run, dynamic=False, **options)


class Step:
    """Forward and backward of a module's training step, as two calls. A network's output [N, classes] has a loss."""

    def __init__(
        self, block: nn.Module, x: Tensor, compiles: bool = False, autocast: torch.dtype | None = None
    ) -> None:
        self.block, self.x = block, x
        self._run = torch.compile(block, dynamic=False) if compiles else block
        self._leaves = [t for t in (x, *block.parameters()) if t.requires_grad]
        self._autocast = autocast
        self._y: Tensor | None = None
        self._dy: Tensor | None = None

    def _amp(self) -> AbstractContextManager:
        return torch.autocast(self.x.device.type, self._autocast, enabled=self._autocast is not None)

    def forward(self) -> Tensor:
        self._y = None  # the one before is freed first, as in training
        with self._amp():
            y = self._run(self.x)
        if y.dim() == 2:
            y = F.cross_entropy(y.float(), torch.arange(len(y), device=y.device) % y.shape[1])
        self._y = y
        return y

    def backward(self) -> tuple[Tensor, ...]:
        assert self._y is not None
        if self._dy is None:
            self._dy = torch.ones_like(self._y) if self._y.dim() == 0 else torch.randn_like(self._y)
        return torch.autograd.grad(self._y, self._leaves, self._dy)

    @property
    def parts(self) -> tuple[Part, Part]:
        return self.forward, self.backward

    def run(self) -> None:
        """The optimizer's step is the same for all and left out."""
        self.forward()
        self.backward()


def build_step(model: nn.Module, variant: str, dtype: torch.dtype, x: Tensor) -> Step:
    """Training under a 16-bit type is autocast, as users train."""
    model = copy.deepcopy(model).to(x.device, memory_format=torch.channels_last).train()
    if variant in ("lean", "fast"):
        rf.fuse_(model, memory=variant)  # type: ignore[arg-type]
    elif variant == "compile":
        torch.compiler.reset()
    elif variant != "eager":
        raise UnavailableError(f"{variant} does not train")
    return Step(model, x, variant == "compile", None if dtype == torch.float32 else dtype)


def build_inference(model: nn.Module, variant: str, dtype: torch.dtype, x: Tensor) -> Part:
    """Inference converts the model to its type."""
    if variant in ENGINES:
        return _engine(variant, copy.deepcopy(model).eval(), dtype, x)
    x = x.to(dtype)
    model = copy.deepcopy(model).to(x.device, dtype, memory_format=torch.channels_last).eval()
    run: Callable = model
    if variant in ("lean", "fast"):
        run = rf.optimize_for_inference(model, x)
    elif variant == "compile":
        run = compiled(model, options={"freezing": True})

    def call() -> Tensor:
        with torch.inference_mode(variant != "compile"), torch.no_grad():
            return run(x)

    return call


def build(model: nn.Module, variant: str, work: str, dtype: torch.dtype, x: Tensor) -> Part:
    """The call to time. Raises UnavailableError."""
    if work == "inference":
        return build_inference(model, variant, dtype, x)
    step = build_step(model, variant, dtype, x)
    return step.forward if work == "forward" else step.run


# ------------------------------------------------------------------------------------------------ other engines


def _engine(name: str, model: nn.Module, dtype: torch.dtype, x: Tensor) -> Part:
    if x.is_cuda:
        raise UnavailableError(f"{name} is compared on a CPU only")
    return {"onnxruntime": _onnxruntime, "openvino": _openvino}[name](model, dtype, x)


def installed(module: str, package: str) -> Any:
    """Imports `module`. Raises UnavailableError."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UnavailableError(f"{package} is not installed (pip install 'resnet_fused[bench]')") from None


def _onnxruntime(model: nn.Module, dtype: torch.dtype, x: Tensor) -> Part:
    runtime = installed("onnxruntime", "onnxruntime")
    installed("onnxscript", "onnxscript")
    if dtype != torch.float32:
        raise UnavailableError("ONNX Runtime's CPU convolutions take float32 only")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (x,), str(path), dynamo=True, verbose=False)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.contiguous().numpy()}  # NCHW: it has no other
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def _openvino(model: nn.Module, dtype: torch.dtype, x: Tensor) -> Part:
    openvino = installed("openvino", "openvino")
    if dtype == torch.float16:
        raise UnavailableError("OpenVINO's CPU plugin takes float32 and bfloat16")
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    image = x.contiguous()
    exported = torch.export.export(model, (image,))
    network = openvino.compile_model(openvino.convert_model(exported), "CPU", options)
    return lambda: torch.from_numpy(network(image.numpy())[0])
