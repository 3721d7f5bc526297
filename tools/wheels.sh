#!/usr/bin/env bash
# wheels.sh ARCHITECTURES: a CUDA wheel (dist/cuda) and a CPU-only wheel (dist/cpu), each proved in an environment that
# holds nothing else. That environment borrows torch from .venv by a path file: it is 5 GB.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

build() {  # build KIND: environment variables come from the caller
  rm -rf build/lib* "dist/$1"
  mkdir -p build "dist/$1"
  "$python" -m pip wheel . -v --disable-pip-version-check --no-build-isolation --no-deps -w "dist/$1" \
    >"build/wheel-$1.log" 2>&1 || { cat "build/wheel-$1.log"; exit 1; }
}

prove() {  # prove KIND HAS_CUDA (0 or 1): install the wheel and train one block with it
  local clean=build/wheel-$1
  rm -rf "$clean"
  "$python" -m venv "$clean"
  "$clean/bin/python" -m pip install --disable-pip-version-check -q --no-deps dist/"$1"/*.whl
  echo "$packages" >"$("$clean/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth"
  (cd "$clean" && bin/python - "$2") <<'PY'
import sys
from pathlib import Path

import torch

import resnet_fused
from resnet_fused import plans

assert Path(resnet_fused.__file__).is_relative_to(Path.cwd()), "the wheel's package, not the source tree's"
assert plans.has_cuda() == bool(int(sys.argv[1]))
block = resnet_fused.BasicBlock(16, 16)
x = torch.randn(2, 16, 9, 9, requires_grad=True)
block(x).sum().backward()
assert x.grad.isfinite().all() and block.bn1.running_var.isfinite().all()
print(f"  imported and trained a block; CUDA kernels: {'yes' if plans.has_cuda() else 'no'}")
PY
  rm -rf "$clean"
}

TORCH_CUDA_ARCH_LIST=$1 build cuda
RESNET_FUSED_CPU_ONLY=1 build cpu
for kind in cuda cpu; do
  for wheel in dist/"$kind"/*.whl; do
    echo "$wheel  $(du -h --apparent-size "$wheel" | cut -f1)"
  done
  prove "$kind" "$(grep -c "resnet_fused: CUDA build" "build/wheel-$kind.log" || true)"
done
