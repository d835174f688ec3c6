# Every target makes its own environment in $(VENV) the first time; stamp files make
# the second call quick. PYTHON chooses the interpreter: make test PYTHON=python3.13

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BUILD := build
CLIENTS_VENV := $(BUILD)/clients

# The layers whose tests need no command line, no checkpoints and little time: run a
# second time on the newest Python and JAX.
CORE_TESTS := tests/ir tests/rules tests/propagate tests/plan tests/models tests/lower

# One process per core; what is slowest is named at the end.
PARALLEL := -n auto --dist load --durations=15

PLAN := $(BUILD)/llama3-8b.plan.json

.DEFAULT_GOAL := help
# Two installs into one environment must not overlap.
.NOTPARALLEL:
.DELETE_ON_ERROR:

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) \
	  | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

# --- environments -------------------------------------------------------------

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is missing or older than Python 3.11, which autoshard needs;" \
	    "name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.user: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -qq --editable .
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -qq --editable '.[test]'
	@touch $@ $(VENV)/.user

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -qq --editable '.[dev]'
	@touch $@ $(VENV)/.test $(VENV)/.user

# Other people's packages pin what they like; theirs is an environment of its own.
$(CLIENTS_VENV)/.clients: pyproject.toml | $(BUILD)
	$(MAKE) $(CLIENTS_VENV)/bin/python VENV=$(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/python -m pip install -qq --editable '.[test,clients]'
	@touch $@

$(VENV)/.notebooks: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -qq --editable '.[notebooks]'
	@touch $@ $(VENV)/.user

$(BUILD):
	@mkdir -p $@

.PHONY: setup
setup: $(VENV)/.dev $(VENV)/.notebooks ## install everything a contributor needs

# --- what a user tries first ----------------------------------------------------

.PHONY: demo
demo: $(VENV)/.user | $(BUILD) ## plan Llama 3 8B for 64 H100s, then train a tiny one
	$(BIN)/autoshard search llama3-8b --cluster h100:64 --batch 128 --seq 8192 \
	  -o $(PLAN)
	$(BIN)/autoshard explain $(PLAN)
	$(BIN)/autoshard run llama3-tiny --cluster cpu:8 --batch 16 --seq 128 --steps 80

# --- tests ----------------------------------------------------------------------

.PHONY: test
test: $(VENV)/.test ## the tests and doctests that need no accelerator
	$(BIN)/pytest $(PARALLEL)

.PHONY: core
core: $(VENV)/.test ## the tests of the core layers only
	$(BIN)/pytest $(PARALLEL) -m 'not (slow or gpu or tpu or one_jax)' $(CORE_TESTS)

.PHONY: clients
clients: $(CLIENTS_VENV)/.clients ## plan and run programs that other people wrote
	$(CLIENTS_VENV)/bin/pytest $(PARALLEL) tests/clients

.PHONY: full
full: check $(VENV)/.test ## all checks, tests, slow ones too, notebooks, demo
	$(BIN)/pytest -m 'not gpu and not tpu'
	$(BIN)/python benchmarks/matrix_equality.py --into $(BUILD)
	$(MAKE) notebooks demo

.PHONY: notebooks
notebooks: $(VENV)/.notebooks | $(BUILD) ## run every notebook into build/notebooks
	$(BIN)/python .ci/run_notebooks.py notebooks $(BUILD)/notebooks

.PHONY: bench
bench: $(VENV)/.user ## run every benchmarks/bench_*.py
	@test -n "$(wildcard benchmarks/bench_*.py)" || { \
	  echo "no benchmark to run: benchmarks/bench_*.py matches no file" >&2; exit 1; }
	set -e; for script in benchmarks/bench_*.py; do \
	  echo "== $$script"; $(BIN)/python $$script; done

# --- checks ---------------------------------------------------------------------

.PHONY: check
check: format lint spelling layers types ## format, lint, spelling, layers and types

.PHONY: format
format: $(VENV)/.dev
	$(BIN)/ruff format --check

.PHONY: lint
lint: $(VENV)/.dev
	$(BIN)/ruff check

.PHONY: spelling
spelling: $(VENV)/.dev
	$(BIN)/codespell

.PHONY: layers
layers: $(VENV)/.dev
	$(BIN)/lint-imports

.PHONY: types
types: $(VENV)/.dev
	$(BIN)/basedpyright --pythonpath $(BIN)/python

.PHONY: wheel
wheel: $(VENV)/.dev ## build the source archive and the wheel into build/dist
	rm -rf $(BUILD)/dist
	$(BIN)/pyproject-build --outdir $(BUILD)/dist
	$(BIN)/python .ci/check_wheel.py $(BUILD)/dist/*.whl

.PHONY: clean
clean: ## remove the environment and everything that was built
	rm -rf $(VENV) $(BUILD)
