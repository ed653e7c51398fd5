# `make demo` and `make test` need Python 3.11 or newer with pip, and nothing else: each sets up .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/tour
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache

.PHONY: help setup demo test lint format clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

# Where Python has no ensurepip (Debian without python3-venv), pip itself installs pip into the environment.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install -q pip; }

$(VENV)/.ready: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q --upgrade "pip>=25.1"
	$(BIN)/python -m pip install -q -e ".[all]" --group dev
	@touch $@

setup: $(VENV)/.ready  ## the environment, in .venv

demo: setup  ## the tour on real data; writes out/tour/report.html
	$(BIN)/python scripts/tour.py --out $(OUT)

test: setup  ## the whole test suite
	$(BIN)/python -m pytest

lint: setup  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: setup  ## ruff's fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## the environment, caches and outputs
	rm -rf $(VENV) .jax_cache .pytest_cache .ruff_cache out
