# Every target sets up what it needs: .venv holds fastdiff (editable) and its tools, and is rebuilt when its inputs change.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help sample test test-all lint format examples wheel-check clean
.DEFAULT_GOAL := help

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

sample: $(READY)  ## draw 80 images with the built-in model into out/samples.png
	@mkdir -p out
	$(BIN)/fastdiff sample fashion-mnist --per-class 8 --eta 1 --guidance 3 --out out/samples.png

test: $(READY)  ## run the tests that take minutes at most
	$(BIN)/python -m pytest -m 'not slow'

test-all: $(READY)  ## run every test
	$(BIN)/python -m pytest

lint: $(READY)  ## check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY)  ## fix style and formatting where a tool can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

examples: $(READY)  ## run every script of examples/ in an empty folder
	tests/examples_check.sh

wheel-check: $(READY)  ## build the wheel, install it elsewhere and use it there
	tests/wheel_check.sh

clean:  ## remove build products and caches (out/, runs/ and .venv stay)
	rm -rf build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find fastdiff tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
