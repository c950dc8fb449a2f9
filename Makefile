# make repro | test | ui | lint. Everything is installed into .venv from requirements.lock.
PYTHON ?= python3
SHELL := /bin/bash
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: repro test ui lint lock
repro: .venv/installed
	$(BIN)/dvc repro

test: export OMP_NUM_THREADS := 1
test: .venv/installed
	$(BIN)/pytest -n 2 --dist loadfile

ui: .venv/installed
	$(BIN)/mlflow server --backend-store-uri sqlite:///mlruns/mlflow.db --host 127.0.0.1 --port 5000

lint: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# After a change of the dependencies in pyproject.toml: install them into .venv by hand, then freeze what is there.
lock:
	$(BIN)/pip freeze --all --exclude-editable | grep -v '^pip=' | sed 's/+cpu//' > requirements.lock
