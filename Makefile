# fsdpq: `make train` finetunes a real model, `make test` proves the numbers, `make help` lists all.

PYTHON ?= python3
VENV ?= .venv
RECIPE ?= recipes/quickstart.yaml
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# A file stays in one worker, with its fixtures and ranks; slow folders come first by name.
ON_EVERY_CORE := -n auto --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help train test test-recipes test-tools test-browser test-multinode test-slurm chaos chaos-sweeps check lint types imports schema schema-check plans format bench bench-chunks bench-optimizer bench-disk bench-stream bench-packing bench-merge bench-gpu bench-proof clean

help:  ## Show what each target does
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

train: $(VENV)/.installed  ## Finetune SmolLM2-135M with QLoRA on every GPU, or on two CPU processes
	$(BIN)/fsdpq train $(RECIPE)

test: $(VENV)/.installed-dev  ## Run all tests, a file of them on every core
	$(BIN)/python -m pytest $(ON_EVERY_CORE)

test-recipes: $(VENV)/.installed-dev  ## Smoke every recipe of the library (a sample runs in `make test`)
	FSDPQ_SMOKE=all $(BIN)/python -m pytest tests/recipes

test-tools:  ## Install Debian's packages that the next three need (as root; part of CI)
	scripts/install_test_tools.sh

test-browser: $(VENV)/.installed-dev  ## Look at all pages in a real browser (Chromium)
	$(BIN)/python -m pytest tests/browser

test-multinode: $(VENV)/.installed-dev  ## Train on two hosts made of network namespaces (root, iproute2)
	$(BIN)/python -m pytest tests/multinode

test-slurm: $(VENV)/.installed-dev  ## Train through a one-node Slurm cluster that the tests start (slurm-wlm, munge)
	$(BIN)/python -m pytest tests/slurm

chaos: $(VENV)/.installed-dev  ## Kill runs 100 times and compare what comes out (an hour; CHAOS="--kills 20")
	PYTHONPATH=scripts $(BIN)/python -m chaos --out runs/chaos $(CHAOS)

chaos-sweeps: $(VENV)/.installed-dev  ## Kill a sweep of 12 trials 6 times and compare its table (CHAOS="--kills 20")
	PYTHONPATH=scripts $(BIN)/python -m chaos.sweeps --out runs/chaos-sweeps $(CHAOS)

check: lint types imports schema-check test  ## Run everything that CI runs

lint: $(VENV)/.installed-dev  ## Check style, docstrings and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell fsdpq tests recipes docs scripts README.md CHANGELOG.md
	$(BIN)/python scripts/check_sizes.py

types: $(VENV)/.installed-dev  ## Check types (strict in the torch-free half)
	$(BIN)/pyright --pythonpath $(BIN)/python

imports: $(VENV)/.installed-dev  ## Check that the layers and the doors to heavy libraries hold
	$(BIN)/lint-imports

schema: $(VENV)/.installed-dev  ## Write the JSON Schema and the generated reference pages
	$(BIN)/fsdpq schema > schemas/recipe.schema.json
	$(BIN)/fsdpq schema --sweep > schemas/sweep.schema.json
	$(BIN)/python scripts/make_reference.py

plans: $(VENV)/.installed-dev  ## Write what shipped recipes take by plan, and the outputs in its guide
	$(BIN)/python scripts/make_plans.py
	$(BIN)/python scripts/make_scaling.py

schema-check: $(VENV)/.installed-dev  ## Check that the committed schema is what the models say
	$(BIN)/fsdpq schema | diff - schemas/recipe.schema.json
	$(BIN)/fsdpq schema --sweep | diff - schemas/sweep.schema.json

format: $(VENV)/.installed-dev  ## Format the code
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev  ## Measure this machine beside transformers (BENCH="step --quick"; all take 20 minutes)
	$(BIN)/fsdpq bench --compare transformers $(BENCH)

bench-chunks: $(VENV)/.installed  ## Count what a step gathers when layers run in chunks (minutes)
	$(BIN)/python scripts/bench_chunks.py

bench-optimizer: $(VENV)/.installed  ## Measure optimizer steps on the host beside a memory copy
	$(BIN)/python scripts/bench_optimizer.py

bench-packing: $(VENV)/.installed  ## Measure how full packed sequences get, and their attention (minutes)
	$(BIN)/python scripts/bench_packing.py

bench-stream: $(VENV)/.installed  ## Measure the memory of streamed rows (minutes)
	$(BIN)/python scripts/bench_stream.py $(BENCH)

bench-disk: $(VENV)/.installed  ## Measure training from disk beside host memory (minutes)
	$(BIN)/python scripts/bench_disk.py

bench-merge: $(VENV)/.installed  ## Measure merging a made-up 1.1B model beside PEFT (10 minutes)
	$(BIN)/python scripts/bench_merge.py

bench-proof: $(VENV)/.installed  ## 70B on one GPU of 24 GiB, ranks of several: plan beside measurement (15 minutes)
	$(BIN)/python -m scripts.gpu --plan proof --seconds 870 --out runs/bench-proof
	$(BIN)/python -m scripts.gpu.side_by_side runs/bench-proof/rows.jsonl

bench-gpu: $(VENV)/.installed  ## Check and measure one GPU: 7B and 70B beside transformers (15 minutes)
	$(BIN)/python -m scripts.gpu --out runs/bench-gpu

clean:  ## Remove the virtual environment and caches (not your runs)
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing fsdpq into $(VENV) (torch is large: this takes a few minutes the first time)"
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing fsdpq and its test tools into $(VENV)"
	$(PIP) -e '.[dev]'
	# Without what it names for other tasks: transformers imports scikit-learn where it finds it.
	$(PIP) --no-deps lm_eval
	@touch $@ $(VENV)/.installed
