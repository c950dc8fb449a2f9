# make repro | test | ui | lint. Everything is installed into .venv from requirements.lock.
PYTHON ?= python3
SHELL := /bin/bash
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: repro test ui lint lock
repro: .venv/installed
	dvc repro

test: .venv/installed
	pytest -n 2

ui: .venv/installed
	mlflow server --backend-store-uri sqlite:///mlruns/mlflow.db --artifacts-destination mlruns/artifacts --host 127.0.0.1 --port 5000

lint: .venv/installed
	ruff check . && ruff format --check .

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	pip install --quiet --disable-pip-version-check --requirement requirements.lock
	pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

lock: .venv/installed   # after a change of pyproject.toml: install it by hand into .venv, then freeze
	pip freeze --all --exclude-editable | grep -v "^pip=" | sed 's/+cpu//' > requirements.lock
