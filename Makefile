# make throughput   set up, build, show ConvMixer throughput, ours beside PyTorch's
# make test         set up, build, run all tests
# make gpu          on a machine with a GPU, in the active environment, offline: test, measure, write results
# make gpu-libraries  both libraries for an H100 or H200 alone, small enough to be carried to one
#
# TORCH=torch==2.13.0                 another version of torch, in a virtual environment of its own
# TORCH_CUDA_ARCH_LIST='8.0;9.0a'     CUDA targets (default: the GPU's own, or a few where none is visible)
# ARGS='--models table2'              passed on to the benchmark or to pytest

DEFAULT_TORCH := torch==2.11.0
TORCH ?= $(DEFAULT_TORCH)
PYTHON ?= python3
VENV ?= .venv$(if $(filter $(DEFAULT_TORCH),$(TORCH)),,-$(subst =,,$(TORCH)))
BIN := $(VENV)/bin
READY := $(VENV)/.ready

GPU := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | \
    grep -Ex '7\.5|8\.[0-9]|9\.0|1[0-2]\.[0-9]' | sort -u | sed 's/^9\.0$$/9.0a/' | paste -sd ';')
TORCH_CUDA_ARCH_LIST ?= $(or $(GPU),8.0+PTX;9.0a)

# The toolkit from PyPI, where there is no nvcc: the tests run the CUDA kernels on an emulated GPU, from nvcc's output.
NVCC := $(or $(CMF_NVCC),$(wildcard $(patsubst %,%/bin/nvcc,$(CUDA_HOME) $(CUDA_PATH) /usr/local/cuda)),$(shell \
    command -v nvcc))
TOOLKIT := $(if $(NVCC),,$(VENV)/.toolkit)

.PHONY: throughput test build gpu gpu-libraries clean
.NOTPARALLEL:
.DEFAULT_GOAL := throughput

throughput: $(if $(GPU),$(TOOLKIT)) build
	$(BIN)/python benchmarks/throughput.py $(ARGS)

test: $(TOOLKIT) build
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

build: $(READY)
	TORCH_CUDA_ARCH_LIST='$(TORCH_CUDA_ARCH_LIST)' $(BIN)/python setup.py --quiet build_ext --inplace

gpu:
	python3 benchmarks/gpu.py $(ARGS)

gpu-libraries: $(TOOLKIT) $(READY)
	TORCH_CUDA_ARCH_LIST=9.0a CMF_CUDA=1 CMF_LINEINFO=0 $(BIN)/python setup.py --quiet build_ext --inplace --parallel 2 \
	    --build-temp build/gpu-libraries
	ls -l convmixer_fast/*.so
	test "$$(cat convmixer_fast/*.so | wc -c)" -le 45000000

# The clone itself is put on the environment's path: an editable installation would compile everything a second time.
$(READY): requirements.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet '$(TORCH)' -r requirements.txt
	$(BIN)/python -c "import pathlib, sysconfig; \
	    pathlib.Path(sysconfig.get_path('purelib'), 'convmixer_fast.pth').write_text('$(CURDIR)')"
	touch $@

$(VENV)/.toolkit: $(READY)
	$(BIN)/python -m pip install --quiet 'cuda-toolkit[nvcc,cudart,cccl,crt,nvvm]==13.0.*'
	touch $@

clean:
	rm -rf build dist convmixer_fast/*.so
