# `make demo` and `make test` set up their own virtual environment; nothing else is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The CPU build of torch where pip offers it (no NVIDIA driver here), any torch >= 2.11 otherwise.
TORCH_CPU := torch==2.13.0
# The oldest that extra `cuda` allows: what it compiles, newer ones do. With a GPU torch has its own.
OLDEST_NVRTC := nvidia-cuda-nvrtc==13.0.*
HAS_GPU = command -v nvidia-smi >/dev/null 2>&1
# What the targets for a GPU run: this folder's environment if it is there.
GPU_PYTHON ?= $(firstword $(wildcard $(BIN)/python) $(PYTHON))
define needs_gpu
@error=$$($(GPU_PYTHON) -c "import torch; torch.zeros(1, device='cuda'); $(1)" 2>&1 >/dev/null) || \
  { echo "$$error" | tail -n 1 >&2; \
    echo "$(GPU_PYTHON) needs a CUDA device and torch with CUDA: make .venv/.ready-dev (make clean" \
      "before, where .venv was made without a driver), or GPU_PYTHON=one that has them$(2)" >&2; exit 1; }
endef
# On shared cores more threads are often slower than one.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test gates oracle stress aot lint format gpu sanitize bench bench-gpu clean

demo: $(VENV)/.ready
	$(BIN)/dsv4 generate nano -p "The capital of France is" -n 8 --stop "." --expect Paris

test: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not gpu and not slow"

# The full table of the bundled checkpoint's gates and their negative controls.
gates: $(VENV)/.ready-dev
	$(BIN)/python scripts/gates.py --jobs 2

# 300 random configurations against transformers (60 of them run in `make test`).
oracle: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 DSV4_ORACLE_CONFIGS=300 $(BIN)/pytest -n 2 tests/reference/test_transformers_oracle.py

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python tools/line_budget.py
	$(BIN)/pyright

format: $(VENV)/.ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A million operations of the cache manager, thousands of histories of the paged cache, and new
# random examples for every property.
stress: $(VENV)/.ready-dev
	HYPOTHESIS_PROFILE=explore $(BIN)/pytest -n 2 -m "not gpu" $$(grep -rl --include=*.py hypothesis tests/*/)
	DSV4_STRESS_OPERATIONS=1000000 $(BIN)/pytest -s tests/cache/test_manager.py
	DSV4_STRESS_HISTORIES=2000 DSV4_STRESS_KERNEL_HISTORIES=200 \
	  $(BIN)/pytest -n 2 tests/cache/test_histories.py

# Every kernel compiled for sm_90 and sm_100, no GPU needed; one process for each.
aot: $(VENV)/.ready-dev
	printf '%s\n' 90 100 | xargs -n 1 -P 2 $(BIN)/python tools/aot.py --arch

# Needs a CUDA device and an environment that has torch: here, or with HOST=user@box over ssh there.
# make gpu HOST=user@box [RUN="shell command"] [LIMIT=seconds] [FOLDER=on the box] [ATTACH=<run>]
# Results come into build/gpu/<run>/. Ctrl-C ends the run there, a lost connection does not.
ifeq ($(origin HOST),command line)
unexport RUN
gpu: export REMOTE_RUN := $(value RUN)
gpu:
	@$(PYTHON) tools/remote.py --run="$$REMOTE_RUN" --limit="$${LIMIT:-3600}" \
	  --folder="$${FOLDER:-.cache/dsv4-gpu}" --copy="$${COPY:-auto}" \
	  $${ATTACH:+--attach="$$ATTACH"} -- "$$HOST"
else
gpu:
	$(call needs_gpu,import pytest,; pytest too. Elsewhere: HOST=user@box)
	$(GPU_PYTHON) -m pytest -m gpu tests
endif

# Every kernel under compute-sanitizer, about five minutes; the environment of `make gpu`.
sanitize:
	$(call needs_gpu)
	PYTHONPATH=. $(GPU_PYTHON) tools/sanitize.py

# Every kernel on a CUDA device, in an environment that has torch: rows into build/rows.jsonl, from
# which tools/merge_rows.py makes baselines. FAMILIES="norm quant" for some; FLAGS=--once first, which
# times nothing, compiles; FLAGS="--shard 1/2" is half of the rows.
FAMILIES ?= cache embedding norm quant mhc router sampling linear moe attention indexer step
bench-gpu:
	$(call needs_gpu)
	@mkdir -p build; failed=""; \
	for family in $(FAMILIES); do \
	  $(GPU_PYTHON) -m benchmarks.kernels.bench_$$family --json build/rows.jsonl $(FLAGS) \
	    || failed="$$failed $$family"; \
	done; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/nano_cpu.py

$(VENV)/.torch:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	  { echo "needs Python 3.11 or newer: make demo PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@if $(HAS_GPU); then \
	  $(BIN)/pip install -q "torch>=2.11"; \
	else \
	  $(BIN)/pip install -q "$(TORCH_CPU)" || $(BIN)/pip install -q "torch>=2.11"; \
	fi
	@touch $@

$(VENV)/.ready: $(VENV)/.torch pyproject.toml
	@if $(HAS_GPU); then extras=chat,cuda; else extras=chat; fi; \
	  $(BIN)/pip install -q -e ".[$$extras]"
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install -q -e ".[dev]"
	@$(HAS_GPU) || $(BIN)/pip install -q "$(OLDEST_NVRTC)"
	@touch $@ $(VENV)/.ready

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
