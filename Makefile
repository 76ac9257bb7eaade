# `make` sets up and runs the whole pipeline; `make test` tests (some: TESTS="tests/models");
# `make lint` checks format, rules and types; `make ui` opens the comparison of runs;
# `make bench` measures speed and memory (options: BENCH_ARGS="--only train").
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
IN_VENV := PATH="$(abspath $(BIN)):$$PATH"

run: $(STAMP)
	$(IN_VENV) dvc repro

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt $(PIP_ARGS) -e ".[dev]"
	$(IN_VENV) python -m rnp setup
	touch $@

test: $(STAMP)
	$(IN_VENV) python -m pytest $(TESTS)

lint: $(STAMP)
	$(IN_VENV) ruff format --check .
	$(IN_VENV) ruff check .
	$(IN_VENV) basedpyright

ui: $(STAMP)
	$(IN_VENV) MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow ui --workers 1

bench: $(STAMP)
	$(IN_VENV) python -m rnp bench $(BENCH_ARGS)

.PHONY: run test lint ui bench
