"""Stores past one machine: an MLflow server and a DVC remote that two clones share, and stores that fail."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, Project, copied, warm, warm_socket
from test_pipeline import CELL, EXPERIMENT

from inoculation.files import InputError

BIN = Path(sys.executable).parent
KEYS = {"AWS_ACCESS_KEY_ID": "of-this-test", "AWS_SECRET_ACCESS_KEY": "of-this-test", "AWS_DEFAULT_REGION": "us-east-1"}


@contextlib.contextmanager
def running(*command: str, ready: str, folder: Path, environment: dict[str, str] | None = None) -> Iterator[str]:
    """A server as a process of its own, on a free port; its address.

    Args:
        command: without the port.
        ready: the path that answers once it is up.
        folder: where it runs.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **(environment or {})}
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", port], cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )  # fmt: skip
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while True:
            assert server.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()[-2000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(address + ready, timeout=5):
                break
            time.sleep(0.1)
        yield address
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


def mlflow_server(folder: Path, database: Path | None = None) -> contextlib.AbstractContextManager[str]:
    """`mlflow server` on an SQLite database, with the artifacts behind it.

    Args:
        folder: made for it.
        database: one that is there already; default: a new one in `folder`.
    """
    folder.mkdir()
    command = (str(BIN / "mlflow"), "server", "--workers", "1", "--serve-artifacts", "--artifacts-destination", str(folder / "artifacts"),
               "--backend-store-uri", f"sqlite:///{database or folder / 'mlflow.db'}")  # fmt: skip
    return running(*command, ready="/health", folder=folder)


class Machine(Project):
    """A clone whose commands have further variables in their environment."""

    variables: dict[str, str]

    @classmethod
    def with_variables(cls, folder: Path, **variables: str) -> "Machine":
        made = cls.at(folder)
        made.variables = variables
        return made

    @property
    def environment(self) -> dict[str, str]:
        return super().environment | self.variables


def compared(machine: Project) -> str:
    return machine.run("inoculation", "compare").stdout


def test_two_clones_fill_one_table_through_a_server_and_a_training_survives_it(project, tmp_path):
    """What two machines do: each logs its own cell; both compare, and see the same rows. Then the server ends amid a training."""
    retries = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    with mlflow_server(tmp_path / "server") as address:
        one, two = (
            Machine.with_variables(copied(project, tmp_path / name).folder, MLFLOW_TRACKING_URI=address, **retries) for name in ("one", "two")
        )  # fmt: skip
        two.run_cell(group="base")
        for machine in (one, two):
            shutil.rmtree(machine.folder / "mlruns")
            machine.run("inoculation", "log")
        table = compared(one)
        assert "| `base` | 1 |" in table and "| `inoc_selective` | 1 |" in table and table == compared(two)
        import mlflow

        client = mlflow.MlflowClient(address)
        found = client.get_experiment_by_name(EXPERIMENT)
        rows = {row.info.run_name: row for row in client.search_runs([found.experiment_id])}
        assert set(rows) == {"base/seed0", "inoc_selective/seed0"}
        assert all(row.info.artifact_uri.startswith("mlflow-artifacts:/") for row in rows.values())
        assert [item.path for item in client.list_artifacts(rows["base/seed0"].info.run_id, "figure")]
        assert "| `base` | 1 |" in found.tags["mlflow.note.content"]
        record = one.folder / CELL / "inoc_selective/training.json"
        before = record.read_bytes()
        record.unlink()
        training = subprocess.Popen(
            ["inoculation", "train"], cwd=one.folder, env=one.environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )  # fmt: skip
        deadline = time.monotonic() + 200
        while not (made := client.get_experiment_by_name("training")) or not client.search_runs([made.experiment_id]):
            assert training.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
    told = training.communicate(timeout=300)[1]
    assert training.returncode == 0 and "warning: this goes on and no longer shows in MLflow" in told, told[-3000:]
    assert record.read_bytes() == before, "the record is whole"
    for machine in (one, two):
        assert not (machine.folder / "mlruns/mlflow.db").exists() and not (machine.folder / "mlruns/artifacts").exists()


def test_a_server_that_is_away_is_said_within_seconds_and_nothing_is_lost(project, tmp_path):
    away = Machine.with_variables(
        copied(project, tmp_path).folder, MLFLOW_TRACKING_URI="http://127.0.0.1:9", MLFLOW_HTTP_REQUEST_MAX_RETRIES="1"
    )
    start = time.monotonic()
    outcome = away.run("inoculation", "log", ok=False)
    assert outcome.returncode == 1 and time.monotonic() - start < 30
    assert "error: MLflow's store http://127.0.0.1:9: API request" in outcome.stderr
    assert "what the stages made is kept, `dvc repro` goes on" in outcome.stderr


def test_which_stores_are_valid(tmp_path, monkeypatch):
    from inoculation.tracking import store_uri

    monkeypatch.setenv("DVC_ROOT", str(tmp_path / ".dvc/tmp/exps/tmpabc"))
    for given in ("mlruns", "postgresql://db/mlflow", "file:///tmp/x"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
        with pytest.raises(InputError, match=f"MLFLOW_TRACKING_URI={given}: valid are the address of an MLflow server"):
            store_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///own/store.db")
    assert store_uri() == f"sqlite:///{tmp_path}/own/store.db", (
        "a queued copy, which is deleted, has no store of its own"
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////elsewhere/store.db")
    assert store_uri() == "sqlite:////elsewhere/store.db"


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder whose store is there and cannot be written; root ignores permissions, and gets a read-only mount."""
    folder = tmp_path / "checkout"
    code = "from inoculation import tracking\nwith tracking.run('e', 'r'): pass"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")} | {
        "DVC_ROOT": str(folder), "PYTHONPATH": str(ROOT / "src"), "WARM": warm_socket(),
    }  # fmt: skip
    folder.mkdir()
    subprocess.run([sys.executable, "-c", warm(code)], env=environment, check=True)
    database = folder / "mlruns/mlflow.db"
    if os.geteuid():
        database.chmod(0o444)
        yield folder
        return
    mount = subprocess.run(["mount", "--bind", "-o", "ro", database, database], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"root needs a read-only mount, which is not allowed here: {mount.stderr}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", database], check=True)


def test_a_store_that_cannot_be_written_is_said_at_once(read_only, monkeypatch):
    from inoculation import tracking

    monkeypatch.setenv("DVC_ROOT", str(read_only))
    start = time.monotonic()
    with pytest.raises(
        tracking.StoreError, match="mlflow.db: attempt to write a readonly database; what the stages made is kept"
    ):
        tracking.connect("e")
    assert time.monotonic() - start < 5


def test_checkouts_that_share_a_file_share_its_artifacts_and_its_locks(tmp_path, monkeypatch):
    """Of either, whoever connected last: what one has logged stays where it is, and nothing lies in the other's `mlruns`."""
    import mlflow

    from inoculation import tracking

    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    uris = []
    for checkout in (one, two, one):
        monkeypatch.setenv("DVC_ROOT", str(checkout))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{one}/mlruns/mlflow.db")
        with tracking.run("e", "r") as run:
            mlflow.log_text("hello", "a.txt")
        uris.append(run.info.artifact_uri)
        assert tracking.store_folder() == one / "mlruns"
    assert [mlflow.artifacts.load_text(f"{uri}/a.txt") for uri in uris] == ["hello"] * 3
    kept = mlflow.search_runs(experiment_names=["e"], output_format="list")
    assert {run.info.artifact_uri for run in kept} == {*uris} and not [*two.iterdir()]


def test_of_a_cell_that_two_processes_log_at_once_one_row_stays(tmp_path, monkeypatch):
    """Both look before either is done; whatever their clocks say, a later row replaces it."""
    import mlflow

    from inoculation import rows, tracking

    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    code = (
        "import sys, time\nfrom inoculation import rows, tracking\ntracking.connect('e')\n"
        "with rows.new_row('a', {}, {'group': 'base'}, 'cell'):\n"
        "    print('open', flush=True)\n    sys.stdin.read()\n"
    )
    tracking.connect("e")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "WARM": warm_socket()}
    other = subprocess.Popen(
        [sys.executable, "-c", warm(code)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "open\n"
    with rows.new_row("a", {}, {"group": "base"}, "cell"):
        before = rows.find("cell")
        other.stdin.close()
    assert other.wait(60) == 0 and not before
    [first] = rows.find("cell")
    monkeypatch.setattr("mlflow.tracking.fluent.get_current_time_millis", lambda: 1000, raising=False)
    monkeypatch.setattr("time.time", lambda: 1.0)
    with rows.new_row("a", {}, {"group": "base"}, "cell"):
        mlflow.log_metric("A", 2.0)
    [second] = rows.find("cell")
    assert second.info.run_id != first.info.run_id and second.data.metrics == {"A": 2.0}


def test_a_clock_that_is_put_right_buries_no_living_run(tmp_path, monkeypatch):
    import mlflow
    import psutil

    from inoculation import tracking

    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    with tracking.run("e", "r") as run:
        booted = psutil.boot_time()  # the kernel moves it with the clock, and psutil adds it to when processes started
        monkeypatch.setattr("psutil._pslinux.boot_time", lambda: booted - 3600)
        monkeypatch.setattr("psutil.boot_time", lambda: booted - 3600)
        tracking.connect("e")
        assert mlflow.MlflowClient().get_run(run.info.run_id).info.status == "RUNNING"


def test_two_clones_share_a_remote_by_s3(project, tmp_path):
    """README of it: docs/scale.md. One clone pushes what it made; the other pulls it, and makes another group only."""
    pytest.importorskip("moto", reason="no S3 server here: `make soak-faults` installs one")
    pytest.importorskip("dvc_s3", reason="pip install '.[s3]'")
    import boto3

    (tmp_path / "s3").mkdir()
    with (
        running(sys.executable, "-m", "moto.server", ready="/moto-api/", folder=tmp_path / "s3") as s3,
        mlflow_server(tmp_path / "server") as address,
    ):
        boto3.client(
            "s3", endpoint_url=s3, aws_access_key_id="x", aws_secret_access_key="x", region_name="us-east-1"
        ).create_bucket(Bucket="team")
        one = Machine.with_variables(copied(project, tmp_path / "one").folder, MLFLOW_TRACKING_URI=address, **KEYS)
        one.run("dvc", "remote", "add", "--default", "team", "s3://team/inoculation")
        one.run("dvc", "remote", "modify", "team", "endpointurl", s3)
        one.run("dvc", "repro")
        one.run("dvc", "push")
        one.commit("a remote that machines share")
        two = Machine.with_variables(tmp_path / "two/checkout", MLFLOW_TRACKING_URI=address, **KEYS)
        shutil.copytree(tmp_path / "one/bin", tmp_path / "two/bin")
        subprocess.run(["git", "clone", "--quiet", one.folder, two.folder], check=True)
        out = two.run("dvc", "exp", "run", "--pull", "-S", "group=base").stdout
        ran = {line.split("'")[1].split(":")[-1] for line in out.splitlines() if line.startswith("Running stage")}
        assert ran == {"check", "assign@base", "train", "respond", "judge", "report", "log"}, "the world came from S3"
        table = compared(two)
        assert "| `base` | 1 |" in table and "| `inoc_selective` | 1 |" in table and table == compared(one)
