# What to do with a clone: `make quickstart`, `make test`, `make check`. Each installs first where needed.
# Needs Python 3.11 or 3.12, make and a C++ compiler; another interpreter: `make install PYTHON=/path/to/python3.12`.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12)
VENV ?= .venv
EXTRAS ?= dev,preprocess,census,vcc
PYTEST_ARGS ?=
# Files of tests that run at a time, of which two keep two cores busy no more than three quarters: tests with several
# processes wait for each other much of their time.
TEST_WORKERS ?= 3
# Whether `make test` takes those marked slow too, as CI does: each keeps a core busy for ten seconds or more, and shows
# of whole programs, launchers or hosts what others show of their parts.
SLOW ?= 0

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BENCHMARKS := $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py))

SELECTED = $(or $(PYTEST_ARGS),$(if $(filter-out 0,$(SLOW)),,-m "not slow"))

# One thread a process: the tests start several processes, and timings on shared cores are steadier.
SINGLE_THREADED := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help install quickstart test check format bench clean
.DEFAULT_GOAL := help

help:  ## List the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 20

install: $(INSTALLED)  ## Install into .venv, every version pinned by constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no python3.11 or python3.12 on PATH; say make install PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); the first time this downloads some gigabytes"
# DS_BUILD_OPS=0: DeepSpeed compiles the few operators it needs when it first needs them.
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

quickstart: $(INSTALLED)  ## Convert the sample data, train two phases, and compare with baselines
	$(BIN)/python -m trainer.quickstart

# Tests start hundreds of processes, and without bytecode each would compile the project anew, and each worker the tests.
test: export PYTHONDONTWRITEBYTECODE :=
# A worker that crashes ends the tests and is named: with another in its place, pytest-xdist 3.8 may wait for ever.
test: $(INSTALLED)  ## Run the tests (SLOW=1: the slow ones too; PYTEST_ARGS='-k resume -x' and the like: what they select)
	$(SINGLE_THREADED) $(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder \
		--max-worker-restart 0 $(SELECTED)

check: $(INSTALLED)  ## Lint, check the formatting and the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(INSTALLED)  ## Format the code and fix what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)  ## Run every script in benchmarks/
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(SINGLE_THREADED) $(BIN)/python $$script; done

clean:  ## Remove the environment and everything generated, but no run and no checkpoint
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find trainer models data tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
