# `make demo` and `make test` do all their set-up on a machine that has Python and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint types unit slow docs bench stress clean

help: ## list what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' Makefile

KERNELS := $(wildcard streammerge/compute/kernels/*.[chi]*)

$(INSTALLED): pyproject.toml setup.py constraints.txt $(KERNELS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,plot,bench]'
	touch $(INSTALLED)

demo: $(INSTALLED) ## set up, then make three models in miniature, compare, merge and check them
	$(BIN)/streammerge demo --force

test: lint types unit ## all that CI checks: lint, types, unit

lint: $(INSTALLED) ## ruff's checks and format, and whether the docs' generated parts are current
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python docs/make.py --check

types: $(INSTALLED) ## mypy
	$(BIN)/mypy

unit: $(INSTALLED) ## the tests, but for slow ones and those that need a GPU or other tools
	$(BIN)/python -m pytest -n auto -m "not slow and not cuda and not peers and not clients"

slow: $(INSTALLED) ## the slow tests
	$(BIN)/python -m pytest -m slow

docs: $(INSTALLED) ## make the docs' generated parts anew
	$(BIN)/python docs/make.py

# Every case and every peer in full size; `make bench ARGS=--quick` tries it out.
bench: $(INSTALLED) ## measure against other tools: 60 GB of disk in ./bench, two and a half hours
	$(BIN)/python -m benchmarks run $(ARGS)

stress: $(INSTALLED) ## killed, starved, lied to and fuzzed, in full: writes tests/RELIABILITY.md
	$(BIN)/python -m tests.stress $(ARGS)

clean: ## remove the environment, and all that was made
	rm -rf $(VENV) demo bench build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
