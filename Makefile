# Every target sets up what it needs: Python 3.11+, make and a package index are enough.
#   make PYTHON=python3.12 demo      choose the interpreter (read when .venv is created)
#   make PYTEST_ARGS="-k lease" test pass arguments to pytest
#   make PYTEST_WORKERS=0 test       run the tests in one process

PYTHON ?= python3
PYTEST_ARGS ?=
PYTEST_WORKERS ?= auto
BENCH_ARGS ?=
SERVE_ARGS ?= --models models/zoo
SOAK_SECONDS ?= 7200

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# A worker for each core. Each starts servers of its own, hence a bound; tests of one file share
# fixtures, and worksteal keeps them together.
PYTEST := $(BIN)/python -m pytest --numprocesses $(PYTEST_WORKERS) --maxprocesses 8 --dist worksteal

# Stamps: what runs the product, and on top of it what tests and checks it.
RUN := $(VENV)/.conveyor-run
DEV := $(VENV)/.conveyor-dev

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-unit check compose-check format serve bench bench-cuda gpu-check proto
.PHONY: soak docs wheel clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(RUN) ## start a server, stream real input through real models, show what comes out
	$(BIN)/python -m bench.demo

test: $(DEV) ## run the whole test suite
	$(PYTEST) $(PYTEST_ARGS)

test-unit: $(DEV) ## run the tests that start no server
	$(PYTEST) tests/unit tests/simulation tests/fidelity $(PYTEST_ARGS)

check: $(DEV) ## lint, format, types, import contracts, contract, generated code, image, rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python scripts/proto.py lint
	$(BIN)/python scripts/proto.py check
	$(BIN)/python scripts/compose.py lint
	$(BIN)/python scripts/dashboards.py check
	$(BIN)/python scripts/rules.py check
	$(BIN)/python scripts/envoy.py check
	bash -n scripts/gpu_check.sh

compose-check: $(DEV) ## build and start the containers, stream through them (needs a Docker engine)
	$(BIN)/python scripts/compose.py check

format: $(DEV) ## rewrite the sources in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

serve: $(RUN) ## serve the shipped models in the foreground
	$(BIN)/conveyor-server serve $(SERVE_ARGS)

bench: $(DEV) ## measure, each line beside its comparator
	$(BIN)/python -m bench $(BENCH_ARGS)

bench-cuda: $(DEV) ## measure the engine on a CUDA device, each line beside cuDNN
	$(BIN)/python -m bench --only cuda $(BENCH_ARGS)

gpu-check: $(DEV) ## on a machine with a CUDA device: tests/gpu and bench-cuda, output to one file
	PYTHON=$(BIN)/python scripts/gpu_check.sh

soak: $(DEV) ## fuzz, then hours of clients that connect, step and are killed: SOAK_SECONDS=7200
	$(PIP) --no-build-isolation --editable '.[fuzz]'
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak $(SOAK_SECONDS)

proto: $(DEV) ## regenerate the Python code of the contract
	$(BIN)/python scripts/proto.py generate

docs: $(DEV) ## build the documentation as a site in site/, warnings being errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheel: $(DEV) ## build dist/conveyor-*.whl
	$(BIN)/python -m build --wheel --no-isolation

clean: ## remove everything make created, the environment included
	rm -rf $(VENV) dist site .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# The backend comes from constraints.txt too, hence no build isolation.
$(RUN): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) hatchling
	$(PIP) --no-build-isolation --editable '.[server,zoo]'
	@touch $@

$(DEV): $(RUN)
	$(PIP) --no-build-isolation --editable '.[dev]'
	$(PIP) --no-deps --upgrade --target $(VENV)/contract-tools grpcio-tools
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("Conveyor needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv --clear $(VENV)
