## make throughput     set up, build, show ConvMixer throughput, ours beside PyTorch's
## make test           set up, build, run the tests; `make test-all` runs the long ones, too
## make micro          time one call of each operator (pytest-benchmark)
## make gpu            on a machine with a GPU, in the active environment, offline: test, measure, write results
## make gpu-libraries  both libraries for an H100 or H200 alone, small enough to be carried to one
## make lint           formatting, lint and types, as CI checks them
## make build          both libraries, with CUDA kernels where there is an nvcc
## make clean          remove what was built
##
## TORCH=torch==2.13.0                 another version of torch, in a virtual environment of its own
## TORCH_CUDA_ARCH_LIST='8.0;9.0a'     CUDA targets (default: the GPU's own, or a few where none is visible; all)
## ARGS='--models table2'              passed on to the benchmark or to pytest

DEFAULT_TORCH := torch==2.11.0
TORCH ?= $(DEFAULT_TORCH)
PYTHON ?= python3
ifeq ($(TORCH),$(DEFAULT_TORCH))
VENV ?= .venv
else
VENV ?= .venv-$(shell printf %s '$(TORCH)' | tr -cs '[:alnum:].' -)
endif
BIN := $(VENV)/bin
# Packages are installed without bytecode, which would take pip half a minute. Python writes that of modules which it
# imports, unless this variable forbids it.
export PYTHONDONTWRITEBYTECODE :=
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-compile '$(TORCH)'

GPU := $(shell nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)

# The toolkit from PyPI, where there is no nvcc: the tests run the CUDA kernels on an emulated GPU, from nvcc's output.
# If CMF_NVCC names one that does not exist, none is installed in its place: whatever runs nvcc then says so.
NVCC := $(shell CMF_NVCC='$(CMF_NVCC)' CUDA_HOME='$(CUDA_HOME)' CUDA_PATH='$(CUDA_PATH)' \
    $(firstword $(wildcard $(BIN)/python) $(PYTHON)) tools/find_cuda.py 2>/dev/null)
TOOLKIT := $(if $(NVCC)$(CMF_NVCC),,$(VENV)/.toolkit)

# Without a GPU the CUDA library is built only where it is asked for (build, test-all); once there, it stays up to date.
FAST_BUILD := $(if $(or $(GPU),$(wildcard convmixer_fast/_C_cuda.so)),$(TOOLKIT) build,build-cpu)

# One file for each choice of what to build, newer than the sources: with nothing to do, nothing is started. It is
# removed where the libraries are missing.
SOURCES := setup.py tools/find_cuda.py $(shell find csrc -type f -not -path '*/__pycache__/*' -not -name '.*')
built = build/built-$(shell echo '$(VENV) $(1) $(TORCH_CUDA_ARCH_LIST) $(CMF_NVCC) $(CMF_LINEINFO)' | cksum | cut -d' ' -f1)
BUILT := $(call built,$(or $(CMF_CUDA),auto))
BUILT_CPU := $(call built,cpu)
ifeq ($(wildcard convmixer_fast/_C.so),)
$(shell rm -f build/built-*)
endif

.PHONY: help throughput test test-all micro lint build build-cpu gpu gpu-libraries clean
.NOTPARALLEL:
.DEFAULT_GOAL := help

help:
	@sed -n 's/^## \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

throughput: $(FAST_BUILD)
	$(BIN)/python benchmarks/throughput.py $(ARGS)

test: $(VENV)/.tests $(TOOLKIT) $(FAST_BUILD)
	@$(BIN)/python tests/emulated.py sm_90a
	$(PYTEST) $(ARGS)

test-all: $(VENV)/.tests $(TOOLKIT) build
	@$(BIN)/python tests/emulated.py sm_90a sm_80 sm_75
	$(PYTEST) -m 'not fuzz' $(ARGS)

micro: $(VENV)/.tests $(FAST_BUILD)
	$(BIN)/python -m pytest benchmarks/test_micro.py $(ARGS)

lint: $(VENV)/.tests
	VENV=$(VENV) PYTHON=$(PYTHON) .ci/lint

build: $(BUILT)
	@:

build-cpu: export CMF_CUDA := 0
build-cpu: $(BUILT_CPU)
	@:

$(BUILT) $(BUILT_CPU): $(VENV)/.ready $(SOURCES)
	@rm -f build/built-*
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@mkdir -p build && touch $@

gpu:
	python3 benchmarks/gpu.py $(ARGS)

gpu-libraries: $(TOOLKIT) $(VENV)/.ready
	@rm -f build/built-*
	TORCH_CUDA_ARCH_LIST=9.0a CMF_CUDA=1 CMF_LINEINFO=0 $(BIN)/python setup.py --quiet build_ext --inplace --parallel 2 \
	    --build-temp build/gpu-libraries
	ls -l convmixer_fast/*.so
	test "$$(cat convmixer_fast/*.so | wc -c)" -le 45000000

# The clone itself is put on the environment's path, relative to it, so that a copy of both runs its own code. An
# editable installation would compile everything a second time.
$(VENV)/.ready: requirements.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	@$(BIN)/python -c "import os, pathlib, sysconfig; folder = os.path.realpath(sysconfig.get_path('purelib')); \
	    inside = folder.startswith(os.path.realpath('$(CURDIR)') + os.sep); \
	    pathlib.Path(folder, 'convmixer_fast.pth').write_text(os.path.relpath('.', folder) if inside else os.getcwd())"
	@touch $@

$(VENV)/.tests: $(VENV)/.ready requirements-test.txt
	$(PIP) -r requirements-test.txt
	@touch $@

$(VENV)/.toolkit: $(VENV)/.ready
	$(PIP) 'cuda-toolkit[nvcc,cudart,cccl,crt,nvvm]==13.0.*'
	@touch $@

clean:
	rm -rf build dist convmixer_fast/*.so
