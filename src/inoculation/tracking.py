"""MLflow: one experiment a (profile, mixture), one run ("row") a cell.

A row is named by its group and seed and found again by its tag `cell`, a digest of every parameter it logs: a stage
that runs again updates its row, and another learning rate is another row. The store is the main checkout's, also when
DVC runs a queued experiment in a copy.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from inoculation.cell import digest, main_checkout, mixture_dir, mixture_name
from inoculation.groups import GROUPS
from inoculation.params import Params

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import ActiveRun
    from mlflow.entities import Run

CELL_TAG, PID_TAG, HOST_TAG, STARTED_TAG = "cell", "process.pid", "process.host", "process.started"


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: leaf
        for name, item in value.items()
        for key, leaf in flatten(item, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def logged_params(params: Params) -> dict[str, Any]:
    """The parameters of a row: those of params.yaml that its cell depends on, keys joined with dots."""
    dump = params.model_dump()
    dump["profiles"] = {params.profile: dump["profiles"][params.profile]}
    del dump["llm"]  # how calls are made, not what they answer
    if params.profile != "pocket":
        del dump["pocket"]
    else:
        del dump["persona_vectors"]
    return {key: value for key, value in flatten(dump).items() if not _of_other_detector(key, params.group)}


def _of_other_detector(key: str, group: str) -> bool:
    """Whether a parameter belongs to a detector that the group does not use."""
    detector = GROUPS[group].detector
    owners = {
        ("sae", "pocket.sae", "profiles.*.sae", "profiles.*.roles.explainer", "profiles.*.roles.classifier"): ("sae",),
        ("audit", "profiles.*.roles.auditor"): ("audit",),
        ("base_responses", "profiles.*.roles.synthesiser"): ("sae", "audit"),
    }
    parts = key.split(".")
    return any(
        detector not in users
        and all(own in ("*", part) for own, part in zip(prefix.split("."), parts, strict=False))
        and len(parts) > len(prefix.split("."))
        for prefixes, users in owners.items()
        for prefix in prefixes
    )


def store_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or the main checkout's database."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{main_checkout() / 'mlruns' / 'mlflow.db'}"


def connect(experiment: str) -> None:
    """Point MLflow at the store and at an experiment, making both when they are new, and bury dead runs.

    Under a lock, because two processes that create the schema or an experiment at the same time collide.
    """
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import mlflow
    from filelock import FileLock

    root = main_checkout() / "mlruns"
    root.mkdir(exist_ok=True)
    with FileLock(root / ".lock"):
        mlflow.set_tracking_uri(store_uri())
        if mlflow.get_experiment_by_name(experiment) is None:
            local = store_uri().startswith("sqlite:")
            mlflow.create_experiment(experiment, (root / "artifacts").as_uri() if local else None)
        mlflow.set_experiment(experiment)
        _bury_dead_runs()


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
            alive = abs(psutil.Process(pid).create_time() - started) < 1
        except psutil.NoSuchProcess:
            alive = False
        if not alive:
            client.set_terminated(run.info.run_id, "FAILED")


def _process_tags() -> dict[str, str]:
    import psutil

    return {
        PID_TAG: str(os.getpid()),
        HOST_TAG: os.uname().nodename,
        STARTED_TAG: str(psutil.Process().create_time()),
    }


def cell_experiment(params: Params) -> str:
    return f"{params.profile}/{mixture_name(params)}"


def find_row(params: Params) -> "Run | None":
    """The row of a cell in the connected experiment, if it has one."""
    import mlflow

    found = mlflow.search_runs(
        filter_string=f"tags.{CELL_TAG} = '{digest(logged_params(params))}'", output_format="list", max_results=1
    )
    return found[0] if found else None


@contextmanager
def cell_row(params: Params, anew: bool = False) -> Iterator["ActiveRun"]:
    """Open the row of a cell, creating it when there is none.

    The row is FINISHED when the block ends well and FAILED when it does not, a SIGTERM included.

    Args:
        params: names the cell.
        anew: replace an existing row (it goes to MLflow's trash): the training starts from the beginning.
    """
    connect(cell_experiment(params))
    import mlflow

    row = find_row(params)
    if row is not None and anew:
        mlflow.delete_run(row.info.run_id)
        row = None
    which = {"run_id": row.info.run_id} if row else {"run_name": f"{params.group}/seed{params.seed}"}
    with _terminate_as_exception(), mlflow.start_run(**which) as run:
        if row is None:
            mlflow.log_params(logged_params(params))
        mlflow.set_tags(
            {
                CELL_TAG: digest(logged_params(params)),
                "group": params.group,
                "seed": str(params.seed),
                "dvc.exp": os.environ.get("DVC_EXP_NAME", "workspace"),
                "mlflow.source.git.commit": _git_commit(),
                **_process_tags(),
            }
        )
        yield run


@contextmanager
def plain_run(experiment: str, name: str) -> Iterator["ActiveRun"]:
    """A run that is no cell (the pocket base model), with the same care for its status."""
    connect(experiment)
    import mlflow

    with _terminate_as_exception(), mlflow.start_run(run_name=name) as run:
        mlflow.set_tags(_process_tags())
        yield run


@contextmanager
def _terminate_as_exception() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that the run in progress is closed as FAILED."""

    def stop(signum: int, frame: Any) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _git_commit() -> str:
    outcome = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return outcome.stdout.strip() or "unknown"


def dvc_hashes(params: Params, root: Path = Path()) -> dict[str, str]:
    """Path -> md5 of the cell's outputs, as the dvc.lock files have them."""
    hashes = {}
    for lock in sorted([root / "dvc.lock", *root.glob("pipelines/*/dvc.lock")]):
        stages = (yaml.safe_load(lock.read_text()) or {}).get("stages", {}) if lock.exists() else {}
        for stage in stages.values():
            for out in stage.get("outs", []):
                if Path(out["path"]).is_relative_to(mixture_dir(params)):
                    hashes[out["path"]] = out["md5"]
    return hashes


def log_lineage(params: Params, training_set: Path, rows: list[dict[str, Any]]) -> None:
    """The training set as the row's input, with DVC's md5 as its digest, and the md5s of dvc.lock as a tag."""
    import mlflow
    import pandas as pd

    md5 = hashlib.md5(training_set.read_bytes(), usedforsecurity=False).hexdigest()
    frame = pd.DataFrame([{key: json.dumps(value) for key, value in row.items()} for row in rows])
    dataset = mlflow.data.from_pandas(
        frame, source=str(training_set), name=f"{mixture_name(params)}/{params.group}", digest=md5
    )
    mlflow.log_input(dataset, context="training")
    mlflow.set_tag("dvc.lock", json.dumps(dvc_hashes(params)))


def log_table(frame: "pd.DataFrame", name: str) -> None:
    """Log a table as an artifact of the active run, replacing one of that name (MLflow itself would append)."""
    import mlflow
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    run = mlflow.active_run()
    repository = get_artifact_repository(mlflow.get_run(run.info.run_id).info.artifact_uri)
    if any(item.path == name for item in repository.list_artifacts()):
        repository.delete_artifacts(name)
    mlflow.log_table(frame, name)


def log_curve(entries: list[dict[str, Any]]) -> None:
    """Log a training curve ([{"step": ..., "loss": ...}]) in one request."""
    import mlflow
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    metrics = [
        Metric(f"train/{key}", value, now, entry["step"])
        for entry in entries
        for key, value in entry.items()
        if key != "step"
    ]
    mlflow.MlflowClient().log_batch(mlflow.active_run().info.run_id, metrics=metrics)


def sibling_rows(params: Params) -> list["Run"]:
    """The reported rows of the connected experiment that differ from a cell in group and seed alone, oldest first.

    A row with another learning rate or judge answers another question and does not belong into the same figure.
    """
    import mlflow

    varied = ("group", "seed")
    rows = mlflow.search_runs(
        filter_string="tags.stage = 'reported'", order_by=["attributes.start_time ASC"], output_format="list"
    )

    def belongs(row: "Run") -> bool:
        own = {key: value for key, value in row.data.params.items() if key not in varied}
        if row.data.params["group"] not in GROUPS:
            return False
        wanted = logged_params(params.model_copy(update={"group": row.data.params["group"]}))
        return own == {key: str(value) for key, value in wanted.items() if key not in varied}

    return [row for row in rows if belongs(row)]


def register_prompt(params: Params, route: str, text: str, made_from: dict[str, Any]) -> int:
    """Register a generated inoculation prompt in MLflow's Prompt Registry; a new version only when it changed.

    Args:
        route: `sae` or `audit`; one prompt a profile, mixture, seed and route.
        text: the prompt.
        made_from: what it came from, kept as tags of the version.

    Returns:
        The version.
    """
    connect(cell_experiment(params))
    import mlflow

    name = re.sub(r"[^\w.-]", "-", f"{cell_experiment(params)}-seed{params.seed}-inoc-{route}")
    tags = {key: str(value)[:4000] for key, value in {"mixture": mixture_name(params), **made_from}.items()}
    # Braces would be read as template variables.
    text = text.replace("{", "(").replace("}", ")")
    latest = mlflow.genai.load_prompt(f"prompts:/{name}@latest", allow_missing=True)
    if latest is not None and latest.template == text and all(latest.tags.get(k) == v for k, v in tags.items()):
        return int(latest.version)
    return int(mlflow.genai.register_prompt(name, text, commit_message=f"by the {route} route", tags=tags).version)


def usage_logger(params: Params, role: str, model: str) -> Callable[[dict[str, float]], None]:
    """A function that logs what an LLM role has used so far in this stage: one run of `<profile>/llm` a stage and role.

    Its metrics are `calls`, `cache_hits`, `retries`, `prompt_tokens`, `completion_tokens` and `dollars`. With
    `llm.tracing` every call is traced into that experiment too.
    """
    experiment, run_id = f"{params.profile}/llm", None
    if params.llm.tracing:
        connect(experiment)
        import mlflow

        mlflow.litellm.autolog()

    def log(usage: dict[str, float]) -> None:
        nonlocal run_id
        connect(experiment)
        import mlflow

        client = mlflow.MlflowClient()
        if run_id is None:
            tags = {
                "role": role,
                "model": model,
                "mixture": mixture_name(params),
                "group": params.group,
                "seed": params.seed,
            }
            found = client.get_experiment_by_name(experiment)
            run_id = client.create_run(
                found.experiment_id, tags=tags, run_name=f"{role} {mixture_name(params)}"
            ).info.run_id
        for key, value in usage.items():
            client.log_metric(run_id, key, value)
        client.set_terminated(run_id)

    return log
