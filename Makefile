PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
TEST_WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup setup-browser run test test-slow test-hf fuzz check lint types layers docs demo bench clean

help: ## list these targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Grafthub needs Python 3.11 or newer; say which with PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(VENV)/.ready ## make .venv with everything in it

run: setup ## start the hub on http://127.0.0.1:8470 with a demo catalogue
	$(BIN)/graft serve

setup-browser: ## install Chromium for the browser tests where this user may
	@command -v chromium >/dev/null \
	  || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	       && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-noto-core >/dev/null; } \
	  || { echo "The browser tests need Debian's package 'chromium' (apt-get install chromium)." >&2; exit 1; }

test: setup setup-browser lint types layers ## lint, types, layers and the whole test suite
	$(BIN)/pytest -n $(TEST_WORKERS) --dist worksteal -m 'not slow'

test-slow: setup setup-browser ## what takes minutes: retraining, full-size models
	$(BIN)/pytest -m slow

FUZZ_S ?= 600
fuzz: setup ## look for bytes and requests that break a parser or the hub (FUZZ_S seconds each)
	$(BIN)/python -m tests.fuzz headers .fuzz/headers -max_total_time=$(FUZZ_S) -max_len=4000
	$(BIN)/python -m tests.fuzz commits .fuzz/commits -max_total_time=$(FUZZ_S) -max_len=4000
	FUZZ_EXAMPLES=200 $(BIN)/pytest --timeout 0 tests/hub/test_openapi.py

test-hf: setup ## huggingface_hub's own tests: make test-hf SUITE=checkout-of-a-release [WRITE=1]
	$(BIN)/python -m tests.upstream.suite $(SUITE) $(if $(WRITE),--write)

lint: setup ## ruff: style and common mistakes
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup ## mypy --strict
	$(BIN)/mypy

layers: setup ## the import contracts of docs/architecture.md
	$(BIN)/lint-imports

docs: setup ## write the tables that are generated from code
	$(BIN)/python -m cli.reference --write

demo: setup ## train the demo catalogue anew (about twenty minutes)
	$(BIN)/python -m train.demo

bench: setup ## print the ratios the README promises
	$(BIN)/python benchmarks/bake.py
	$(BIN)/python benchmarks/combine.py
	$(BIN)/python benchmarks/download.py
	$(BIN)/python benchmarks/hub.py

clean: ## remove what setup and tests made
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache *.egg-info
