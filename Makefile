# Every target uses .venv, made by `make setup` under the tested set of versions in constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Isolated builds read their own variable from pip 25.3 on, the general one before.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-gpu check format bench bench-train bench-peers docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.installed  ## make .venv with everything for development

# torch first and alone, so that the native build below finds it and no second copy is fetched.
$(VENV)/.installed: pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "setuptools>=77" wheel ninja cmake "torch==2.13.0"
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	@touch $@

quickstart: setup  ## train a small model on this machine and show what it learnt
	$(BIN)/fasttrain run configs/quickstart.yaml

# One process a core with one thread each: two threads a process would fight over the cores. Who is
# done takes tests from the other, which a test of minutes holds up.
test: setup  ## the tests (CPU)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal

test-gpu: setup  ## the tests that need a CUDA device
	$(BIN)/pytest -m gpu

check: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## time the kernels and write bench/results
	$(BIN)/pytest bench/

bench-train: setup  ## tokens/s and memory of a packed run against transformers' Trainer
	$(BIN)/python bench/train/run.py

bench-peers: setup  ## the same against peers that need an environment of their own
	bash bench/train/peers.sh

docs: setup  ## write the generated pages and build the site
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict

clean:  ## remove what was built, keep what was trained
	rm -rf build dist site *.egg-info kernels/*.egg-info $(VENV)/.installed
