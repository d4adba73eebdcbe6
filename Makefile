# Two commands on a fresh machine with Python 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
TORCH  := $(shell grep '^torch==' constraints.txt)
export OMP_NUM_THREADS := 1

.PHONY: help setup demo demo-cifar10 recipes-digits recipes-cifar10 test test-slow check lint \
        types docs bench clean

help:            ## what there is
	@grep -E '^[a-z0-9-]+: *.*##' Makefile | sed 's/:.*##/:/'

setup: $(VENV)/ready ## a virtual environment with exactly the pinned versions

# torch by its exact pin before anything that depends on it: a range would pull CUDA packages.
$(VENV)/ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TORCH)
	$(PIP) install --quiet --constraint constraints.txt --requirement requirements-dev.txt
	$(PIP) install --quiet --constraint constraints.txt --no-deps --editable .
	touch $@

demo: setup      ## train, forget, audit on the embedded digits; opens nothing, writes demo/
	$(BIN)/efface demo --force --out demo

demo-cifar10: setup ## the same on 20,000 CIFAR-10 images, half an hour on two cores
	$(BIN)/efface demo --task cifar10 --out demo-cifar10

# The papers' experiments; a stopped run goes on. Models are kept in recipes/cache until `make clean`.
RUN = $(BIN)/efface bench $(1) --size $(2) --cache recipes/cache --out recipes/$(1)-$(2) --force

recipes-digits: setup ## the papers' experiments on the digits, an hour and a half on two cores
	$(call RUN,jia2023-classwise,digits)
	$(call RUN,jia2023-random10,digits)
	$(call RUN,jia2023-trojan,digits)
	$(call RUN,jia2023-transfer,digits)
	$(call RUN,pruners,digits)
	$(call RUN,unprune,digits)
	$(call RUN,unprune-ablation,digits)
	$(call RUN,unprune-mia-stability,digits)
	$(call RUN,gogineni2024,digits)
	$(call RUN,partial-ablation,digits)
	$(call RUN,dfmu2026,digits)
	$(call RUN,dfmu-ablation,digits)

recipes-cifar10: setup ## the same on 10,000 CIFAR-10 images, five hours on two cores
	$(call RUN,jia2023-classwise,cifar10-small)
	$(call RUN,jia2023-random10,cifar10-small)
	$(call RUN,jia2023-trojan,cifar10-small)
	$(call RUN,jia2023-transfer,cifar10-small)
	$(call RUN,unprune,cifar10-small)
	$(call RUN,gogineni2024,cifar10-small)
	$(call RUN,dfmu2026,cifar10-small)

test: setup      ## all tests but the slow ones
	$(BIN)/python -m pytest

test-slow: setup ## statistical and crash tests
	$(BIN)/python -m pytest -m slow

lint: setup      ## ruff: lint, docstrings, format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup     ## mypy, strict
	$(BIN)/mypy

docs: setup      ## documentation that lies fails
	$(BIN)/python -m pytest tests/test_docs.py

check: lint types test ## what CI runs

bench: setup     ## speed and memory, as ratios; writes benchmarks/results/
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) demo demo-cifar10 recipes build dist .mypy_cache .ruff_cache
