"""How effects and detection move with one parameter: cells at several of its values, and a figure over them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from inoculation import plan, study
from inoculation.figure import Point, draw_sweep
from inoculation.files import InputError, atomic, fail_if
from inoculation.groups import GROUPS
from inoculation.intervals import marks
from inoculation.stage import lookup
from inoculation.study import Cell, Selection, Setting

if TYPE_CHECKING:
    from mlflow.entities import Run

CHOSEN = ("group", "seed", "profile", "mixture.positive", "mixture.negative")
"""Parameters that have an option of their own."""


def settings(raw: Mapping[str, Any], told: str) -> list[Setting]:
    """`mixture.contamination=0.1,0.5` as its settings, in the order given.

    Raises:
        InputError: no such parameter, no values, a value twice, or a parameter that an option chooses.
    """
    key, _, values = told.partition("=")
    names = [name.strip() for name in values.split(",")]
    problems = []
    if key in CHOSEN:
        problems.append(f"{key!r} is chosen by --groups, --seeds, --mixture, or in params.yaml")
    elif isinstance(lookup(raw, key), Mapping | list):
        problems.append(f"{key!r} is a table or a list: name one value in it")
    if not all(names):
        problems.append(f"{told!r} names no value, or an empty one; e.g. mixture.contamination=0.1,0.25,0.5")
    found = [Setting(key, name) for name in names]
    values: list[Any] = []
    for one in found:
        try:
            values.append(one.parsed())
        except ValueError as error:
            problems.append(str(error))
    problems += [f"{value!r} stands twice" for i, value in enumerate(values) if value in values[:i]]
    fail_if(problems, "the sweep cannot be run")
    return found


def cells(raw: Mapping[str, Any], chosen: Selection, wanted: Sequence[Setting]) -> list[Cell]:
    """Every cell of a selection at every setting, group by group.

    Raises:
        InputError: a value is wrong, or a group makes no sense at it (all are listed).
    """
    found = [cell._replace(setting=one) for cell in study.cells(raw, chosen) for one in wanted]
    fail_if(study.mistakes(raw, found) or _one_row(raw, found, wanted[0].key), "the sweep cannot be run")
    return found


def _one_row(raw: Mapping[str, Any], found: Sequence[Cell], key: str) -> list[str]:
    """Why the values of a parameter would not have rows of their own, where they would not."""
    if plan.makes_models(found[0].params(raw), key):
        return [
            f"{key} makes the model or SAE that a cell starts from, not the cell; valid: set it in params.yaml, `dvc repro`, and "
            "the sweep of another parameter, or the study"
        ]
    names: dict[Cell, list[str]] = defaultdict(list)
    for cell in found:
        names[cell._replace(setting=None)].append(plan.cell_id(plan.identity(cell.params(raw), disk=False)))
    if all(len(set(own)) == 1 < len(own) for own in names.values()):
        groups = ", ".join(dict.fromkeys(cell.group for cell in names))
        return [f"{key} makes no other experiment of {groups}: all its values would be one row"]
    return []


def points(raw: Mapping[str, Any], rows: "Mapping[Cell, Run]", wanted: Sequence[Setting]) -> list[Point]:
    """What the rows of a sweep say, value by value."""
    from inoculation.rows import counted

    prompt, resamples = raw["evaluate"]["system_prompts"][0], raw["evaluate"]["bootstrap"]
    told = []
    for one in wanted:
        own = {cell: row for cell, row in rows.items() if cell.setting == one}
        drawn = marks([counted(row) for row in own.values()], prompt, resamples)
        for group in (group for group in GROUPS if any(cell.group == group for cell in own)):
            mine = [row for cell, row in own.items() if cell.group == group]
            quality = {
                name: [row.data.metrics[name] for row in mine if name in row.data.metrics]
                for name in ("precision", "recall")
            }
            told.append(
                Point(
                    one.value, group,
                    {trait: (mark.rate, mark.low, mark.high) for (name, trait), mark in drawn.items() if name == group},
                    {name: (mean(own), min(own), max(own)) for name, own in quality.items() if own},
                    len(mine),
                )
            )  # fmt: skip
    return told


def table(told: Sequence[Point], key: str, traits: Sequence[str]) -> str:
    """The points as Markdown: A, B, precision and recall by value and group."""

    def shown(entry: tuple[float, float, float] | None) -> str:
        return f"{entry[0]:.2f} [{entry[1]:.2f}, {entry[2]:.2f}]" if entry else "-"

    lines = [
        f"| {key} | group | A: {traits[0]} | B: {traits[1]} | precision | recall | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one.value} | {GROUPS[one.group].label} | {shown(one.rates.get(traits[0]))} | {shown(one.rates.get(traits[1]))} "
        f"| {shown(one.found.get('precision'))} | {shown(one.found.get('recall'))} | {one.seeds} |"
        for one in told
    ]
    return "\n".join(lines) + "\n"


def write(raw: Mapping[str, Any], folder: Path, rows: "Mapping[Cell, Run]", wanted: Sequence[Setting]) -> Path:
    """Draw the figure and write the table, `<A>+<B>-<key>.png`, `.svg`, `.pdf` and `.md`, and log them to MLflow's `study`.

    Returns:
        The table's path.

    Raises:
        InputError: there is no row.
    """
    import mlflow

    if not rows:
        raise InputError("MLflow has no row of this sweep: run it without --report-only")
    first = next(iter(rows))
    told, traits, key = points(raw, rows, wanted), plan.traits(first.params(raw)), wanted[0].key
    title, name = f"{first.question}: over {key}", f"{'+'.join(traits[:2])}-{key}"
    draw_sweep(
        [folder / f"{name}.{suffix}" for suffix in ("png", "svg", "pdf")], told, [one.value for one in wanted], key,
        {f"A: {traits[0]}": traits[0], f"B: {traits[1]}": traits[1]}, title,
    )  # fmt: skip
    path, text = folder / f"{name}.md", table(told, key, traits)
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    with study.replacing_run(title):
        for drawn in folder.glob(f"{name}.*"):
            mlflow.log_artifact(str(drawn))
        mlflow.set_tag("mlflow.note.content", text)
    return path
