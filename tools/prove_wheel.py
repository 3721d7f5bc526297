"""prove_wheel.py cpu|cuda: in an environment that has the wheel and torch alone, blocks train as the plain ones do."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import torch

import resnet_fused
from resnet_fused import plans, reference

assert Path(resnet_fused.__file__).is_relative_to(Path.cwd()), "the wheel's package, not the source tree's"
assert plans.has_cuda() == (sys.argv[1] == "cuda")
for name, x in (("BasicBlock", torch.randn(2, 16, 9, 9)), ("Bottleneck", torch.randn(2, 64, 9, 9))):
    fused, plain = (
        getattr(resnet_fused, name)(x.shape[1], 16).double(),
        getattr(reference, name)(x.shape[1], 16).double(),
    )
    fused.load_state_dict(plain.state_dict())
    inputs = [x.double().requires_grad_() for _ in range(2)]
    outputs = [block(a) for block, a in zip((fused, plain), inputs, strict=True)]
    dy = torch.randn_like(outputs[0])
    for y in outputs:
        y.backward(dy)
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(list(fused.buffers()), list(plain.buffers()))
print(f"  {sys.argv[1]}: trained blocks on Python {platform.python_version()}, torch {torch.__version__}")
