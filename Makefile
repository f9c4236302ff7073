# make demo     the whole road on a corpus made on the spot     STORE=s3 | s3://bucket/folder   MEDIA=~/folder
# make test     the tests, but for those that take minutes each
# make test-long    these: whole jobs that are killed, stopped, preempted, scaled
# make check    format, lint, types, import directions
# make setup    the environment that the others use, in .venv

PYTHON ?= python3.11
VENV ?= .venv
# A machine without GPU saves 4 GB with PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
STORE ?= local
MEDIA ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready

SPEC := $(if $(MEDIA),jobs/folder.yaml,jobs/demo.yaml)
SET := $(if $(MEDIA),--set 'vars.media=$(abspath $(MEDIA))')
ifneq ($(STORE),local)
SET += --set vars.store=$(if $(filter s3,$(STORE)),s3://rzen-demo,$(STORE))
endif

.PHONY: setup demo test test-long check

setup: $(READY)

$(READY): pyproject.toml requirements.lock
	@command -v $(PYTHON) > /dev/null || { echo "error: $(PYTHON) not found; install Python 3.11, or name it: make $(MAKECMDGOALS) PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c requirements.lock -e '.[dev]'
	@touch $@

demo: setup
	$(if $(filter s3,$(STORE)),$(BIN)/python -m jobs.runtime.local_s3) $(BIN)/rzen run $(SPEC) $(SET)

test: setup
	$(BIN)/python -m pytest -m "not long"

test-long: setup
	$(BIN)/python -m pytest -m long

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
