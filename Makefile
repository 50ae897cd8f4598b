# The first commands of a fresh clone: `make demo` and `make test` do all set-up themselves.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
PIP := $(VENV)/bin/python -m pip
DEMO := demo-out
BUDGET ?= ram=12MiB
NEW_TOKENS ?= 48

.PHONY: help demo test lint venv clean

help:
	@echo "make demo    install, then run a small real MoE checkpoint in less memory than its weights"
	@echo "make test    install, then run the tests; ARGS='-k name' passes pytest options"
	@echo "make lint    install, then ruff and mypy"
	@echo "make venv    install only, into $(VENV)"
	@echo "make clean   remove everything that the commands above made"
	@echo "PYTHON=/path/to/python3.12 names another Python than python3"

demo: $(STAMP)
	test -d $(DEMO)/checkpoint || $(VENV)/bin/dovetail demo $(DEMO)/checkpoint
	$(VENV)/bin/dovetail run $(DEMO)/checkpoint --prompts $(DEMO)/checkpoint/prompts.jsonl \
		--out $(DEMO)/out.jsonl --budget $(BUDGET) --max-new-tokens $(NEW_TOKENS)

# A worker holds torch and transformers: four are enough memory for what their number gives.
test: $(STAMP)
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 4 $(ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

venv: $(STAMP)

# setuptools comes first and builds without isolation, so that its version is pinned too.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
		echo "dovetail needs Python 3.11 or newer, but '$(PYTHON)' was not found:" \
			"install it, or name one with PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "dovetail needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1):" \
			"name a newer one with PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt setuptools
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[test,dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(DEMO) build dist src/dovetail.egg-info
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
