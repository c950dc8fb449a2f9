"""MLflow rows: their status when a process dies, tables that are replaced, and one store for every copy."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT, warm, warm_socket

from inoculation.store import digest, main_checkout
from inoculation.tracking import flatten

RUN = (
    "import time\n"
    "from inoculation import tracking\n"
    "with tracking.run('e', 'r'):\n"
    "    print('ready', flush=True)\n"
    "    time.sleep(60)\n"
)
SWEEP = "from inoculation import tracking; tracking.connect('e')"


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")}
    return kept | {"DVC_ROOT": str(tmp_path), "PYTHONPATH": str(ROOT / "src"), "WARM": warm_socket()}


def statuses(folder: Path) -> list[str]:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlruns' / 'mlflow.db'}")
    return [run.info.status for run in client.search_runs([client.get_experiment_by_name("e").experiment_id])]


def start(environment) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", warm(RUN)], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_terminated_run_is_failed(tmp_path, environment):
    process = start(environment)
    assert statuses(tmp_path) == ["RUNNING"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert statuses(tmp_path) == ["FAILED"]


def test_a_killed_run_is_failed_by_the_next_stage_and_a_living_one_is_not(tmp_path, environment):
    dead, alive = start(environment), start(environment)
    dead.kill()
    dead.wait()
    subprocess.run([sys.executable, "-c", warm(SWEEP)], env=environment, check=True)
    assert sorted(statuses(tmp_path)) == ["FAILED", "RUNNING"]
    alive.kill()
    alive.wait()


def test_many_processes_may_be_the_first(tmp_path, environment):
    processes = [subprocess.Popen([sys.executable, "-c", warm(SWEEP)], env=environment) for _ in range(4)]
    assert [process.wait(120) for process in processes] == [0] * 4


def test_a_queued_copy_belongs_to_its_checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / ".dvc" / "tmp" / "exps" / "tmpabc"))
    assert main_checkout() == tmp_path
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert main_checkout() == tmp_path


def test_flatten_and_digest():
    assert flatten({"a": {"b": 1, "c": [2]}, "d": None}) == {"a.b": 1, "a.c": [2], "d": None}
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


def test_make_ui_serves_the_store(tmp_path, environment):
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / ".venv").symlink_to(sys.prefix)
    start(environment).kill()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["make", "ui", f"PORT={port}", "--assume-old=.venv/installed"]
    server = subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    address, body = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search", b'{"max_results": 10}'
    try:
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None and time.monotonic() < deadline
            with contextlib.suppress(OSError):
                request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
                with urllib.request.urlopen(request, timeout=10) as answer:
                    assert "e" in {found["name"] for found in json.load(answer)["experiments"]}
                    break
            time.sleep(0.5)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
