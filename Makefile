# make up      a cluster on this machine, with everything it needs      make up ARGS="--decode 2 --port 9000"
# make test    all tests, two processes at a time                       make test ARGS="tests/unit -k configs"
# make test-gate  the exactness gate over every combination of its axes, about an hour
# make test-rdma  KV over RDMA verbs in an emulated machine with soft-RoCE, some minutes; skipped without qemu
# make test-thousand  1,000 prompts over every transport, cache and layout against one engine that does both
# make check   lint, types, imports, generated docs
# make fuzz   what a KV peer may send: 1,000,000 executions              make fuzz FUZZ="--seconds 30"
# make faults 10,000 injected faults over real KV nodes                 make faults FAULTS="--faults 500 --seed 7"
# make test-netns  two network namespaces: rate limits, losses, a cut cable, half-open peers (root, iproute2, nftables)
# make bench   prefill + decode against monolithic workers, same machine
# Variables: TORCH_INDEX=<index with CPU wheels>, TORCH=cuda, PYTHON=<interpreter>, EXTRAS=rdma, ARGS=<flags>, WORKERS=<of make test>

export TORCH TORCH_INDEX PYTHON EXTRAS
ARGS ?=
WORKERS ?= 2
FUZZ ?= --runs 1000000
FAULTS ?= --faults 10000 --seed 1
BIN := .venv/bin

.PHONY: setup up test test-gate test-rdma test-thousand check docs fuzz faults test-netns bench clean

setup:
	@sh .ci/setup

up: setup
	@$(BIN)/celeriac up $(ARGS)

test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-gate: setup
	CELERIAC_GATE=all $(BIN)/python -m pytest -q tests/unit/engines/test_gate_axes.py tests/integration/test_gate.py $(ARGS)

test-rdma: setup
	$(BIN)/python -m tests.rdma.run

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/unit/test_imports.py tests/unit/configs tests/unit/compose

docs: setup
	$(BIN)/python -m compose.reference

fuzz: setup
	$(BIN)/python -m tests.fuzz $(FUZZ)

faults: setup
	$(BIN)/python -m tests.faults $(FAULTS)

test-thousand: setup
	$(BIN)/python -m tests.thousand

test-netns: setup
	$(BIN)/python -m pytest -q tests/netns $(ARGS)

bench: setup
	$(BIN)/celeriac bench compare $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
