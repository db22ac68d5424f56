# Everything a developer or CI does with this repository. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
# The first interpreter that is new enough; make PYTHON=... overrides.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# The same, or the one of the environment once that is there.
ANY_PYTHON = $(or $(wildcard $(BIN)/python),$(PYTHON))
need-python = test -n "$(ANY_PYTHON)" || \
	{ echo "Python 3.11 or newer is needed: none of python3, python3.13, python3.12, python3.11 is." >&2; exit 1; }
# Where pip finds torch, e.g. PIP_TORCH_ARGS="--index-url ..." with PyTorch's index of CPU wheels on a machine without a
# GPU: the default Linux wheel brings CUDA along.
PIP_TORCH_ARGS ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
JOBS ?= 2
# What the protos are compared with.
BASE ?= $(shell git rev-parse --quiet --verify origin/main >/dev/null 2>&1 && echo origin/main || echo main)

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

# Taken ports are found before the install, which takes minutes; so this is no prerequisite of ours.
.PHONY: serve
serve: ## Serve the demo model and its adapters on this machine until Ctrl-C
	@$(need-python)
	@PYTHONPATH=services/common $(ANY_PYTHON) clients/python/loraplex_client/serve/ports.py $(SERVE_ARGS)
	@$(MAKE) --silent --no-print-directory $(VENV)/.demo-installed
	@exec $(BIN)/loraplex serve --demo $(SERVE_ARGS)

# Tests start services, commands and client libraries hundreds of times: what is compiled once is read from then on.
# Containers like to set the variable; empty is as if it were not set.
test test-clients: export PYTHONDONTWRITEBYTECODE =

.PHONY: test
test: $(VENV)/.dev-installed ## Run the tests that need no GPU
	@tests/tools/ensure-prometheus.sh
	@tests/tools/ensure-docker-registry.sh
	@tests/tools/ensure-json-schema-suite.sh
	@PYTHON=$(abspath $(BIN)/python) tests/tools/ensure-proxies.sh
	@tests/tools/ensure-chromium.sh
	@$(BIN)/pytest -n $(JOBS) --dist worksteal -m "not gpu" -q -ra --ignore=tests/clients $(PYTEST_ARGS)

# Client libraries pin what ours do not: they have an environment of their own, which the tests start them in.
CLIENTS_VENV ?= .venv-clients
# Where there is no npm, its client libraries are skipped.
CLIENTS_NPM := $(if $(shell command -v npm),tests/clients/npm/node_modules/.package-lock.json)
.PHONY: test-clients
test-clients: $(VENV)/.dev-installed install-clients ## Run client libraries of others against a stack
	@LORAPLEX_CLIENTS_VENV=$(abspath $(CLIENTS_VENV)) \
		$(BIN)/pytest -n $(JOBS) --dist worksteal -q -ra tests/clients $(PYTEST_ARGS)

.PHONY: install-clients
install-clients: $(CLIENTS_VENV)/.installed $(CLIENTS_NPM) ## Install what test-clients runs, and run nothing

.PHONY: test-gpu
test-gpu: $(VENV)/.dev-installed ## Run the tests that need an NVIDIA GPU
	@$(BIN)/pytest -m gpu -ra $(PYTEST_ARGS)

# The tests of the whole stack that say what users see; their engines compute in fp32 on either backend.
STACK_TESTS := $(addprefix tests/integration/test_,\
	golden.py end_to_end.py failures.py bad_input.py bad_adapters.py chaos.py)

.PHONY: test-gpu-stack
test-gpu-stack: $(VENV)/.dev-installed ## Run the end-to-end tests with engines on an NVIDIA GPU
	@LORAPLEX_TEST_BACKEND=cuda $(BIN)/pytest -ra $(STACK_TESTS) $(PYTEST_ARGS)

.PHONY: sanitize-gpu
sanitize-gpu: $(VENV)/.dev-installed ## Run small kernel cases under compute-sanitizer: memcheck and racecheck
	@PYTHON=$(BIN)/python tests/gpu/sanitize.sh

CXX_SOURCES = $(shell find kernels tests -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h')

.PHONY: fmt
fmt: $(VENV)/.dev-installed ## Format Python and CUDA, mend what lint can, regenerate generated files
	@$(BIN)/python proto/generate.py
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format --quiet .
	@$(BIN)/clang-format -i $(CXX_SOURCES)
	@$(BIN)/python benchmarks/index_results.py

.PHONY: check
check: $(VENV)/.dev-installed ## Format, lint, types, import contracts, protos: all that needs no running
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	@$(BIN)/mypy $(if $(wildcard .mypy_cache),,--num-workers $(JOBS)) # workers only cost where a cache spares the work
	@$(BIN)/lint-imports
	@$(BIN)/python proto/generate.py --check --lint --breaking $(BASE)
	@$(BIN)/python benchmarks/index_results.py --check
	@$(BIN)/python clients/python/generate_sync.py --check
	@$(BIN)/python deploy/lock.py --check

.PHONY: proto
proto: $(VENV)/.dev-installed ## Regenerate proto/gen from the protos
	@$(BIN)/python proto/generate.py

.PHONY: client
client: $(VENV)/.dev-installed ## Regenerate the blocking client from the asyncio one
	@$(BIN)/python clients/python/generate_sync.py

# What draws the diagrams comes from npm, once, where there is npm; the site asks no server for it.
.PHONY: docs
docs: $(VENV)/.dev-installed ## Build the site of the documents into build/site; what is broken in it fails
	@$(BIN)/python -m loraplex_site.mermaid
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

.PHONY: dist
dist: $(VENV)/.dev-installed ## Build wheel, source archive and bill of materials into dist/, and audit what they install
	@$(BIN)/python deploy/dist.py $(DIST_ARGS)

.PHONY: lock
lock: $(VENV)/.dev-installed ## Write the lock files that images are built from
	@$(BIN)/python deploy/lock.py

# Version and commit of the images are this checkout's. Compose passes them on as build arguments; without them it would
# build images that cannot say what they are.
.PHONY: images
images: $(VENV)/.dev-installed ## Build the images of compose.yaml, labelled with version and commit
	@version=$$($(BIN)/python -m hatchling version) && test -n "$$version" || \
		{ echo "The version is unknown: $(BIN)/python -m hatchling version gives none." >&2; exit 1; }; \
	commit=$$(git describe --always --dirty --abbrev=12 --exclude '*') && test -n "$$commit" || \
		{ echo "The commit is unknown: images are built from a git checkout." >&2; exit 1; }; \
	LORAPLEX_VERSION="$$version" LORAPLEX_COMMIT="$$commit" $(COMPOSE) build

# COMPOSE and DOCKER are the commands; the stack is left running. A machine without a GPU wants ENGINE_LOCK=engine-cpu.
COMPOSE ?= docker compose
DOCKER ?= docker
.PHONY: test-compose
test-compose: images ## Build and start compose.yaml with two engines, and kill each container under streams
	@$(COMPOSE) up --wait --scale engine=2
	@$(COMPOSE) --profile demo run --rm demo-adapters
	@LORAPLEX_SMOKE_TARGET=127.0.0.1:8500 LORAPLEX_SMOKE_HTTP=127.0.0.1:8501 LORAPLEX_COMPOSE="$(COMPOSE)" LORAPLEX_DOCKER="$(DOCKER)" \
		$(BIN)/pytest -ra tests/smoke tests/compose $(PYTEST_ARGS)

.PHONY: bench
bench: $(VENV)/.dev-installed ## Compare with transformers + peft on this machine's CPU
	@$(BIN)/python benchmarks/cpu_vs_peft.py $(BENCH_ARGS)

.PHONY: campaign
campaign: $(VENV)/.dev-installed ## Random requests of every kind: CAMPAIGN_ARGS="--requests 100000 --seed 1" to one engine, OPENAPI_ARGS to the HTTP port, PUSH_ARGS="--pushes 200" from a trainer; kills: REPLICA_ARGS="--seconds 60", STORE_KILL_ARGS="--kills 200", RANK_KILL_ARGS="--kills 50"; adapters that change under tensor-parallel ranks: RANK_ARGS="--degree 4 --split divided"; a rolling upgrade: UPGRADE_ARGS="--streams 50"; gateways restarted behind proxies: RESTART_ARGS="--streams 200"; silent waits behind proxies: WAIT_ARGS="--seconds 310"
	@$(BIN)/python -m support.request_campaign --results benchmarks/results $(CAMPAIGN_ARGS)
	@$(BIN)/python -m support.openapi_campaign $(OPENAPI_ARGS)
	@$(BIN)/python -m support.push_campaign --results benchmarks/results $(PUSH_ARGS)
	@$(BIN)/python -m support.replica_campaign --results benchmarks/results $(REPLICA_ARGS)
	@$(BIN)/python -m support.store_kills --results benchmarks/results $(STORE_KILL_ARGS)
	@$(BIN)/python -m support.upgrade_campaign --results benchmarks/results $(UPGRADE_ARGS)
	@$(BIN)/python -m support.rolling_restart --results benchmarks/results $(RESTART_ARGS)
	@$(BIN)/python -m support.proxy_waits --results benchmarks/results $(WAIT_ARGS)
	@$(BIN)/python -m support.rank_kills --results benchmarks/results $(RANK_KILL_ARGS)
	@$(BIN)/python -m support.rank_campaign --results benchmarks/results $(RANK_ARGS)

.PHONY: structured-campaign
structured-campaign: $(VENV)/.dev-installed ## Random schemas through adapters at any temperature: CAMPAIGN_ARGS="--requests 500 --seed 1"
	@$(BIN)/python -m support.structured_campaign --results benchmarks/results $(CAMPAIGN_ARGS)

.PHONY: adapter-campaign
adapter-campaign: $(VENV)/.dev-installed ## Random adapters of every method in a pool for few, against PEFT: CAMPAIGN_ARGS="--rounds 50 --seed 1"
	@$(BIN)/python -m support.adapter_campaign --results benchmarks/results $(CAMPAIGN_ARGS)

.PHONY: tool-campaign
tool-campaign: $(VENV)/.dev-installed ## Random strict functions through adapters and tool formats: CAMPAIGN_ARGS="--requests 500 --seed 1"
	@$(BIN)/python -m support.tool_campaign --results benchmarks/results $(CAMPAIGN_ARGS)

.PHONY: kill-gateways
kill-gateways: $(VENV)/.dev-installed ## Kill gateways under streams of every kind: KILL_ARGS="--rounds 100 --seed 1 --gently"
	@$(BIN)/python -m support.gateway_kills $(KILL_ARGS)

.PHONY: soak
soak: $(VENV)/.dev-installed ## Random faults against a whole fleet, every answer checked: SOAK_ARGS="--minutes 30 --seed 1"
	@$(BIN)/python -m support.soak --results benchmarks/results $(SOAK_ARGS)

.PHONY: fuzz
fuzz: $(VENV)/.dev-installed ## Mutated files and streams at all that reads what strangers send, 10 minutes: FUZZ_ARGS="--seconds 600 --seed 1"
	@$(BIN)/python -m support.fuzz --results benchmarks/results $(FUZZ_ARGS)

.PHONY: clean
clean: ## Remove caches and build output; the virtual environment stays
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .cache
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Stamps: an install is repeated only when what it depends on changed.
$(VENV)/bin/python:
	@$(need-python)
	@$(PYTHON) -m venv $(VENV) || { echo "cannot create $(VENV); Debian and Ubuntu need the package python3-venv" >&2; rm -rf $(VENV); exit 1; }

# torch first and pinned, so that nothing else gets to choose one.
$(VENV)/.torch-installed: constraints.txt | $(VENV)/bin/python
	@echo "Installing torch into $(VENV); this takes a few minutes once."
	@$(PIP) install $(PIP_TORCH_ARGS) -c constraints.txt torch
	@touch $@

$(VENV)/.dev-installed: pyproject.toml $(VENV)/.torch-installed
	@echo "Installing loraplex and its development tools into $(VENV)."
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.demo-installed

# By uv, which takes half a minute for what pip takes minutes for. Another index than PyPI: UV_DEFAULT_INDEX.
$(CLIENTS_VENV)/.installed: tests/clients/requirements.txt
	@$(need-python)
	@echo "Installing client libraries into $(CLIENTS_VENV)."
	@$(PYTHON) -m venv $(CLIENTS_VENV)
	@$(CLIENTS_VENV)/bin/python -m pip --disable-pip-version-check -qq install uv==0.13.9
	@$(CLIENTS_VENV)/bin/python -m uv pip install -q --system-certs --python $(CLIENTS_VENV)/bin/python \
		-r tests/clients/requirements.txt || \
		{ echo "uv could not; pip takes minutes." >&2 && \
		$(CLIENTS_VENV)/bin/python -m pip --disable-pip-version-check -qq install -r tests/clients/requirements.txt; }
	@touch $@

tests/clients/npm/node_modules/.package-lock.json: tests/clients/npm/package-lock.json
	@echo "Installing client libraries of npm into $(@D)."
	@cd tests/clients/npm && npm ci --no-audit --no-fund --silent
	@touch $@

$(VENV)/.demo-installed: pyproject.toml $(VENV)/.torch-installed
	@echo "Installing loraplex into $(VENV)."
	@$(PIP) install -c constraints.txt -e '.[demo]'
	@touch $@
