# MorphServe on Triton. `make` lists the targets; each of them sets itself up on first use.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
EXTRAS ?= server,embedded,openai-server,plots,dev
# PYTHON: an interpreter 3.10 to 3.12 (default: the first fit one of python3.11, 3.12, 3.10, python3).
# PIP_INDEX: a package index to use instead of pip's own.
# TORCH_INDEX: a further index for PyTorch, such as that of its CPU wheels; see CONTRIBUTING.md.
PIP_INDEX ?=
TORCH_INDEX ?=
# ARGS: more arguments for demo, serve and the tests, as in make test-unit ARGS="-k arena -x".
ARGS ?=

BIN := $(VENV)/bin
comma := ,
STAMP := $(VENV)/.setup-done-$(subst $(comma),+,$(EXTRAS))

.PHONY: help setup demo serve test test-unit test-triton test-deploy test-gpu chaos fuzz soak audit lint format clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install everything the CPU set-up needs
	@echo "setup: $(VENV) is up to date"

$(STAMP): export VENV := $(VENV)
$(STAMP): export EXTRAS := $(EXTRAS)
$(STAMP): export PYTHON := $(PYTHON)
$(STAMP): export PIP_INDEX := $(PIP_INDEX)
$(STAMP): export TORCH_INDEX := $(TORCH_INDEX)
$(STAMP): pyproject.toml constraints/cpu.txt
	@tools/setup_venv.sh
	@touch $@

demo: $(STAMP) ## a real Triton, a small model, a burst of requests and a picture of the morphing
	@$(BIN)/morph demo $(ARGS)

serve: $(STAMP) ## serve a model; MORPH_MODEL, MORPH_MODE, MORPH_MEMORY_BUDGET_GIB, MORPH_{HTTP,GRPC,METRICS}_PORT
	@$(BIN)/morph serve $(ARGS)

test: $(STAMP) ## the whole CPU suite, real tritonserver included
	@$(BIN)/pytest tests/unit tests/triton tests/deploy $(ARGS)

test-unit: $(STAMP) ## the fast tests, no server
	@$(BIN)/pytest tests/unit $(ARGS)

test-triton: $(STAMP) ## the tests against a real tritonserver
	@$(BIN)/pytest tests/triton $(ARGS)

test-deploy: $(STAMP) ## compose, dashboards and Kubernetes objects; what is not installed here is skipped with a reason
	@$(BIN)/pytest tests/deploy -rs $(ARGS)

test-gpu: $(STAMP) ## the tests that need an NVIDIA GPU (tests/gpu/MANIFEST.md); elsewhere they are skipped
	@$(BIN)/pytest tests/gpu $(ARGS)

chaos: $(STAMP) ## a storm over a real server; ARGS="--seed 7 --seconds 600 --levels free"
	@$(BIN)/python -m tests.chaos $(ARGS)

fuzz: $(STAMP) ## hostile requests on the wire; ARGS="--seed 7 --requests 100000"
	@$(BIN)/python -m tests.chaos.fuzz $(ARGS)

soak: $(STAMP) ## an hour under load after a warm-up, and whether anything grows; ARGS="--seed 7 --minutes 90"
	@$(BIN)/python -m tests.chaos.soak $(ARGS)

audit: $(STAMP) ## known vulnerabilities of what is installed, by pip-audit; asks a service on the network
	@$(BIN)/python tools/audit.py

lint: $(STAMP) ## ruff, its formatter in check mode, and mypy --strict
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: $(STAMP) ## let ruff format the code and mend what it safely can
	@$(BIN)/ruff check --fix-only --quiet
	@$(BIN)/ruff format

clean: ## remove caches and build products, keep .venv
	@rm -rf build dist demo-report *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv too
	@rm -rf $(VENV)
