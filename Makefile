# The developer's commands. `make` alone lists them; `make PYTHON=python3.12 …` chooses what .venv is made with.

CANDIDATES := $(or $(PYTHON),python3 python3.13 python3.12 python3.11)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Tests wait more than they work: one process more than the processors of a small machine.
PROCESSES := 3
SUITES := openai_client langchain pydantic_ai instructor mcp_sampling llm_cli node_clients
WAYS := default transport-aiohttp front-off two-workers

export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help run test test-all clients chaos bench soak lint format docs clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: .venv/.package ## serve this folder on localhost, installing harperpy into .venv first
	@exec $(BIN)/harperpy dev .

test: lint ## what a change must pass: lint, types, tests with branch coverage
	$(BIN)/pytest --numprocesses=$(PROCESSES) --cov -m "not slow"

test-all: lint ## the same with the slow tests, which repeat the others on the wheel
	$(BIN)/pytest --numprocesses=$(PROCESSES) --cov

clients: .venv/.dev ## the suites of real clients, in each way to run a gateway; WAYS=two-workers for one of them
	@for way in $(WAYS); do \
	    echo "Real clients, $$way"; \
	    HARPERPY_CLIENTS=$$way $(BIN)/pytest --numprocesses=$(PROCESSES) $(SUITES:%=tests/test_%.py) || exit; \
	done

chaos: .venv/.dev ## the ledger against all that can go wrong, for some minutes
	$(BIN)/pytest tests/test_chaos.py -m slow

bench: .venv/.bench ## measure it next to its peers; ARGS="--only chat --rounds 3" for some of it
	@exec $(BIN)/python bench/run.py $(ARGS)

soak: .venv/.bench ## ten minutes of everything at once, and whether its memory stays
	@exec $(BIN)/python bench/soak.py $(ARGS)

lint: .venv/.dev ## style and types of the source
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: .venv/.dev ## mend the style as far as a machine can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: .venv/.dev ## write the pages that are made from the code
	$(BIN)/python docs/openai_compatibility.py
	$(BIN)/python docs/reference.py

clean: ## remove everything made here, .venv too; a server's data stays
	rm -rf .venv .node build dist .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment is made again when its interpreter is gone (these files then say nothing), and what is installed
# in it is brought up to date when pyproject.toml changes.
_ := $(shell test -x $(BIN)/python || rm -f .venv/.package .venv/.dev .venv/.bench)

$(BIN)/python:
	@found=; reason="harperpy needs Python 3.11 or newer, and this machine has none by the name of $(CANDIDATES)"; \
	for python in $(CANDIDATES); do \
	    "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	    lacking=$$("$$python" -c 'import importlib.util as u; print(*[m for m in ("venv", "ensurepip", "ssl", "sqlite3") if not u.find_spec(m)])'); \
	    [ -n "$$lacking" ] || { found=$$python; break; }; \
	    reason="$$python has no module $$lacking, which harperpy's environment needs"; \
	done; \
	[ -n "$$found" ] || { echo "$$reason (on Debian or Ubuntu: apt install python3 python3-venv)." >&2; exit 1; }; \
	"$$found" -m venv --clear .venv

.venv/.package: pyproject.toml $(BIN)/python
	@echo "Installing harperpy into .venv"
	@$(PIP) --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null
	@$(PIP) install --quiet --quiet 'pip>=25.1' --editable '.[local]'
	@touch $@

.venv/.dev: .venv/.package
	@command -v git >/dev/null || { echo "The tests need git, and this machine has none." >&2; exit 1; }
	@echo "Installing what the tests need into .venv"
	@$(PIP) install --quiet --quiet --group dev
	@$(BIN)/python -c 'import xllamacpp' 2>/dev/null || { \
	    echo "The tests' model server cannot load: its system library libgomp.so.1 is missing (on Debian or Ubuntu: apt install libgomp1)." >&2; exit 1; }
	@touch $@

.venv/.bench: .venv/.package
	@echo "Installing what is compared with into .venv"
	@$(PIP) install --quiet --quiet --group bench
	@touch $@
