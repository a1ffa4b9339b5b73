# Everything a checkout needs. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Written after the last successful installation; older than its sources means install again.
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install quickstart test lint typecheck pytest coverage format clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

install: $(STAMP) ## create .venv and install everything at the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 10) <= v < (3, 14) else f"Python 3.10 to 3.13 is needed, this is {v[0]}.{v[1]}: make install PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[dev,bench,lora,sweeps,serve]"
	@touch $@

quickstart: install ## language model, reward model, DPO, PPO and RLOO on made-up data, and a table
	$(BIN)/helpsteer2 quickstart

test: lint typecheck pytest ## all checks: ruff, mypy, every test that needs no GPU

lint: install ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: install ## mypy, strict
	$(BIN)/mypy

pytest: install ## the tests, slow ones included, on two processes
	$(BIN)/python -m pytest -n 2 -m "not gpu"

coverage: install ## the tests with a report of the lines they never reach
	$(BIN)/python -m pytest -n 2 -m "not gpu" --cov --cov-report=term

format: install ## rewrite the sources the way `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what was built, keep .venv and outputs
	rm -rf build dist .cache .hypothesis .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
