# Development commands of rzen. `make` lists them. Each one makes the environment in .venv first.

PYTHON ?= python3.11
VENV ?= .venv
# A machine without GPU saves 4 GB with PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
# Not empty: install by the hashes of infra/image/requirements.hashes, on Linux on x86-64. torch and this package have none.
HASHES ?=
PIP_AUDIT := pip-audit==2.10.1
STORE ?= local
MEDIA ?=
MODEL ?=
TABLE ?=
CORPUS ?= demo
# Processes that run the tests: one with Ray's tests, the others with the rest. TEST_ARGS goes to pytest.
WORKERS ?= logical
TEST_ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Python compiles a module when it is first imported. Compiling all modules of all packages takes a minute of CPU.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

# What `make demo` runs. Each spec has an output folder of its own below runs/.
DEMO := $(if $(TABLE),table,$(if $(MEDIA),$(if $(MODEL),photos,folder),$(CORPUS)))
# A name as a YAML text in quotes of the shell, whatever characters it has.
quoted = $(subst ','\'',"$(subst ",\",$(subst \,\\,$(1)))")
SET := $(if $(TABLE),--set 'vars.table=$(call quoted,$(TABLE))') $(if $(MEDIA),--set 'vars.media=$(call quoted,$(MEDIA))') $(if $(MODEL),--set 'vars.model=$(call quoted,$(MODEL))')
ifneq ($(MODEL),)
$(if $(MEDIA),,$(error MODEL searches a folder: name it with MEDIA))
endif
ifneq ($(TABLE),)
$(if $(MEDIA),$(error TABLE and MEDIA are two demos: name one of them))
endif
ifneq ($(STORE),local)
SET += --set vars.store=$(if $(filter s3,$(STORE)),s3://rzen-$(DEMO),$(STORE))
endif

PYTEST = pytest -n $(WORKERS) --maxprocesses 8 --dist loadscope --no-loadscope-reorder --durations=20

.PHONY: help setup demo test test-long coverage check audit docs

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12

setup: $(READY) ## make the environment

$(READY): pyproject.toml requirements.lock
	@command -v $(PYTHON) > /dev/null || { echo "error: $(PYTHON) not found; install Python 3.11, or name it: make $(MAKECMDGOALS) PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(if $(HASHES),$(INSTALL) --require-hashes --no-deps -r infra/image/requirements.hashes)
	$(INSTALL) $(PIP_ARGS) -c requirements.lock -e '.[dev]'
	@touch $@

demo: setup ## run the whole pipeline on a synthetic corpus; CORPUS=emoji, TABLE=file, MEDIA=folder [MODEL=model], STORE=s3 or s3://bucket/folder
	$(if $(filter s3,$(STORE)),$(BIN)/python -m jobs.runtime.local_s3) $(BIN)/rzen run jobs/$(DEMO).yaml $(SET)

test: setup ## run the tests, except those that take minutes each
	$(BIN)/python -m $(PYTEST) -m "not long" $(TEST_ARGS)

test-long: setup ## run the tests that take minutes each: whole jobs that are killed, preempted, scaled
	$(BIN)/python -m $(PYTEST) -m long $(TEST_ARGS)

coverage: setup ## run `make test` with line coverage
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m $(PYTEST) -m "not long" $(TEST_ARGS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

check: setup ## format, lint, types, import directions, Kubernetes manifests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.infra.manifests

audit: ## look up the packages of requirements.lock in PyPI's list of vulnerabilities; needs a network
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_AUDIT)
	build/audit/bin/pip-audit --requirement requirements.lock --no-deps --disable-pip --strict

docs: setup ## write API pages from the docstrings into build/docs
	$(BIN)/python -W ignore -m pdoc --output-directory build/docs pipelines rzen jobs
