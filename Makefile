# Two commands do everything: `make demo` runs the main job on embedded data, `make test` passes the tests.
# Each makes .venv from pinned versions (constraints.txt) if there is none; all it needs is Python >= 3.11,
# make and a package index.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
TORCH  := $(shell sed -n 's/^torch==//p' constraints.txt)
# One thread per test process: two on a busy machine run small batched matmuls up to 70 times slower.
WORKERS ?= 2

.PHONY: demo test lint types check clean

demo: $(READY)
	$(BIN)/einlinear compare

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

check: lint types test

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "einlinear needs Python 3.11 or newer; found $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
# Without an NVIDIA driver, torch's own index has a build that is a tenth of the size; where it cannot be
# reached, the default index serves.
	@command -v nvidia-smi > /dev/null || \
	  $(BIN)/pip install --quiet --retries 0 --timeout 10 torch==$(TORCH) --index-url https://download.pytorch.org/whl/cpu || true
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[lab,hf,export,test,dev]"
	@touch $@

clean:
	rm -rf $(VENV)
