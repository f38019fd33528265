# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` need Linux, make and Python 3.11 or newer; they fetch the rest.

PYTHON  ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
             $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV    ?= .venv
RECORD  := docs/results/support.json
SMOLLM2 := models/SmolLM2-135M-Instruct
GEMMA   := models/gemma-3-270m
QWEN    := models/Qwen2.5-Coder-0.5B-Instruct
QWEN_L  := models/Qwen2.5-Coder-1.5B-Instruct
MODEL   ?= $(SMOLLM2)
ARGS    ?=
# How many processes run the tests; each may hold a vLLM server, some 8 GB.
JOBS    ?= 2
SHARED  := -n $(JOBS) --no-loadscope-reorder
# Of `make test-vllm`: which vLLM, and which tests; it has an environment of its own.
VLLM    ?= 0.28.0
TESTS   ?= tests/compat tests/guards tests/tools/test_vllm_names.py tests/engine/test_exactness.py
APART   := $(VENV)-vllm-$(VLLM)
# Of `make soak`: how long, and which script; empty for the default.
SECONDS ?=
SEED    ?=
# Where PyTorch's CPU build is asked for when pip does not find it otherwise.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
export TORCH_INDEX

BIN   := $(VENV)/bin
READY := $(VENV)/.kvcomm-ready

# The default model is made when it is asked for; any other MODEL is the user's own.
MODEL_FILES := $(if $(filter $(SMOLLM2),$(MODEL)),$(SMOLLM2)/config.json)

.DEFAULT_GOAL := help
.PHONY: help setup model model-gemma model-qwen model-qwen-1.5b
.PHONY: demo test test-fast test-vllm support gpu soak soak-models lint format bench clean

help: ## this list
	@echo 'make TARGET [MODEL=folder-or-huggingface-id] [ARGS="..."] [VENV=.venv] [PYTHON=python3.11]'
	@sed -n 's/^\([a-z0-9.-]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 20
	@echo 'To use an environment that has vLLM already: VENV=path/to/it'

setup: $(READY) ## environment in .venv: vLLM (CPU or CUDA), this package, tools

$(READY): setup.py tools/setup_env.py tools/repair_env.py
	@test -n "$(PYTHON)" || { echo 'No Python 3.11 or newer found. Name one: make PYTHON=...'; exit 1; }
	$(PYTHON) tools/setup_env.py $(VENV)
	@touch $@

model: $(SMOLLM2)/config.json ## SmolLM2-135M-Instruct in models/ (270 MB)

$(SMOLLM2)/config.json: | $(READY)
	$(BIN)/python tools/make_model.py smollm2 $(SMOLLM2)

model-gemma: $(GEMMA)/config.json ## Gemma 3 270M in models/ (570 MB; optional, Gemma Terms of Use)

$(GEMMA)/config.json: | $(READY)
	$(BIN)/python tools/make_model.py gemma3 $(GEMMA)

model-qwen: $(QWEN)/config.json ## Qwen2.5-Coder-0.5B-Instruct in models/ (1 GB; Apache-2.0)

$(QWEN)/config.json: | $(READY)
	$(BIN)/python tools/make_model.py qwen-0.5b $(QWEN)

model-qwen-1.5b: $(QWEN_L)/config.json ## the same of 1.5B (3.1 GB, 6 while made; Apache-2.0)

$(QWEN_L)/config.json: | $(READY)
	$(BIN)/python tools/make_model.py qwen-1.5b $(QWEN_L)

demo: $(READY) $(MODEL_FILES) ## five agents on one question, with kvcomm and as plain vLLM; ARGS=--full
	$(BIN)/kvcomm demo --model $(MODEL) $(ARGS)

test: $(READY) $(SMOLLM2)/config.json ## the whole test suite
	$(BIN)/python -m pytest $(SHARED) --durations=10 $(ARGS)

test-fast: $(READY) ## what needs no engine and no server
	$(BIN)/python -m pytest $(SHARED) -m 'not engine and not http and not slow and not soak' --durations=10 $(ARGS)

test-vllm: $(APART)/.kvcomm-ready ## what any vLLM must do, on another one; VLLM=0.28.0 TESTS=tests
	$(APART)/bin/python -m pytest $(SHARED) -m 'not slow and not soak' --durations=10 $(TESTS) $(ARGS)

$(APART)/.kvcomm-ready: setup.py tools/setup_env.py tools/repair_env.py
	$(PYTHON) tools/setup_env.py $(APART) $(VLLM)
	@touch $@

support: $(READY) ## runs what docs/support.md tells of, and makes it; ARGS='-k NAME' for some of it
	-$(BIN)/python -m pytest $(SHARED) -m support --record-support $(RECORD) $(ARGS)
	$(BIN)/python tools/support_table.py

gpu: $(READY) $(SMOLLM2)/config.json ## proves the CUDA path on this machine's GPU, in 30 minutes
	$(BIN)/python tools/prove_gpu.py --model $(SMOLLM2) $(ARGS)

soak: $(READY) $(SMOLLM2)/config.json ## ten minutes of everything at once; SECONDS=600 SEED=number
	SOAK_SECONDS=$(SECONDS) SOAK_SEED=$(SEED) $(BIN)/python -m pytest tests/soak -m soak $(ARGS)

soak-models: $(READY) ## a thousand mixed requests to a tiny model of each kind
	$(BIN)/python -m pytest tests/engine/test_mixed_soak.py -m soak -n0 $(ARGS)

lint: $(READY) ## ruff (rules, format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## put imports and layout in order
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .

bench: $(READY) $(MODEL_FILES) ## workloads on plain vLLM and on kvcomm; ARGS=--full for all of them
	$(BIN)/kvcomm bench --model $(MODEL) $(ARGS)

clean: ## remove caches and build products; the environment and the models stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find kvcomm_vllm kernels evaluation tests tools benchmarks -name __pycache__ -prune -exec rm -rf {} +
