# make demo   a generator learns to keep time; opens with runs/demo/report.html
# make test   the test suite; needs no GPU
# Everything runs in .venv, made here with Python ≥ 3.10 and a C++ compiler.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CLIPS ?=
STAGES ?=

.PHONY: help install demo tune rules evidence base test lint bench sass wheel gpu-check clean

help:  ## What can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(READY)  ## Make .venv and install the package, editable, with all extras

# An editable install knows the packages that there were when it was made.
$(READY): pyproject.toml CMakeLists.txt $(wildcard csrc/* syncdpo/*/__init__.py)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[train,eval,quant,dev,interop]'
	touch $@

demo: $(READY)  ## Train SFT and SyncDPO, measure, report; CLIPS=folder for your own clips
	$(BIN)/syncdpo demo --output runs/demo $(if $(CLIPS),--clips '$(CLIPS)')

tune: $(READY)  ## Find each method's weights and learning rate for the demo
	$(BIN)/syncdpo tune

rules: $(READY)  ## Compare the rules on three seeds
	$(BIN)/syncdpo compare-rules

evidence: $(READY)  ## Compare methods on families of clips; hours; goes on where it was stopped
	$(BIN)/syncdpo compare --result benchmarks/results/evidence.json

base: $(READY)  ## Train the embedded default's base anew
	$(BIN)/python -m syncdpo.demo.base

# Two workers, two threads; files in order, or the few but long tests of Triton's interpreter
# come last, all on one worker.
test: $(READY)  ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(READY)  ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(READY)  ## Run the benchmarks
	$(BIN)/python -m pytest benchmarks/

sass: $(READY)  ## Compile all kernels without a GPU, read their machine code
	$(BIN)/python benchmarks/sass.py

wheel:  ## Build a wheel in dist/, try it in a bare environment, away from the checkout
	$(PYTHON) -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist .
	$(PYTHON) tools/check_wheel.py dist

gpu-check:  ## All that only a GPU can show, with the Python at hand; offline; STAGES=1,2,3
	@$(PYTHON) -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || { \
		echo "gpu-check: $(PYTHON) has no torch that sees a GPU; PYTHON=… names another one" >&2; \
		exit 2; }
	$(PYTHON) -m pip install --no-build-isolation --no-deps .
	$(PYTHON) benchmarks/gpu_check.py $(if $(STAGES),--stages $(STAGES))

clean:  ## Remove what was built and run, not the environment
	rm -rf build dist runs
