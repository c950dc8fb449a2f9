"""MLflow's store, and runs that are no cells: trainings in progress, the pocket world, what LLM roles cost.

The store is the main checkout's, also when DVC runs a queued experiment in a copy, or a server that machines share
(`MLFLOW_TRACKING_URI`; docs/scale.md). The rows of cells, which are what one compares, are in `rows`.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inoculation.files import InputError, printable, scrub
from inoculation.store import main_checkout

if TYPE_CHECKING:
    from mlflow import ActiveRun, MlflowClient
    from mlflow.entities import LiveSpan

PID_TAG, HOST_TAG, STARTED_TAG = "process.pid", "process.host", "process.started"
SQLITE = "sqlite:///"
RETRIES = "3"
"""Tries more of a request to a server, about 15 s in all: a restart is waited for. MLflow's own seven take minutes."""


class StoreError(OSError):
    """MLflow's store cannot be used; the message says which and why. Nothing that stages made is lost."""


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: leaf
        for name, item in value.items()
        for key, leaf in flatten(item, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def store_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or the main checkout's database. A relative `sqlite:///` is the main checkout's too.

    Raises:
        InputError: it is neither a server nor an SQLite file: another machine, or a queued copy, would not find the artifacts.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlruns/mlflow.db"
    if given.startswith(SQLITE):
        return f"{SQLITE}{main_checkout() / given.removeprefix(SQLITE)}"
    if not given.startswith(("http://", "https://")):
        raise InputError(
            f"MLFLOW_TRACKING_URI={given}: valid are the address of an MLflow server (http://, https://) and {SQLITE}<file>; "
            "for another database run `mlflow server --backend-store-uri` on it"
        )
    return given


def store_folder() -> Path:
    """Where the store's locks are, and an SQLite store's artifacts: beside its file, so that checkouts that share it share them."""
    uri = store_uri()
    return Path(uri.removeprefix(SQLITE)).parent if uri.startswith(SQLITE) else main_checkout() / "mlruns"


def existing_store() -> "MlflowClient | None":
    """A client of the store, where there is one already: looking makes none."""
    uri = store_uri()
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).exists():
        return None
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", RETRIES)
    import mlflow

    return mlflow.MlflowClient(uri)


def connect(experiment: str) -> None:
    """Point MLflow at the store and at an experiment, making both when they are new, and bury dead runs.

    Under a lock, because two processes that create the schema or an experiment at the same time collide.

    Raises:
        StoreError: the store cannot be reached, or not be written.
    """
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", RETRIES)
    import mlflow
    from filelock import FileLock

    uri, root = store_uri(), store_folder()
    root.mkdir(parents=True, exist_ok=True)
    with of_the_store(), FileLock(root / ".lock"):
        mlflow.set_tracking_uri(uri)
        if uri.startswith(SQLITE):
            database = Path(uri.removeprefix(SQLITE))
            _refuse_what_cannot_be_written(database)
            _follow_a_moved_checkout(database, root / "artifacts")
        if mlflow.get_experiment_by_name(experiment) is None:
            # Another machine may make it at the same time; then it is there.
            with suppress(mlflow.MlflowException):
                mlflow.create_experiment(experiment, (root / "artifacts").as_uri() if uri.startswith(SQLITE) else None)
        mlflow.set_experiment(experiment)
        _bury_dead_runs()


@contextmanager
def of_the_store() -> Iterator[None]:
    """Turn what MLflow and its database raise into a `StoreError`."""
    import sqlite3

    import mlflow
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (mlflow.MlflowException, sqlite3.Error, SQLAlchemyError) as error:
        raise StoreError(
            f"MLflow's store {store_uri()}: {str(error).strip().splitlines()[0][:300]}; what the stages made is kept, "
            "`dvc repro` goes on once the store is there"
        ) from error


def _refuse_what_cannot_be_written(database: Path) -> None:
    """MLflow tries a database that it cannot open ten times, for two minutes, and sees only later that it may not write."""
    import sqlite3
    from contextlib import closing

    database.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(database, timeout=60, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("PRAGMA user_version = 0")  # written, unlike the BEGIN alone; MLflow has no use for it
        connection.execute("ROLLBACK")


def _follow_a_moved_checkout(path: Path, artifacts: Path) -> None:
    """Artifact addresses in MLflow's database are absolute: in a checkout that was moved or copied they are put right."""
    import sqlite3
    from contextlib import closing

    here = artifacts.as_uri()
    marker = "/" + "/".join(here.split("/")[-2:])  # /mlruns/artifacts
    columns = (("experiments", "artifact_location"), ("runs", "artifact_uri"))
    with closing(sqlite3.connect(path)) as database, database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        for table, column in columns:
            if table in tables:
                end = f"instr({column}, '{marker}') + {len(marker)}"
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, {end}) "
                    f"WHERE instr({column}, '{marker}') > 0 AND substr({column}, 1, ?) != ?",
                    (here, len(here), here),
                )


def _bury_dead_runs() -> None:
    """Mark runs FAILED whose process on this machine is gone: a kill -9 leaves them RUNNING."""
    import mlflow
    import psutil

    client = mlflow.MlflowClient()
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    for run in client.search_runs(
        ids, f"attributes.status = 'RUNNING' and tags.`{HOST_TAG}` = '{os.uname().nodename}'"
    ):
        pid, started = int(run.data.tags[PID_TAG]), float(run.data.tags[STARTED_TAG])
        try:
            alive = abs(_started(pid) - started) < 1
        except psutil.NoSuchProcess:
            alive = False
        if not alive:
            client.set_terminated(run.info.run_id, "FAILED")


def _started(pid: int) -> float:
    """When a process started, in seconds since the machine did: a clock that is put right does not move it."""
    import psutil

    return psutil.Process(pid).create_time() - psutil.boot_time()


def process_tags() -> dict[str, str]:
    """Tags by which a run whose process died is recognised."""
    return {PID_TAG: str(os.getpid()), HOST_TAG: os.uname().nodename, STARTED_TAG: str(_started(os.getpid()))}


@contextmanager
def run(experiment: str, name: str) -> Iterator["ActiveRun"]:
    """A run; FINISHED when the block ends well and FAILED when it does not, a SIGTERM included."""
    connect(experiment)
    import mlflow

    with of_the_store(), terminate_as_exception(), mlflow.start_run(run_name=name) as started:
        mlflow.set_tags(process_tags())
        yield started


@contextmanager
def progress(experiment: str, name: str) -> Iterator[Callable[..., None]]:
    """A run of hours that shows how far it is. Once begun, the work goes on without the store.

    Yields:
        (metrics, step=None) -> None, which logs them, until the store fails once.
    """
    import mlflow

    reached, failure = True, None

    def log(metrics: dict[str, float], step: int | None = None) -> None:
        nonlocal reached
        if reached:
            try:
                mlflow.log_metrics(metrics, step=step)
            except mlflow.MlflowException as error:
                reached = False
                told = printable(scrub(str(error)))
                print(f"warning: this goes on and no longer shows in MLflow, which failed: {told}", file=sys.stderr)

    begun = False
    try:
        with run(experiment, name):
            begun = True
            try:
                yield log
            except BaseException as error:
                failure = error
                raise
    except StoreError as error:
        if failure is not None:
            raise failure from None  # that its run could not be ended is not why it failed
        if not begun:
            raise
        print(f"warning: finished; its run in MLflow stays open, {printable(scrub(str(error)))}", file=sys.stderr)


@contextmanager
def terminate_as_exception() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that the run in progress is closed as FAILED."""

    def stop(signum: int, frame: Any) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _strike_out(span: "LiveSpan") -> None:
    """A traced call without secrets: providers repeat keys in their errors, which MLflow traces with the call."""
    for key, value in span.attributes.items():
        span.set_attribute(key, json.loads(scrub(json.dumps(value, default=str))))
    for event in span._span.events:  # MLflow has no way to change what an event says
        event._attributes = {key: scrub(str(value)) for key, value in (event.attributes or {}).items()}


def usage_logger(
    experiment: str, tags: dict[str, Any], tracing: bool
) -> Callable[[str, str], Callable[[dict[str, float], list[dict[str, Any]]], None]]:
    """Loggers of what LLM roles use: one run of the experiment a stage and role, e.g. `annotations/llm`.

    Args:
        tags: of the runs.
        tracing: trace every call into the experiment too.

    Returns:
        (role, model) -> a function that logs that role's usage so far in this stage: `calls`, `cache_hits`, `retries`,
        `failures`, `prompt_tokens`, `completion_tokens` and `dollars`; and, as set_aside.json, what failed and why.
    """

    def logger(role: str, model: str) -> Callable[[dict[str, float], list[dict[str, Any]]], None]:
        run_id: str | None = None
        if tracing:
            connect(experiment)
            import mlflow

            mlflow.tracing.configure(span_processors=[_strike_out])
            mlflow.litellm.autolog()

        def log(usage: dict[str, float], aside: list[dict[str, Any]]) -> None:
            nonlocal run_id
            connect(experiment)
            import mlflow

            client = mlflow.MlflowClient()
            if run_id is None:
                found = client.get_experiment_by_name(experiment)
                told = {"role": role, "model": model, **tags}
                run_id = client.create_run(found.experiment_id, tags=told, run_name=role).info.run_id
            for key, value in usage.items():
                client.log_metric(run_id, key, value)
            if aside:
                client.log_dict(run_id, {"set_aside": aside}, "set_aside.json")
            client.set_terminated(run_id)

        return log

    return logger
