# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
export DS_ACCELERATOR ?= cpu
export RAY_USAGE_STATS_ENABLED ?= 0
export MLFLOW_DISABLE_TELEMETRY ?= true
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup demo demo-pictures test test-cluster test-library test-all lint api lock clean
help:            ## this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: .venv/.ready ## the environment in .venv, from constraints.txt
.venv/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup      ## scenes, ingest, embed with two LLMs, train, sample, evaluate: about 14 minutes on 2 cores
	$(BIN)/lidit demo

demo-pictures: setup ## the same on real pictures: 4,000 emoji, a codec of their own; needs npm
	$(BIN)/lidit demo-pictures

test: setup lint ## everything but the slow tests, in two halves side by side
	$(MAKE) --no-print-directory -j2 $(if $(filter output-sync,$(.FEATURES)),--output-sync=line) test-cluster test-library

test-cluster: setup
	$(BIN)/python -m pytest -m 'cluster and not slow'

test-library: setup
	$(BIN)/python -m pytest -m 'not cluster and not slow'

test-all: setup lint ## the slow tests too
	$(BIN)/python -m pytest -m ''

lint: setup      ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

api: setup       ## write docs/api.md and docs/recipe-reference.md anew
	$(BIN)/python docs/generate_api.py
	$(BIN)/python docs/generate_recipe_reference.py

lock: setup      ## write constraints.txt anew from the installed environment
	$(BIN)/python -m pip freeze --exclude-editable | sed -e 's/^\(torch==[^+]*\)+.*/\1/' > constraints.txt

clean:           ## the environment and the demo's files
	rm -rf .venv demo demo-pictures
