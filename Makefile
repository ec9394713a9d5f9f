# SPDX-License-Identifier: Apache-2.0
#
#   make demo    generate on the small model, dense beside sparse, and print what it gained and cost
#   make test    the whole test suite            make check   format, lint, types, the fast tests
#   make bench   kernel speed on this machine    make lint    format, lint, types
#   make test-oldest   the fast tests beside the oldest versions that pyproject.toml allows
#   make fidelity   what every method costs in quality on the small models (hours on a CPU)
#   make wheels  wheels for every platform, each with its native kernel, and the sdist, in dist
#   make docs    the documentation as a site, in outputs/site (index.html opens from the disk)
#   make floors  the folders of the package, their sizes, and what each imports
#   make clean   remove the environments
#
# Each makes its own environment in .venv where there is none; it needs Python >= 3.10 and make.
# Variables: PYTHON (which one), TORCH (which build on a machine without an NVIDIA GPU; a torch that
# is in .venv already is left alone), JOBS (test processes), PYTEST_ARGS, BENCH_ARGS, MODELS (small
# models of the fidelity table).

PYTHON ?= python3
TORCH ?= torch==2.13.0
SPARE ?= $(TORCH)
JOBS ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?=
MODELS ?= wan-tiny flux-tiny cogvideox-tiny pixart-tiny hunyuan-video-tiny

VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# What an installation depends on: a change to one of them installs, and so compiles, anew.
SOURCES := pyproject.toml dit_sparse/_version.py .ci/build_backend.py \
	$(wildcard dit_sparse/kernels/native/*.cpp dit_sparse/kernels/native/*.h \
		dit_sparse/kernels/native/*.json dit_sparse/kernels/native_build.py)
# A file's models and fixtures are built in one process; long files come first (tests/conftest.py).
SHARE := --dist loadfile --no-loadscope-reorder
CPU_INDEX := https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest check lint floors bench fidelity wheels docs clean
.DELETE_ON_ERROR:

help:
	@sed -n '3,16s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.use
	@$(BIN)/dit-sparse generate samples/wan-tiny "a red circle moving right" \
		--strategy wan-tiny.adaspa -o outputs/demo --compare-dense --overwrite --threads 1

test: $(VENV)/.dev
	@$(BIN)/python -m pytest -n $(JOBS) $(SHARE) $(PYTEST_ARGS)

# `+cpu` comes from PyTorch's own index only; without it pip takes $(TORCH), and says so.
test-oldest:
	@$(MAKE) --no-print-directory VENV=$(OLDEST) TORCH="torch==2.9.0+cpu" SPARE="$(TORCH)" \
		$(OLDEST)/.oldest
	@$(OLDEST)/bin/python -m pytest -n $(JOBS) $(SHARE) -m "not slow and not gpu" \
		$(PYTEST_ARGS)

lint: $(VENV)/.dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

floors: $(VENV)/.dev
	@$(BIN)/python -m tests.floors

check: lint
	@$(BIN)/python -m pytest -n $(JOBS) $(SHARE) -m "not slow and not gpu" $(PYTEST_ARGS)

bench: $(VENV)/.use
	@$(BIN)/dit-sparse bench $(BENCH_ARGS)

# Goes on where it was stopped; the clips stay in outputs/fidelity.
fidelity: $(VENV)/.dev
	@for model in $(MODELS); do \
		$(BIN)/python samples/fidelity/run.py samples/$$model -o outputs/fidelity || exit 1; \
		$(BIN)/python samples/atlas/run.py samples/$$model || exit 1; \
	done
	@$(BIN)/python samples/fidelity/page.py
	@$(BIN)/python samples/atlas/page.py

# Compiled by ziglang, from PyPI (about 100 MB): one compiler for every platform.
wheels: $(VENV)/.wheels
	@$(BIN)/python .ci/wheels.py

# Strict: a link that leads nowhere, or a page that is in no menu, is an error.
docs: $(VENV)/.docs
	@NO_MKDOCS_2_WARNING=1 HF_HUB_OFFLINE=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "outputs/site/index.html; with its search: $(BIN)/python -m http.server -d outputs/site"

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info dit_sparse/kernels/native/lib

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "dit_sparse needs Python >= 3.10, '$(PYTHON)' is $$($(PYTHON) -V 2>&1 || true);" \
			"name another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || { \
		echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@touch $@

# Where there is no NVIDIA GPU, PyPI's torch for Linux would bring gigabytes of CUDA for nothing.
# `+cpu` sorts above the plain version, so pip takes it from wherever it is offered. One short try:
# an index that cannot be reached costs seconds, then pip takes what its own configuration has.
$(VENV)/.torch: $(VENV)/.made
	@if $(BIN)/python -c 'import torch' 2>/dev/null; then :; \
	elif nvidia-smi -L >/dev/null 2>&1 || [ -e /dev/nvidia0 ]; then :; \
	else \
		echo "Installing $(TORCH), the CPU build: there is no NVIDIA GPU here (about 200 MB)"; \
		$(PIP) install --no-deps --timeout 5 --retries 1 --extra-index-url $(CPU_INDEX) "$(TORCH)" \
			|| $(PIP) install --no-deps "$(SPARE)"; \
	fi
	@touch $@

$(VENV)/.use: $(SOURCES) | $(VENV)/.torch
	@echo "Installing dit_sparse into $(VENV): the first time takes a minute or two"
	@$(PIP) install -e .
	@touch $@

$(VENV)/.dev: $(SOURCES) | $(VENV)/.torch
	@echo "Installing dit_sparse with its tests into $(VENV): the first time takes a minute or two"
	@$(PIP) install -e ".[dev,quality,distill,docs]"
	@touch $@ $(VENV)/.use

$(VENV)/.oldest: $(SOURCES) .ci/oldest.py | $(VENV)/.torch
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info > (3, 13))' || { \
		echo "the oldest numpy has no build for $$($(BIN)/python -V); remove $(VENV) and name" \
			"another: make test-oldest PYTHON=python3.10"; exit 1; }
	@echo "Installing dit_sparse with the oldest versions it allows into $(VENV)"
	@$(PIP) install --no-deps -e .
	@$(BIN)/python .ci/oldest.py > $(VENV)/oldest.txt
	@$(PIP) install -c $(VENV)/oldest.txt -e ".[dev,quality,distill]"
	@touch $@

$(VENV)/.docs: $(SOURCES) | $(VENV)/.torch
	@echo "Installing dit_sparse and what builds its site into $(VENV): it takes a minute or two"
	@$(PIP) install -e ".[docs]"
	@touch $@ $(VENV)/.use

$(VENV)/.wheels: $(SOURCES) | $(VENV)/.torch
	@echo "Installing dit_sparse and what builds its wheels into $(VENV): it takes a minute or two"
	@$(PIP) install -e ".[wheels]"
	@touch $@ $(VENV)/.use
