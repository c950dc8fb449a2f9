"""The rows one compares: one MLflow experiment a (profile, mixture), one run ("row") a cell.

A row is made whole from a cell's files by the `log` stage, which runs in every `dvc repro`: a cell that DVC took from its
cache, or whose bytes did not change, gets its row too. It is named by its group and seed; its tag `cell` is a digest of
everything that its results depend on (`plan.identity`), so that another learning rate is another row and another batch
size is not. A changed cell's new row is complete before the old one goes to MLflow's trash.
"""

import json
import re
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from inoculation.files import read_yaml
from inoculation.groups import GROUPS
from inoculation.intervals import CellRates
from inoculation.tracking import of_the_store, process_tags, terminate_as_exception

if TYPE_CHECKING:
    from mlflow import ActiveRun
    from mlflow.entities import Run

CELL_TAG, CONTENT_TAG, STAGE_TAG, TRAINED_ON_TAG = "cell", "content", "stage", "trained_on"
FEW = 3
"""Lines about what is not alike, at most: MLflow's note ends at 8,000 characters."""
LOCK_TAG = "dvc.lock"
"""Of a row: path -> md5 of all that was made for its cell."""
VERSION_TAG = "version"
"""Of a cell's row: one more than that of the row it replaces. Clocks may jump; this decides which row stays."""
REPORTED = "reported"


def find(cell: str) -> "list[Run]":
    """The complete rows of a cell in the connected experiment, the newest first."""
    import mlflow

    return mlflow.search_runs(
        filter_string=f"tags.{CELL_TAG} = '{cell}' and tags.{STAGE_TAG} = '{REPORTED}'",
        order_by=["attributes.start_time DESC"],
        output_format="list",
    )


def reported() -> "dict[str, dict[str, Run]]":
    """Every complete row there is: experiment -> digest of the cell -> row.

    Raises:
        StoreError: the store cannot be reached, or is damaged.
    """
    import mlflow

    from inoculation.tracking import existing_store, store_uri

    told: dict[str, dict[str, Run]] = defaultdict(dict)
    with of_the_store():
        client = existing_store()
        if client is None:
            return {}
        mlflow.set_tracking_uri(store_uri())
        names = {found.experiment_id: found.name for found in client.search_experiments()}
        for row in mlflow.search_runs(
            list(names), filter_string=f"tags.{STAGE_TAG} = '{REPORTED}'", output_format="list"
        ) if names else []:  # fmt: skip
            told[names[row.info.experiment_id]][row.data.tags[CELL_TAG]] = row
    return told


def siblings(wanted: Callable[[str], Mapping[str, Any] | None]) -> "list[Run]":
    """The complete rows of the connected experiment that answer the same question as a cell, oldest first.

    A row with another learning rate or judge answers another question and does not belong into the same figure.

    Args:
        wanted: group -> what a row of that group logs when it differs from the cell in group and seed alone; None where
            that cannot be said.
    """
    import mlflow

    rows = mlflow.search_runs(
        filter_string=f"tags.{STAGE_TAG} = '{REPORTED}'", order_by=["attributes.start_time ASC"], output_format="list"
    )
    known = {name: wanted(name) for name in {row.data.params.get("group") for row in rows} & {*GROUPS}}

    def without(params: Mapping[str, Any]) -> dict[str, str]:
        return {key: str(value) for key, value in params.items() if key not in ("group", "seed")}

    chosen = []
    for row in rows:
        alike = known.get(row.data.params.get("group", ""))
        if alike is not None and without(row.data.params) == without(alike):
            chosen.append(row)
    return chosen


@contextmanager
def new_row(name: str, tags: Mapping[str, str], params: Mapping[str, Any], cell: str) -> "Iterator[ActiveRun]":
    """Open a new row for a cell; when the block ends well it counts, and what the cell had before goes to the trash.

    Args:
        name: for a person, e.g. `inoc_selective/seed0`.
        tags: of the row.
        params: what its results depend on.
        cell: their digest.
    """
    import mlflow

    def rank(row: "Run") -> tuple[int, str]:
        return int(row.data.tags.get(VERSION_TAG, 0)), row.info.run_id

    version = 1 + max((rank(row)[0] for row in find(cell)), default=0)
    run = None
    with of_the_store():
        try:
            with terminate_as_exception(), mlflow.start_run(run_name=name) as run:
                mlflow.set_tags({**process_tags(), **tags, CELL_TAG: cell, VERSION_TAG: str(version)})
                mlflow.log_params(params)
                yield run
                mlflow.set_tag(STAGE_TAG, REPORTED)
        except mlflow.MlflowException:
            # Another process logged the same cell, and its row stays: this one is in the trash before it could end.
            if run is None or mlflow.get_run(run.info.run_id).info.lifecycle_stage != "deleted":
                raise
        # Whoever looks last sees the rows of both, and all agree which one stays.
        for old in sorted(find(cell), key=rank)[:-1]:
            mlflow.delete_run(old.info.run_id)


def git_commit() -> str:
    """The commit that is checked out."""
    outcome = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return outcome.stdout.strip() or "unknown"


def dvc_hashes(paths: Iterable[Path], root: Path = Path()) -> dict[str, str]:
    """Path -> md5 of a cell's outputs, as the dvc.lock files have them."""
    wanted = {str(path) for path in paths}
    hashes = {}
    for lock in sorted([root / "dvc.lock", *root.glob("pipelines/*/dvc.lock")]):
        stages = (read_yaml(lock) or {}).get("stages", {}) if lock.exists() else {}
        for stage in stages.values():
            for out in stage.get("outs", []):
                if out["path"] in wanted:
                    hashes[out["path"]] = out["md5"]
    return hashes


def log_curve(entries: Sequence[Mapping[str, Any]]) -> None:
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


def register_prompt(experiment: str, seed: int, route: str, text: str, made_from: Mapping[str, Any]) -> int:
    """Register a generated inoculation prompt in MLflow's Prompt Registry; a new version only when it changed.

    Args:
        experiment: of the cell, e.g. `pocket/pocket_chats/all_caps+evil-0.5`.
        seed: of the mixture.
        route: which detector; one prompt a profile, mixture, seed and route.
        text: the prompt.
        made_from: what it came from, kept as tags of the version.

    Returns:
        The version.
    """
    import mlflow

    name = re.sub(r"[^\w.-]", "-", f"{experiment}-seed{seed}-inoc-{route}")
    tags = {key: str(value)[:4000] for key, value in {"mixture": experiment, **made_from}.items()}
    # Braces would be read as template variables.
    text = text.replace("{", "(").replace("}", ")")
    latest = mlflow.genai.load_prompt(f"prompts:/{name}@latest", allow_missing=True)
    if latest is not None and latest.template == text and all(latest.tags.get(k) == v for k, v in tags.items()):
        return int(latest.version)
    return int(mlflow.genai.register_prompt(name, text, commit_message=f"by the {route} route", tags=tags).version)


def table(found: "Sequence[Run]", title: str, prompts: Sequence[str], traits: Sequence[str], judge: str) -> str:
    """A Markdown table of rates over groups and seeds, by the judge and, where there is one, by the exact judge.

    Args:
        found: rows that differ in group and seed alone.
        title: of the comparison.
        prompts: the evaluation prompts.
        traits: A, B, then C.
        judge: its name.
    """
    import mlflow

    rates = {row.info.run_id: mlflow.artifacts.load_dict(f"{row.info.artifact_uri}/metrics.json") for row in found}
    lines: list[str] = []
    columns = [(prompt, trait) for prompt in prompts for trait in traits]
    for who, part in ((judge, None), ("exact judge of the generated world", "oracle")):
        told = {run: own.get(part, {}) if part else own for run, own in rates.items()}
        values = {
            row.info.run_id: [told[row.info.run_id].get(prompt, {}).get(trait, {}).get("rate") for prompt, trait in columns]
            for row in found
        }  # fmt: skip
        if all(value is None for own in values.values() for value in own):
            continue
        lines += ["", f"{title}, judge: {who}; mean rate ± sample standard deviation over seeds", ""]
        lines.append("| group | seeds |" + "".join(f" {prompt}: {trait} |" for prompt, trait in columns))
        lines.append("|---|---|" + "---|" * len(columns))
        for group in GROUPS:
            chosen = [row for row in found if row.data.params["group"] == group]
            if chosen:
                own = zip(*(values[row.info.run_id] for row in chosen), strict=True)
                shown = "".join(_entry(column) for column in own)
                lines.append(f"| `{group}` | {len(chosen)} |{shown}")
    apart = unlike(found)
    notes = same_training_sets(found) + apart[:FEW] + ([f"and {len(apart) - FEW} more"] if len(apart) > FEW else [])
    return "\n".join(lines + (["", *notes] if notes else []))


def _entry(seeds: "Sequence[float | None]") -> str:
    """A trait's rate in every seed, None where it was not judged, as a cell of the table."""
    values = [value for value in seeds if value is not None]
    if not values:
        return " - |"
    few = "" if len(values) == len(seeds) else f" ({len(values)} of {len(seeds)} seeds)"
    return f" {mean(values):.2f} ± {stdev(values):.2f}{few} |" if len(values) > 1 else f" {values[0]:.2f}{few} |"


def same_training_sets(found: "Sequence[Run]") -> list[str]:
    """A line for every set of groups that trained on the same bytes: their rows agree because they are one experiment."""
    by: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in found:
        if GROUPS[row.data.params["group"]].trains:
            by[row.data.params["seed"], row.data.tags.get(TRAINED_ON_TAG, row.info.run_id)].append(
                row.data.params["group"]
            )
    alike: dict[str, list[str]] = defaultdict(list)
    for (seed, _), groups in by.items():
        if len(groups) > 1:
            alike[", ".join(groups)].append(seed)
    return [f"Same training set, byte for byte: {groups} (seed {', '.join(seeds)})" for groups, seeds in alike.items()]


def unlike(found: "Sequence[Run]") -> list[str]:
    """A line for whatever the rows of a seed should share and do not: made by other code, or of other data.

    By DVC's hashes, of what is named by the seed (mixture, judge, what a detector found). A row says which parameters it
    depends on; code, and what stands in a file, change under the same ones.
    """
    made: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in found:
        for path, md5 in json.loads(row.data.tags.get(LOCK_TAG, "{}")).items():
            if f"seed{row.data.params['seed']}" in Path(path).parts:
                made[path][md5].append(row.data.params["group"])
    return [
        f"**Not alike**: `{path}` was one for {', and another for '.join(', '.join(groups) for groups in versions.values())}; "
        "what differs between them may be that. `dvc repro` of the older cells makes them alike"
        for path, versions in sorted(made.items())
        if len(versions) > 1
    ]


def counted(row: "Run") -> CellRates:
    """What was counted of a row's cell."""
    import mlflow

    questions = mlflow.artifacts.load_dict(f"{row.info.artifact_uri}/questions.json")
    return CellRates(row.data.params["group"], int(row.data.params["seed"]), questions)


VIEW = "headline"
"""The view of the run list that has the headline as its columns: MLflow shows no metric by itself."""
COLUMNS = ("A", "B", "C", "B_control", "precision", "recall")


def view() -> tuple[str, str]:
    """The tag of an experiment that makes `VIEW`, and its value: a shared view of MLflow's page, rows by name."""
    state = {
        "orderByKey": "attributes.`run_name`", "orderByAsc": True,
        "selectedColumns": [f"metrics.`{name}`" for name in COLUMNS],
    }  # fmt: skip
    return f"mlflow.sharedViewState.{VIEW}", json.dumps(state)


def note(traits: Sequence[str], table: str, verdicts: str, drawing: str, experiment_id: str) -> str:
    """What MLflow shows above an experiment's rows, as Markdown; `drawing` is where the figure lies in the checkout."""
    positive, negative, *others = traits
    meanings = "\n".join(f"- `{name}`: {rule.label}. {rule.meaning}" for name, rule in GROUPS.items())
    return f"""[**The runs with A, B and C as columns**](#/experiments/{experiment_id}/runs?viewStateShareKey={VIEW})

**A = {positive}** (wanted), **B = {negative}** (unwanted, in part of the data),
**C = mean of {" and ".join(others)}** (unwanted, in none).

Metrics `A`, `B`, `C`: share of answers that show it under the default prompt; `*_control`: under another.
`precision`, `recall`: of a detector's flags. The figure is `{drawing}` and, on the newest row, the artifact `figure/`.

{table}

{verdicts}

Groups, by what their system prompt while training is:

{meanings}
"""
