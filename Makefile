# Forebay. `make demo` and `make test` set up everything they need.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Compiled bytecode makes torch and transformers start several times faster.
unexport PYTHONDONTWRITEBYTECODE
# The tools run from this environment only.
unexport PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z][a-zA-Z0-9_-]*:.*## ' $(MAKEFILE_LIST) \
	  | awk -F ':.*## ' '{printf "  \033[1m%-14s\033[0m %s\n", $$1, $$2}'

$(READY): setup.cfg constraints.txt pyproject.toml infra/setup.sh
	@PYTHON=$(PYTHON) infra/setup.sh $(VENV)
	@touch $@

.PHONY: setup
setup: $(READY) ## Virtual environment with the pinned packages

.PHONY: demo
demo: $(READY) ## The main job on a real model: four tenants, streamed and batched (KEEP=1 leaves it running)
	@$(BIN)/forebay demo

.PHONY: up
up: $(READY) ## Start the whole stack in the foreground (Ctrl-C ends it)
	@$(BIN)/forebay up

# Processes that share out the tests by files, each with its own servers: much of a run is waiting.
TEST_PROCESSES ?= 2
IN_PARALLEL := -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

.PHONY: test
test: $(READY) lint types imports ## Lint, types, import directions and all tests
	@infra/test-services.sh
	$(BIN)/python -m pytest $(IN_PARALLEL) $(PYTEST_ARGS)

.PHONY: lint
lint: $(READY) ## Ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: types
types: $(READY) ## mypy (strict for broker/, config/, api/)
	$(BIN)/mypy api broker config infra workers loadtests

.PHONY: imports
imports: $(READY) ## Import directions between the packages
	$(BIN)/lint-imports

.PHONY: format
format: $(READY) ## Let ruff fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: test-engine
test-engine: $(READY) ## 120 prompts of the real model against `generate`; takes minutes
	@ENGINE=1 $(BIN)/python -m pytest tests/integration/test_engine_equality.py $(PYTEST_ARGS)

VLLM := .venv-vllm

# The PyPI build of torchvision doesn't fit the CPU build of torch, and text models need none.
$(VLLM)/.ready: infra/vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -q -r infra/vllm.txt
	$(VLLM)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

.PHONY: test-vllm
test-vllm: $(VLLM)/.ready ## The contract of an engine on vLLM, in an environment of its own (.venv-vllm)
	@PYTHONPATH=. VLLM_CPU_KVCACHE_SPACE=2 $(VLLM)/bin/python -m pytest -W default \
	  --confcutdir=tests/integration tests/integration/test_engine_vllm.py

.PHONY: bench-submit
bench-submit: $(READY) ## Accepted jobs/s against FastAPI + Celery and a bare handler
	@$(BIN)/python -m loadtests.submit

.PHONY: bench-queue
bench-queue: $(READY) ## No-op jobs/s and a newcomer's wait against stock Celery
	@$(BIN)/python -m loadtests.queue_bench

.PHONY: bench-rabbitmq
bench-rabbitmq: $(READY) ## No-op jobs/s with RabbitMQ as the broker against Redis as the broker
	@infra/test-services.sh
	@$(BIN)/python -m loadtests.rabbitmq_bench

.PHONY: bench-engine
bench-engine: $(READY) ## 64 chats through the whole stack against the engine alone
	@$(BIN)/python -m loadtests.engine_bench

.PHONY: bench-peers
bench-peers: $(READY) ## Chats through the whole stack beside `transformers serve` and vLLM's CPU build
	@$(MAKE) -s $(VLLM)/.ready || { rm -rf $(VLLM); echo "· vLLM can't be installed: it is left out" >&2; }
	@$(BIN)/python -m loadtests.peers

.PHONY: bench-memory
bench-memory: $(READY) ## Whether workers' memory stays flat over 20,000 mixed jobs with cancels
	@$(BIN)/python -m loadtests.memory $(BENCH_ARGS)

.PHONY: bench-embeddings
bench-embeddings: $(READY) ## 64 clients embedding short texts through the whole stack, against the library and infinity-emb
	@[ -x .venv-infinity/bin/infinity_emb ] || { $(PYTHON) -m venv .venv-infinity && \
	  .venv-infinity/bin/pip install -q torch==2.13.0 && \
	  .venv-infinity/bin/pip install -q "infinity-emb[torch,server]==0.0.78" "transformers<5"; } \
	  || { rm -rf .venv-infinity; echo "· infinity-emb can't be installed: its side is left out" >&2; }
	@$(BIN)/python -m loadtests.embeddings

.PHONY: bench-masks
bench-masks: $(READY) ## What holding answers to a JSON schema costs a step, at 16 and 64 chats
	@$(BIN)/python -m loadtests.mask_cost

.PHONY: bench-stall
bench-stall: $(READY) ## How long 16 streams wait for their next token beside a prompt of 6,000
	@$(BIN)/python -m loadtests.stall_bench

.PHONY: kernel
kernel: $(READY) ## Build the compiled attention kernel for this processor, or say why it can't be
	@$(BIN)/python -m workers kernel

.PHONY: bench-fairness
bench-fairness: $(READY) ## Shares of tenants and bands, a newcomer's wait, a batch flood; against Celery and a FIFO
	@$(BIN)/python -m loadtests.fairness

.PHONY: bench-forecast
bench-forecast: $(READY) ## How far the estimated start of a waiting job is off, at seven loads
	@$(BIN)/python -m loadtests.forecast

.PHONY: bench-scale
bench-scale: $(READY) ## Cost per job with 10,000 tenants and 1,000,000 queued jobs; two primaries
	@$(BIN)/python -m loadtests.scale

.PHONY: load-10k
load-10k: $(READY) ## 10,000 clients waiting at once: nothing lost, memory and delay; alone and behind nginx
	@infra/test-services.sh
	@$(BIN)/python -m loadtests.load_10k

.PHONY: bench-batch
bench-batch: $(READY) ## A batch of 50,000 lines: time, memory of the API, what interactive calls feel of it
	@$(BIN)/python -m loadtests.batch_bench

.PHONY: bench-gateway
bench-gateway: $(READY) ## Milliseconds added to a call at half load, against the bare engine and LiteLLM's proxy
	@[ -x .venv-litellm/bin/litellm ] || { $(PYTHON) -m venv .venv-litellm && \
	  .venv-litellm/bin/pip install -q "litellm[proxy]==1.106.0"; } \
	  || { rm -rf .venv-litellm; echo "· LiteLLM can't be installed: its half is left out" >&2; }
	@$(BIN)/python -m loadtests.gateway

.PHONY: chaos
chaos: $(READY) ## Over 100 faults under load: kills, restarts, cuts, failovers; fails if a job is lost (11 minutes)
	@infra/test-services.sh
	@$(BIN)/python -m loadtests.chaos $(CHAOS_ARGS)
	@$(BIN)/python -m loadtests.chaos --sentinel $(CHAOS_SENTINEL_ARGS)

FUZZ := .venv-fuzz

# In an environment of its own: its packages have other pins.
$(FUZZ)/bin/schemathesis:
	$(PYTHON) -m venv $(FUZZ)
	$(FUZZ)/bin/pip install -q schemathesis==4.32.5

.PHONY: fuzz-api
fuzz-api: $(READY) $(FUZZ)/bin/schemathesis ## Random requests from the OpenAPI document; fails if one finds something (FUZZ_S=60)
	@$(BIN)/python -m loadtests.fuzz_api $(FUZZ)/bin/schemathesis $(or $(FUZZ_S),60)

.PHONY: chaos-webhooks
chaos-webhooks: $(READY) ## Webhooks to receivers that misbehave, workers killed between send and record (3 minutes)
	@$(BIN)/python -m loadtests.chaos_webhooks $(CHAOS_ARGS)

.PHONY: clean
clean: ## Remove the environment and caches (not the data folder .forebay)
	rm -rf $(VENV) $(FUZZ) $(VLLM) .venv-litellm .venv-infinity .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
