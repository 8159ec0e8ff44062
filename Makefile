# Every target builds its own environment in .venv from nothing but Python, and is instant the second time.
# PYTHON       the interpreter to build from (3.11 or newer)
# TORCH_INDEX  optional package index to take torch from (a CPU or a particular CUDA build)
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
STAMP := $(VENV)/.installed
TORCH_PIN := $(shell grep '^torch==' constraints.txt)
# One thread per process: tests and the demo start several ranks on few cores.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all bench lint format clean install help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# torch first and pinned: a range resolved together with other packages may pull gigabytes of another build.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; say which: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH_PIN)"
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[s3,dev]"
	@touch $@

install: $(STAMP)  ## build the environment only

demo: $(STAMP)  ## train, kill, restore on other numbers of ranks, prove it
	$(PY) -m examples.demo

test: $(STAMP)  ## the tests, in their short forms
	$(PY) -m pytest -m "not long"

test-all: $(STAMP)  ## the tests in their long forms too (sweeps, many seeds)
	$(PY) -m pytest

bench: $(STAMP)  ## what a save costs, beside the machine's limits and torch's own
	$(PY) -m benchmarks.checkpoint

lint: $(STAMP)  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## let ruff format and fix what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment and every cache
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
