# Everything works from a fresh clone: each target makes .venv first if it is missing.
# Needs Python 3.11 or newer and a C++ compiler, which torch.compile calls.

PYTHON ?= python3
BIN := .venv/bin
TORCH_VENV = .venv-torch-$(TORCH)

.PHONY: venv test test-slow nightly test-torch lint docs demo bench

venv: .venv/installed

# The stamp: installed anew only when the dependencies or the version may have changed.
.venv/installed: pyproject.toml ssprop_fx/__init__.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -e '.[dev]'
	touch $@

# One thread for each process of tests: threads that wait for each other are slower by far.
test: venv
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --dist worksteal

# Minutes each.
test-slow: venv
	$(BIN)/pytest -q -m slow

# Hours: what is too slow for every change. 100,000 random layers against the oracle, the slow tests,
# and 5000 steps whose memory and graphs must not grow. CASES and STEPS can be given.
CASES ?= 100000
STEPS ?= 5000
nightly: venv
	OMP_NUM_THREADS=1 $(BIN)/python tests/support/layer_cases.py $(CASES)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m slow -n auto --dist worksteal
	$(BIN)/python -m benchmarks long --steps $(STEPS) --check

# The suite on one release of torch, in an environment of its own: make test-torch TORCH=2.11.0
test-torch: $(TORCH_VENV)/installed
	OMP_NUM_THREADS=1 $(TORCH_VENV)/bin/pytest -q -n auto --dist worksteal

# `===` because `==` would also take a local build such as 2.13.0+cpu, beside which torchvision does
# not load. The matching torchvision says itself which torch it is for, and pip finds it.
$(TORCH_VENV)/installed: pyproject.toml
	$(if $(TORCH),,$(error which torch? as in `make test-torch TORCH=2.11.0`))
	$(PYTHON) -m venv $(TORCH_VENV)
	$(TORCH_VENV)/bin/pip install -e '.[dev]' 'torch===$(TORCH)'
	$(TORCH_VENV)/bin/python -c "from importlib.metadata import version as v; \
	import torch, torchvision; assert v('torch') == '$(TORCH)', v('torch')"
	touch $@

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages of docs/ and the API reference, in build/docs/index.html; a broken link is an error.
docs: .venv/docs
	$(BIN)/mkdocs build --strict

.venv/docs: .venv/installed
	$(BIN)/pip install -e '.[docs]'
	touch $@

demo: venv
	$(BIN)/ssprop-fx train

bench: venv
	$(BIN)/python -m benchmarks step
