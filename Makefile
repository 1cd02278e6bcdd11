# Every target sets itself up: on a fresh clone it first creates $(VENV) and installs the pinned versions.
# Settings:  PYTHON=python3.12  VENV=.venv  TABLE=division_memory  DRY=1  MODEL=resnet50  METHOD=division  BATCH=256  ARGS="..."

PYTHON ?= python3
VENV   ?= .venv
TABLE  ?=
DRY    ?=
MODEL  ?= resnet50
METHOD ?= division
BATCH  ?= 256
ARGS   ?=

BIN   := $(VENV)/bin
RUN   := $(BIN)/python
STAMP := $(VENV)/.actpress-installed
PYTEST := $(RUN) -m pytest
DRY_OVERRIDE := $(if $(filter 1 true yes,$(DRY)),dry=true)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install test test-all test-gpu lint format train reproduce-table tables audit clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | while IFS="$$(printf '\t')" read -r target text; do printf '  %-16s %s\n' "$$target" "$$text"; done

install: $(STAMP) ## create the virtual environment and install the pinned versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] < (3, 13) else "actpress needs Python 3.11 or 3.12, but $(PYTHON) is %d.%d; name another with PYTHON=python3.11" % sys.version_info[:2])'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,text]'
	@touch $@

test: $(STAMP) ## run the quick tests
	$(PYTEST) $(ARGS)

test-all: $(STAMP) ## run the slow tests too (all but those that need a GPU)
	$(PYTEST) -m 'not gpu' $(ARGS)

test-gpu: $(STAMP) ## run the tests that need a CUDA device
	TRITON_INTERPRET=0 $(PYTEST) -m gpu $(ARGS)

lint: $(STAMP) ## check style and formatting (changes nothing)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## fix what the linter can fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

train: $(STAMP) ## train one model: make train ARGS="model=resnet20 data=digits method=division"
	$(RUN) scripts/train.py $(ARGS)

reproduce-table: $(STAMP) ## measure and render a published table: TABLE=name, DRY=1 shows the plan; no TABLE: what this machine can do
	$(RUN) scripts/reproduce_table.py $(TABLE) $(DRY_OVERRIDE)

tables: $(STAMP) ## reproduce every table of configs/tables
	$(RUN) scripts/reproduce_table.py $(basename $(notdir $(sort $(wildcard configs/tables/*.yaml)))) $(DRY_OVERRIDE)

audit: $(STAMP) ## show what each layer keeps for backward: MODEL=resnet50 METHOD=division BATCH=256
	$(RUN) scripts/audit.py model=$(MODEL) method=$(METHOD) batch=$(BATCH) $(ARGS)

clean: ## delete caches and build leftovers; keeps the environment, data/, outputs/ and results/
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find src kernels scripts tests -type d -name __pycache__ -prune -exec rm -rf {} +
