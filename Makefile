# Everything here works on a fresh clone: the first target that needs it makes a virtual environment in .venv,
# and downloads and build products stay in .cache. Nothing outside this folder is changed.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' && echo $$p && break; done)
BIN := .venv/bin
# For two cores: what tests of the fleet wait for takes none.
WORKERS ?= 3
PACKAGES := kedge compiler rpc protos device_agent deploy
export KEDGE_CACHE_DIR ?= $(CURDIR)/.cache/kedge
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test compat faults lint lint-types lint-floors lint-protos protos bench model wheel clean

help: ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## (.*)/  make \1\t\2/' | expand -t 20

demo: .venv/.installed ## The main job: compile, dispatch, run, check and time a trained model on x86 and ARM
	@$(BIN)/kedge demo

# With bytecode, also where PYTHONDONTWRITEBYTECODE is set: each worker and hundreds of processes read the same modules.
test: export PYTHONDONTWRITEBYTECODE =
test: .venv/.dev lint ## Lint, type check, then all tests
	@$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

compat: .venv/bin/python ## The fleet's tests with the packages that users have, the newest and the oldest
	@$(BIN)/python tools/compat.py

FAULTS ?=

faults: .venv/.dev ## Three quarters of an hour of faults done to a fleet of real processes (FAULTS="--fault-hours 8 -k agent")
	@$(BIN)/pytest -m faults tests/faults --fault-report .cache/faults.jsonl $(FAULTS)

lint: .venv/.dev ## Ruff, mypy strict, the floors, the generated modules
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory -j2 --output-sync lint-types lint-floors lint-protos

lint-types:
	@$(BIN)/mypy

lint-floors:
	@cd .paths && ../$(BIN)/lint-imports --config ../pyproject.toml --no-cache

lint-protos:
	@$(BIN)/python tools/gen_protos.py --check

protos: .venv/.dev ## Generate the kedge.v1 modules again
	@$(BIN)/python tools/gen_protos.py

bench: .venv/.bench ## The benchmarks of benchmarks/, one after the other
	@$(BIN)/python benchmarks/walking.py
	@$(BIN)/python benchmarks/fleet.py
	@$(BIN)/python benchmarks/cpu_matmul.py
	@$(BIN)/python benchmarks/cpu_models.py

model: .venv/.train ## Train the digits model of kedge/data again
	@$(BIN)/python examples/train_digits.py

wheel: .venv/.dev ## Build the wheel into dist/
	@$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean: ## Remove the virtual environment, caches and build products
	rm -rf .venv .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/bin/python:
	@[ -n "$(PYTHON)" ] || { echo "kedge needs Python 3.11 or newer; none was found. Install it, or name it:" \
		"make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "Making a virtual environment in .venv with $$($(PYTHON) --version) …"
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "Python's venv module is missing: on Debian and Ubuntu" \
		"'apt-get install python3-venv', then run this again." >&2; exit 1; }

.venv/.installed: pyproject.toml | .venv/bin/python
	@echo "Installing kedge and what it needs into .venv (about a minute, once) …"
	@$(BIN)/pip install --quiet --editable .
	@$(BIN)/python -m compileall -q $(PACKAGES)  # once, also where PYTHONDONTWRITEBYTECODE is set
	@touch $@

.venv/.dev .venv/.bench .venv/.train: .venv/.%: pyproject.toml | .venv/.installed
	@echo "Installing the '$*' extra into .venv …"
	@$(BIN)/pip install --quiet --editable '.[$*]'
	@touch $@
