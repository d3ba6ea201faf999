# Everything here sets itself up: the first target to run makes the environment in .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/ready

# One thread per process: the tests start multiple processes, and their tensors are small.
export OMP_NUM_THREADS ?= 1
# As many test files at once as there are cores; a file stays in one process, which compiles its models once.
WORKERS ?= auto
PYTEST  := $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile

.PHONY: demo test slow lint format types wheel bench ci clean
.DEFAULT_GOAL := test

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "meshwright needs Python 3.11 or later: make PYTHON=python3.11")'
	@echo 'making $(VENV), once: a minute or two'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)  ## train a small GPT on a virtual 2 x 2 mesh beside one process
	$(BIN)/python -m meshwright demo

test: $(READY)  ## all but the slow tests
	$(PYTEST) -m "not slow"

slow: $(READY)  ## the slow tests
	$(PYTEST) -m slow

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(READY)
	$(BIN)/mypy

wheel: $(READY)  ## dist/*.whl, from the sources alone
	rm -rf build dist
	$(BIN)/python -m build --wheel

bench: $(READY)  ## beside DTensor, FSDP2, DDP, torch's pipelines and hand-written code: see benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks.tensor_parallel
	$(BIN)/python -m benchmarks.tensor_2d
	$(BIN)/python -m benchmarks.data_parallel
	$(BIN)/python -m benchmarks.zero
	$(BIN)/python -m benchmarks.pipeline
	$(BIN)/python -m benchmarks.input_check
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.experts
	$(BIN)/python -m benchmarks.resident
	$(BIN)/python -m benchmarks.compile_time

ci:
	.ci/run

clean:
	rm -rf build dist $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
