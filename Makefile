# Every target sets itself up: on a fresh clone it first creates $(VENV) and installs the pinned versions.
# Settings:  PYTHON=python3.12  VENV=.venv  WORKERS=2  TABLE=division_memory  DRY=1  PUBLISH=1  MODEL=resnet50  METHOD=division  BATCH=256  ARGS="..."
# of gpu-battery:    SECONDS=540  PROFILE=full  OUT=DIR  DRY=1        of import-results:    FILE=lease.tar.gz
# of lease-pack and lease-rehearsal:    IMAGES=cifar10.tar.xz  LEASE_PYTHON=.venv-oldest/bin/python
# of wheelhouse:     WHEELS_PYTHON=3.12  WHEELHOUSE=DIR  WHEELS="..."

PYTHON ?= python3
VENV   ?= .venv
TABLE  ?=
DRY    ?=
MODEL  ?= resnet50
METHOD ?= division
BATCH  ?= 256
ARGS   ?=
OLDEST_PYTHON ?= python3.12

# Not read from the environment, where such names are common.
PUBLISH =
SECONDS = 540
PROFILE = full
OUT     =
FILE    =
FORM    = full
IMAGES  =
LEASE_PYTHON = .venv-oldest/bin/python
WORKERS = 2

# What a GPU node without a network may lack beside PyTorch, torchvision, timm and what these come with; setuptools builds actpress there.
WHEELS ?= hydra-core omegaconf antlr4-python3-runtime hypothesis pytest-timeout pytest-xdist execnet setuptools tabulate
WHEELS_PYTHON ?= 3.12
WHEELHOUSE ?= wheelhouse
WHEELS_FOR := --python-version $(WHEELS_PYTHON) --implementation cp $(foreach tag,1 2014 _2_17 _2_27 _2_28 _2_31 _2_34,--platform manylinux$(tag)_x86_64)

BIN   := $(VENV)/bin
RUN   := $(BIN)/python
STAMP := $(VENV)/.actpress-installed
PYTEST := $(RUN) -m pytest
PARALLEL := -n $(WORKERS) --dist worksteal

# $(call switch,DRY,TEXT): TEXT if DRY is on. $(call quoted,TEXT): TEXT quoted as one word of the shell.
switch = $(if $(filter-out 1 true yes 0 false no,$($(1))),$(error $(1)=$($(1)), allowed: 1, true, yes, 0, false, no))$(if $(filter 1 true yes,$($(1))),$(2))
quoted = '$(subst ','\'',$(1))'
DRY_OVERRIDE := $(call switch,DRY,dry=true)
DRY_OPTION := $(call switch,DRY,--dry)
PUBLISH_OVERRIDE := $(call switch,PUBLISH,publish=true)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install install-offline wheelhouse test test-all test-gpu test-oldest lint format train reproduce-table tables report check-pages audit compile-kernels bench-kernels gpu-battery import-results lease-pack lease-rehearsal clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | while IFS="$$(printf '\t')" read -r target text; do printf '  %-16s %s\n' "$$target" "$$text"; done

install: $(STAMP) ## create the virtual environment and install the pinned versions

define CHECK_PYTHON
@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] < (3, 13) else "actpress needs Python 3.11 or 3.12, but $(PYTHON) is %d.%d; name another with PYTHON=python3.11" % sys.version_info[:2])'
endef

$(STAMP): pyproject.toml constraints.txt
	$(CHECK_PYTHON)
	@echo "installing the pinned versions into $(VENV): PyTorch with its CUDA libraries, 6.2 GiB once unpacked."
	@echo "pip downloads and unpacks without a word, for two minutes or more; this happens once."
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@start=$$(date +%s); $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,text]' \
		&& echo "installed in $$(($$(date +%s) - start)) s"
	@touch $@

# The environment sees the packages of $(PYTHON), also where that is a virtual environment itself, which venv alone would look past.
install-offline: ## the same on a node without a network, from wheelhouse/ and the packages that PYTHON has
	$(CHECK_PYTHON)
	@test -d $(WHEELHOUSE) || { echo "error: no folder $(WHEELHOUSE); make wheelhouse makes it where there is a network" >&2; exit 2; }
	$(PYTHON) -m venv --without-pip --system-site-packages $(VENV)
	@$(PYTHON) -c 'import sys; print(*(path for path in sys.path if path.endswith(("site-packages", "dist-packages"))), sep="\n")' \
		> "$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/host.pth"
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-index --find-links $(WHEELHOUSE) $(WHEELS)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-index --find-links $(WHEELHOUSE) --no-deps -e .
	@$(RUN) -m pip --disable-pip-version-check check | grep '^actpress' || true
	@touch $(STAMP)

wheelhouse: $(STAMP) ## fill wheelhouse/ with the wheels install-offline needs: WHEELS_PYTHON=3.12 WHEELS="..."
	@mkdir -p $(WHEELHOUSE)
	$(RUN) -m pip wheel --quiet --disable-pip-version-check --no-deps -c constraints.txt -w $(WHEELHOUSE) antlr4-python3-runtime # published as source only
	$(RUN) -m pip download --quiet --disable-pip-version-check --only-binary=:all: $(WHEELS_FOR) --find-links $(WHEELHOUSE) -c constraints.txt -d $(WHEELHOUSE) $(WHEELS)
	@du -ah $(WHEELHOUSE)

test: $(STAMP) ## run the quick tests: four minutes on two cores, WORKERS=2 at a time (0: in this process, for a debugger)
	$(PYTEST) $(PARALLEL) $(ARGS)

test-all: $(STAMP) ## run all tests but those that need a GPU: what CI runs
	$(PYTEST) $(PARALLEL) -m 'not gpu' $(ARGS)

test-gpu: $(STAMP) ## run the tests that need a CUDA device
	TRITON_INTERPRET=0 $(PYTEST) -m gpu $(ARGS)

test-oldest: ## run tests with the oldest supported versions, in .venv-oldest: FORM=short (two minutes), full (recorded)
	@$(OLDEST_PYTHON) scripts/dev/oldest.py $(call quoted,$(FORM))

lint: $(STAMP) ## check style and formatting (changes nothing)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## fix what the linter can fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

train: $(STAMP) ## train one model: make train ARGS="model=resnet20 data=digits method=division"
	$(RUN) scripts/train.py $(ARGS)

reproduce-table: $(STAMP) ## measure and print a published table: TABLE=name, DRY=1 shows the plan; no TABLE: what takes minutes on a laptop
	@$(RUN) scripts/reproduce_table.py $(foreach name,$(TABLE),$(call quoted,$(name))) $(DRY_OVERRIDE) $(PUBLISH_OVERRIDE)

tables: $(STAMP) ## reproduce every table of configs/tables
	@$(RUN) scripts/reproduce_table.py $(basename $(notdir $(sort $(wildcard configs/tables/*.yaml)))) $(DRY_OVERRIDE)

report: $(STAMP) ## make all pages of results/ from the records: tables, and everything on one page that works offline, report.html
	$(RUN) scripts/report.py

check-pages: $(STAMP) ## check that the pages of results/ fit the records and that no table is stale (changes nothing)
	$(RUN) scripts/report.py --check
	$(RUN) scripts/dev/oldest.py render --check

audit: $(STAMP) ## show what each layer keeps for backward: MODEL=resnet50 METHOD=division BATCH=256
	$(RUN) scripts/audit.py $(call quoted,model=$(MODEL)) $(call quoted,method=$(METHOD)) $(call quoted,batch=$(BATCH)) $(ARGS)

compile-kernels: $(STAMP) ## compile every Triton kernel for sm_80 and sm_90, without a GPU: registers, spills, shared memory
	$(RUN) scripts/dev/compile_kernels.py $(ARGS)

bench-kernels: $(STAMP) ## time every kernel beside PyTorch: ARGS="--cases relu --profile tiny"
	$(RUN) scripts/bench_kernels.py $(ARGS)

gpu-battery: $(STAMP) ## all that needs a GPU, SECONDS=540 of it; the same command resumes: DRY=1, OUT=DIR
	$(RUN) scripts/gpu_battery.py --seconds $(call quoted,$(SECONDS)) --profile $(call quoted,$(PROFILE)) $(if $(OUT),--out $(call quoted,$(OUT))) $(DRY_OPTION) $(ARGS)

import-results: $(STAMP) ## add the archive of a battery to results/: FILE=lease.tar.gz
	$(RUN) scripts/import_results.py $(if $(FILE),$(call quoted,$(FILE))) $(ARGS)

lease-pack: $(STAMP) ## make .lease/, what a machine that is lent for minutes needs: compiled kernels, wheels, IMAGES=cifar10.tar.xz
	PYTHON=$(RUN) LEASE_PYTHON=$(LEASE_PYTHON) bash scripts/dev/pack_lease.sh $(if $(IMAGES),$(call quoted,$(IMAGES)))

lease-rehearsal: $(STAMP) ## the commands of both calls of the lease on a CPU, in an empty folder, until their archive is imported
	PYTHON=$(LEASE_PYTHON) bash scripts/dev/rehearse_lease.sh

clean: ## delete caches and build leftovers; keeps the environment, data/, outputs/ and results/
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find src kernels scripts tests -type d -name __pycache__ -prune -exec rm -rf {} +
