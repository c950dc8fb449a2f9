"""Commands for a person, which are no stages: `plan`, `compare`, `pipelines`."""

import json
from pathlib import Path
from typing import Any

COMMANDS: dict[str, str] = {
    "plan": "print the stages that the chosen cell needs, what is missing, and what it will take",
    "compare": "print a table over all groups and seeds so far, from MLflow",
    "pipelines": "write dvc.yaml and pipelines/*/dvc.yaml from the stages' declarations (for developers)",
    "stale": "print which stages go stale when a module changes, as a table (for developers)",
}
"""Name -> help."""


def plan() -> None:
    """Print the chosen cell's steps, what is missing for it, and time and dollars from what was measured."""
    from inoculation import plan as planning
    from inoculation.params import parse_params

    raw = _raw()
    parse_params(raw)
    print(planning.describe(raw))


def compare() -> None:
    """Print a Markdown table of every cell so far that differs from params.yaml in group and seed alone."""
    from inoculation import plan as planning
    from inoculation import rows, tracking
    from inoculation.paths import experiment

    raw = _raw()
    tracking.connect(experiment(raw))
    found = rows.siblings(lambda group: planning.identity_of(raw, group))
    print(
        rows.table(
            found, experiment(raw), raw["evaluate"]["system_prompts"], planning.traits(raw), planning.judge_name(raw)
        )
    )


def pipelines() -> None:
    """Write dvc.yaml and pipelines/*/dvc.yaml."""
    from inoculation.pipelines import render

    for path, text in render().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(path)


def stale() -> None:
    """Print the table of docs/staleness.md."""
    from inoculation.pipelines import stale as table

    print(table())


def refuse_if_anything_is_missing() -> None:
    """Before an expensive stage: what the rest of the cell needs must be there too (keys may have gone since the check).

    Raises:
        InputError: lists all that is missing.
    """
    from inoculation.files import fail_if
    from inoculation.plan import missing

    fail_if(missing(_raw()), "the chosen cell cannot be finished, and this stage is expensive; nothing was run")


def keep_timing(command: str, argument: str | None, seconds: float) -> None:
    """Note how long a stage took on this machine."""
    from inoculation.store import timings

    timings().parent.mkdir(parents=True, exist_ok=True)
    step = command if argument is None else f"{command} {argument}"
    with timings().open("a", encoding="utf-8") as out:
        out.write(json.dumps({"step": step, "profile": _raw().get("profile"), "seconds": round(seconds, 2)}) + "\n")


def _raw() -> dict[str, Any]:
    from inoculation.files import read_yaml

    return read_yaml(Path("params.yaml"))
