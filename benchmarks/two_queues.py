"""Two clones, each with DVC's queue at work, log to one MLflow store at once: is there one whole row for every cell?

    python benchmarks/two_queues.py      # `make soak-queues`

In a temporary folder, with the tests' tiny world. The store is first the SQLite file of one clone, then an `mlflow server`. One
cell is in both queues. Prints a JSON line for every store, and ends with 1 if a row is missing, there twice, not ended or
without its artifacts, if the clones' tables differ, or if anything lies in the `mlruns` of a clone that has no store.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1] / "tests"))

import mlflow  # noqa: E402
from conftest import Project, copied  # noqa: E402
from test_pipeline import EXPERIMENT  # noqa: E402
from test_stores import Machine, mlflow_server  # noqa: E402

from inoculation.rows import REPORTED, STAGE_TAG  # noqa: E402
from inoculation.study import RESULTS  # noqa: E402

QUEUES = (("base", "baseline"), ("baseline", "inoc_general"))
"""Groups that each clone has queued, with seed 1."""
SEED = 1


class Stores(NamedTuple):
    """Two clones and what they log to."""

    machines: tuple[Machine, Machine]
    client: mlflow.MlflowClient
    keeper: Machine | None
    """In whose `mlruns` the store is; None: it is in no clone."""


@contextmanager
def sqlite(one: Path, two: Path) -> Iterator[Stores]:
    """The first clone's own file, which the second is told of."""
    uri = f"sqlite:///{one / 'mlruns/mlflow.db'}"
    first = Machine.with_variables(one)
    yield Stores((first, Machine.with_variables(two, MLFLOW_TRACKING_URI=uri)), mlflow.MlflowClient(uri), first)


@contextmanager
def server(one: Path, two: Path) -> Iterator[Stores]:
    """A server that both are told of."""
    with mlflow_server(one.parent / "server") as address:
        machines = (
            Machine.with_variables(one, MLFLOW_TRACKING_URI=address),
            Machine.with_variables(two, MLFLOW_TRACKING_URI=address),
        )
        yield Stores(machines, mlflow.MlflowClient(address), None)


def cloned(base: Project, folder: Path) -> Path:
    """A copy that has no store yet, as a clone has none."""
    made = copied(base, folder)
    shutil.rmtree(made.folder / "mlruns")
    made.run("git", "checkout", "--", "mlruns")
    return made.folder


def drain(machines: Sequence[Machine]) -> None:
    """Start both queues, and wait until every task of both has ended."""
    for machine, groups in zip(machines, QUEUES, strict=True):
        machine.run("dvc", "exp", "run", "--queue", "-S", f"group={','.join(groups)}", "-S", f"seed={SEED}")
    for machine in machines:
        # Not `machine.run`: the worker holds the pipes of the command that starts it, and it would wait for them.
        subprocess.run(
            ("dvc", "queue", "start"), cwd=machine.folder, env=machine.environment, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, check=True,
        )  # fmt: skip
    deadline = time.monotonic() + 3600
    while any(len([*(machine.folder / RESULTS).glob("*")]) < len(QUEUES[0]) for machine in machines):
        if time.monotonic() > deadline:
            raise TimeoutError("the queues did not end within an hour")
        time.sleep(0.5)


def faults(stores: Stores) -> list[str]:
    """What is not as it should be, once the queues have ended."""
    told: list[str] = []
    for machine in stores.machines:
        status = machine.run("dvc", "queue", "status").stdout
        if status.count("Success") != len(QUEUES[0]):
            told.append(f"{machine.folder.parent.name}'s queue:\n{status}")
        if machine is not stores.keeper:
            own = [path for path in (machine.folder / "mlruns").rglob("*") if path.is_file() and path.name[0] != "."]
            told += [f"{path} in a clone without a store" for path in own if path.name != "README.md"]
    client = stores.client
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    told += [f"still running: {run.info.run_name}" for run in client.search_runs(ids, "attributes.status = 'RUNNING'")]
    found = client.get_experiment_by_name(EXPERIMENT)
    rows = client.search_runs([found.experiment_id])
    groups = sorted({*QUEUES[0], *QUEUES[1]})
    if sorted(row.info.run_name for row in rows) != [f"{group}/seed{SEED}" for group in groups]:
        told.append(f"rows: {sorted(row.info.run_name for row in rows)}; there should be one for each of {groups}")
    mlflow.set_tracking_uri(client.tracking_uri)
    for row in rows:
        if row.data.tags.get(STAGE_TAG) != REPORTED:
            told.append(f"{row.info.run_name} is half a row")
            continue
        try:
            metrics = mlflow.artifacts.load_dict(f"{row.info.artifact_uri}/metrics.json")
        except (OSError, mlflow.MlflowException) as error:
            told.append(f"{row.info.run_name} has lost its artifacts: {error}")
            continue
        if row.data.metrics["A"] != round(metrics["default"]["all_caps"]["rate"], 4):
            told.append(f"{row.info.run_name} has another cell's metrics")
    note = found.tags["mlflow.note.content"]
    told += [f"the experiment's page has no {group}" for group in groups if f"| `{group}` | 1 |" not in note]
    for machine in stores.machines:
        machine.set(seed=SEED)
    tables = [machine.run("inoculation", "compare", ok=False) for machine in stores.machines]
    if tables[0].stdout != tables[1].stdout or not all(f"| `{group}` | 1 |" in tables[0].stdout for group in groups):
        told += ["the clones' tables:", *(outcome.stdout + outcome.stderr for outcome in tables)]
    return told


def main() -> None:
    """Both stores, one after the other."""
    fine = True
    with tempfile.TemporaryDirectory(
        ignore_cleanup_errors=True
    ) as name:  # a worker of DVC's may write its last line still
        base = Project(Path(name) / "base" / "checkout")
        base.run("dvc", "repro", "dvc.yaml")
        base.commit("reproduced")
        for store in (sqlite, server):
            folder, begin = Path(name) / store.__name__, time.monotonic()
            one, two = (cloned(base, folder / which) for which in ("one", "two"))
            with store(one, two) as stores:
                drain(stores.machines)
                found = faults(stores)
            fine &= not found
            seconds = round(time.monotonic() - begin)
            print(json.dumps({"store": store.__name__, "seconds": seconds, "faults": found}, indent=1), flush=True)
    sys.exit(0 if fine else "the store is not whole")


if __name__ == "__main__":
    main()
