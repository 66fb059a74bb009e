# `make demo` and `make test` do all their set-up on a machine that has Python and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint types unit slow docs bench stress clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,plot,bench]'
	touch $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/streammerge demo --force

test: lint types unit

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tests.readme --check

types: $(INSTALLED)
	$(BIN)/mypy

unit: $(INSTALLED)
	$(BIN)/python -m pytest -n auto -m "not slow and not cuda and not peers"

slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

docs: $(INSTALLED)
	$(BIN)/python -m tests.readme

# Every case and every peer in full size, 60 GB of disk in ./bench: two and a half hours.
# `make bench ARGS=--quick` tries it out.
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks run $(ARGS)

# Killed, starved, lied to and fuzzed, in full: writes tests/RELIABILITY.md.
stress: $(INSTALLED)
	$(BIN)/python -m tests.stress $(ARGS)

clean:
	rm -rf $(VENV) demo bench build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
