# make throughput   set up, build, show ConvMixer throughput, ours beside PyTorch's
# make test         set up, build, run all tests
# make gpu          on a machine with a GPU, in the active environment, offline: build, test, measure, write results
#
# TORCH=torch==2.13.0   another version of torch, in a virtual environment of its own

DEFAULT_TORCH := torch==2.11.0
TORCH ?= $(DEFAULT_TORCH)
PYTHON ?= python3
VENV ?= .venv$(if $(filter $(DEFAULT_TORCH),$(TORCH)),,-$(subst =,,$(TORCH)))
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: throughput test build gpu clean
.DEFAULT_GOAL := throughput

throughput: build
	$(BIN)/python benchmarks/throughput.py $(ARGS)

test: build
	$(BIN)/python -m pytest $(ARGS)

build: $(READY)
	@$(BIN)/python setup.py --quiet build_ext --inplace

gpu:
	python3 benchmarks/gpu.py $(ARGS)

# The clone itself is put on the environment's path: an editable installation would compile everything a second time.
$(READY): requirements.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet $(TORCH) -r requirements.txt
	$(BIN)/python -c "import pathlib, sysconfig; \
	    pathlib.Path(sysconfig.get_path('purelib'), 'convmixer_fast.pth').write_text('$(CURDIR)')"
	touch $@

clean:
	rm -rf build convmixer_fast/*.so
