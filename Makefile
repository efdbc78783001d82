# Everything works from a fresh clone: each target makes .venv first if it is missing.
# Needs Python 3.11 or newer and a C++ compiler, which torch.compile calls.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: venv test test-slow lint demo bench

venv: .venv/installed

# The stamp: installed anew only when the dependencies may have changed.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -e '.[dev]'
	touch $@

# One thread for each process of tests: threads that wait for each other are slower by far.
test: venv
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --dist worksteal

# Minutes each.
test-slow: venv
	$(BIN)/pytest -q -m slow

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: venv
	$(BIN)/ssprop-fx train

bench: venv
	$(BIN)/python -m benchmarks step
