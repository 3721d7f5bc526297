PYTHON ?= python3
JOBS   ?= 2
ARCH   ?= sm_80
# Architectures of `make wheel`. The PTX is 8.0's: it is what the tests execute, no kernel is written for a newer one
# alone, and every capability without machine code of its own can compile it.
ARCHES ?= 8.0+PTX;8.6;8.9;9.0;10.0;12.0

VENV := .venv
BIN  := $(VENV)/bin
PY   := $(BIN)/python
PIP  := $(PY) -m pip --disable-pip-version-check -q
EXT  := resnet_fused/_C.abi3.so
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')
export PATH := $(CURDIR)/$(BIN):$(PATH)
export MAX_JOBS := $(JOBS)

.PHONY: help setup demo test lint format bench bench-full gpu-check wheel sdist ptx docs clean
help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*##/\t/' | expand -t 12

# Two stamps: what pip installs, and the extension, built in place and incrementally.
$(VENV)/.installed: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install 'setuptools>=77' wheel
	RESNET_FUSED_NO_EXTENSION=1 $(PIP) install --no-build-isolation -e '.[test,lint]'
	touch $@

$(EXT): $(VENV)/.installed setup.py resnet_fused/_toolchain.py $(CSRC)
	mkdir -p build
	$(PY) setup.py build_ext --inplace >build/extension.log 2>&1 || { cat build/extension.log; exit 1; }
	grep '^resnet_fused:' build/extension.log
	touch $@

setup: $(EXT)  ## a virtual environment with everything, and the extension built in place

demo: $(EXT)  ## fused against eager on real images, then a small ResNet trained on digits
	$(PY) -m resnet_fused demo

test: $(EXT)  ## the test suite
	OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(JOBS) --dist worksteal

lint: $(VENV)/.installed  ## ruff, mypy and clang-format
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run -Werror $(CSRC)

format: $(VENV)/.installed  ## rewrites the sources as `make lint` wants them
	ruff check --fix .
	ruff format .
	clang-format -i $(CSRC)

bench: $(EXT)  ## the benchmarks, a short set: one table and results/<machine>-<version>.json
	$(PY) -m benchmarks

bench-full: $(EXT)  ## all of them: every op, shape and dtype
	$(PY) -m benchmarks --full

gpu-check: $(EXT)  ## everything that only a GPU can show, in ten minutes: results/gpu-check-<gpu>.json
	$(PY) -m benchmarks.gpu_check

wheel: $(VENV)/.installed  ## a CUDA and a CPU-only wheel into dist/, each installed in a clean environment and run
	bash tools/wheels.sh "$(ARCHES)"

sdist: $(VENV)/.installed  ## the source distribution into dist/
	rm -f resnet_fused.egg-info/SOURCES.txt  # of which setuptools takes what MANIFEST.in no longer names
	mkdir -p build dist
	RESNET_FUSED_NO_EXTENSION=1 $(PY) -c 'from setuptools import build_meta; build_meta.build_sdist("dist")' \
	  >build/sdist.log 2>&1 || { cat build/sdist.log; exit 1; }
	ls -l dist/*.tar.gz

ptx: $(VENV)/.installed  ## the PTX of every kernel into build/ptx/ (ARCH=sm_80)
	mkdir -p build/ptx
	nvcc=$$($(PY) resnet_fused/_toolchain.py) && for source in $$(find csrc -name '*.cu'); do \
	  $$nvcc -std=c++17 -O3 -Werror all-warnings -Icsrc -ptx -arch=$(ARCH) \
	    -o build/ptx/$$(basename $$source .cu).$(ARCH).ptx $$source || exit 1; done
	ls -l build/ptx

docs: $(EXT)  ## the public API's documentation into build/docs/
	$(PY) -m pdoc resnet_fused '!resnet_fused.explain' '!resnet_fused.tune' -o build/docs
	@echo build/docs/resnet_fused.html

clean:  ## everything built, but not the virtual environment
	rm -rf build dist $(EXT) *.egg-info
