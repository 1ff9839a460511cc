# `make` lists the targets. Every target makes the environment it needs; TORCH=cpu|cuda|system chooses PyTorch's build.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH ?= auto
STUDY ?= demo
TESTS ?=

BIN := .venv/bin
STAMP := .venv/.ok
STEPH := $(BIN)/steph
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
CPU_INDEX := https://download.pytorch.org/whl/cpu
HAS_TORCH = $(PYTHON) -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)' 2>/dev/null

# Another choice of TORCH than the environment was made with makes it anew.
MADE_WITH := $(shell cat $(STAMP) 2>/dev/null)
ifneq ($(filter-out auto $(MADE_WITH),$(TORCH)),)
.PHONY: $(STAMP)
endif

.PHONY: help env test lint format book lab bench torture clean distclean

help: ## this list
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/\1|\2/p' Makefile | while IFS='|' read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done
	@echo '  TORCH=cpu|cuda|system chooses the build of PyTorch, PYTHON=python3.12 the interpreter (3.11 or newer),'
	@echo '  STUDY=tcga the study of `make book`.'

env: $(STAMP) ## the environment, .venv (the other targets make it when it is missing)

test: $(STAMP) ## the tests (one file: make test TESTS=tests/test_survival.py)
	OMP_NUM_THREADS=1 MPLBACKEND=agg $(BIN)/python -m pytest -n 2 --dist loadgroup $(TESTS)

lint: $(STAMP) ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## put the code into the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

book: $(STAMP) ## run the study that is not yet run, execute the notebooks, build the book
	$(STEPH) book --study $(STUDY)

lab: $(STAMP) ## the notebooks in JupyterLab
	$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks

bench: $(STAMP) ## speed, as ratios to a plain implementation and to the machine
	$(BIN)/python -m benchmarks

torture: $(STAMP) ## kills, full disks, dead kernels: what a study must survive (ten minutes)
	MPLBACKEND=agg $(BIN)/python -m tests.torture

clean: ## delete the book, results on made-up cohorts and caches; results of other studies stay
	rm -rf build/book build/demo build/demo_twin build/tiny build/tiny_twin .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean ## also delete the environment
	rm -rf .venv *.egg-info

# PyTorch comes first, through pip: a resolver that has to choose by itself takes the CUDA build. `uv` then leaves an
# installed one alone. `system` lends the environment the torch that PYTHON already has, through a .pth file; only pip
# sees a package lent that way, so pip installs the rest. Bytecode is compiled here, once and on all cores: else every
# process compiles what it imports, where Python may not write it (PYTHONDONTWRITEBYTECODE).
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 4))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); steph needs Python 3.11.4 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	@torch=$(TORCH); made=$$(cat $@ 2>/dev/null || true); \
	if [ "$$torch" = auto ]; then \
	  torch=$${made:-cpu}; \
	  if [ -z "$$made" ] && $(HAS_TORCH); then torch=system; fi; \
	fi; \
	case "$$torch" in cpu|cuda|system) ;; *) echo "TORCH=$$torch: expected cpu, cuda or system" >&2; exit 1;; esac; \
	if [ "$$torch" = system ] && ! $(HAS_TORCH); then \
	  echo "TORCH=system: $(PYTHON) has no torch 2.11 or newer. Give its interpreter: make PYTHON=/path/to/python TORCH=system" >&2; exit 1; fi; \
	if [ "$$torch" = cpu ] && command -v nvidia-smi >/dev/null; then \
	  echo "An NVIDIA GPU is here; this installs PyTorch for the CPU. For the GPU: make env TORCH=cuda"; fi; \
	echo "making .venv (torch: $$torch)"; \
	rm -f $@; \
	if [ -n "$$made" ] && [ "$$made" != "$$torch" ] || ! $(BIN)/python -c '' 2>/dev/null; then \
	  $(PYTHON) -m venv --clear .venv; fi; \
	case "$$torch" in \
	system) \
	  lent=$$($(PYTHON) -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent.parent)' 2>/dev/null); \
	  echo "$$lent" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lent_torch.pth"; \
	  grep -v '^torch==' constraints.txt > .venv/constraints.txt; \
	  $(PIP) install -q -c .venv/constraints.txt -e '.[book,dev]';; \
	*) \
	  index=; if [ "$$torch" = cpu ]; then index='--retries 0 --extra-index-url $(CPU_INDEX)'; fi; \
	  $(PIP) install -q $$index 'torch==$(TORCH_VERSION)'; \
	  $(PIP) install -q -c constraints.txt uv; \
	  $(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[book,dev]';; \
	esac; \
	echo "$$torch" > $@
