"""Commands for a person, which are no stages: `plan`, `study`, `inoculate` and others."""

from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from mlflow.entities import Run

    from inoculation.study import Cell


class Command(NamedTuple):
    """What `--help` says of a command, and the options it takes."""

    help: str
    options: Mapping[str, dict[str, Any]] = MappingProxyType({})
    """Option -> argparse's keywords."""


def count(text: str) -> int:
    """A number of cells at once, for argparse."""
    return _between(text, 1, 1024)


def port(text: str) -> int:
    """A port, for argparse; 0 takes a free one."""
    return _between(text, 0, 65535)


def _between(text: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 6 and least <= int(text) <= most):
        raise ArgumentTypeError(f"{text!r}; valid: {least} to {most}")
    return int(text)


COMMANDS: dict[str, Command] = {
    "plan": Command("print the stages that the chosen cell needs, what is missing, and what it will take"),
    "compare": Command("print a table over all groups and seeds so far, from MLflow"),
    "study": Command(
        "run the study's cells that MLflow has no row of, in DVC's queue; then draw its figures and write its report",
        {
            "--mixtures": {"metavar": "A+B,...", "help": "default: every A with every B, e.g. all_caps+evil"},
            "--groups": {"metavar": "NAME,...", "help": "default: all; see the README's table"},
            "--seeds": {"metavar": "N,...", "default": "0,1,2", "help": "default: %(default)s"},
            "--transfer": {
                "metavar": "PROFILE,...",
                "help": "further models, trained on the first mixture under the annotator's flags and prompt",
            },
            "--jobs": {"type": count, "default": 1, "metavar": "N", "help": "cells at once (default: %(default)s)"},
            "--dry-run": {"action": "store_true", "help": "say what would run and how long it takes, and stop"},
            "--report-only": {"action": "store_true", "help": "run nothing: figures and report of what there is"},
        },
    ),
    "sweep": Command(
        "run groups at several values of one parameter, in DVC's queue; then draw A, B, precision and recall over it",
        {
            "parameter": {"metavar": "KEY=V1,V2,...", "help": "e.g. mixture.contamination=0.1,0.25,0.5,0.75"},
            "--mixture": {"metavar": "A+B", "help": "default: that of params.yaml"},
            "--groups": {"metavar": "NAME,...", "default": "baseline,inoc_selective", "help": "default: %(default)s"},
            "--seeds": {"metavar": "N,...", "default": "0", "help": "default: %(default)s"},
            "--jobs": {"type": count, "default": 1, "metavar": "N", "help": "cells at once (default: %(default)s)"},
            "--dry-run": {"action": "store_true", "help": "say what would run and how long it takes, and stop"},
            "--report-only": {"action": "store_true", "help": "run nothing: figure and table of what there is"},
        },
    ),
    "inoculate": Command(
        "find an unknown B in your own SFT data set and write it inoculated, with a page to review",
        {
            "file": {
                "type": Path,
                "help": "chat JSONL, ShareGPT, Alpaca, prompt and completion; .json, .parquet, or a folder saved by `datasets`",
            },
            "--out": {"type": Path, "default": Path("inoculated"), "metavar": "FOLDER", "help": "default: %(default)s"},
            "--annotator": {
                "default": "smollm2",
                "metavar": "PROFILE",
                "help": "whose model looks for B (default: %(default)s, from `make smollm2`)",
            },
            "--wanted": {
                "metavar": "A",
                "help": "the wanted trait A (default: all_caps where nearly all responses are in capitals, else other)",
            },
        },
    ),
    "review": Command(
        "show the review page of `inoculate`'s folder on this machine, and save what you decide",
        {
            "folder": {"type": Path, "nargs": "?", "default": Path("inoculated"), "help": "default: %(default)s"},
            "--port": {"type": port, "default": 5001, "help": "default: %(default)s"},
        },
    ),
    "pipelines": Command("write dvc.yaml and pipelines/*/dvc.yaml from the stages' declarations (for developers)"),
    "stale": Command("print which stages go stale when a module changes, as a table (for developers)"),
}
"""Name -> what it is; its function is below, by the same name."""


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
    from inoculation.params import parse_params
    from inoculation.paths import experiment

    raw = _raw()
    parse_params(raw)
    tracking.connect(experiment(raw))
    unknown: dict[str, list[str]] = {}

    def wanted(group: str) -> dict[str, Any] | None:
        identity = planning.identity_of(raw, group)
        if identity is None:
            unknown[group] = planning.absent(raw, group)
        return identity

    found = rows.siblings(wanted)
    if found:
        print(
            rows.table(
                found,
                experiment(raw),
                raw["evaluate"]["system_prompts"],
                planning.traits(raw),
                planning.judge_name(raw),
            )
        )
    elif not unknown:
        print(f"{experiment(raw)}: no cells so far; `dvc repro` runs the one that params.yaml chooses")
    for group, why in sorted(unknown.items()):
        print(f"\n{group}: its rows are not shown, for it cannot be said what they were made with: {'; '.join(why)}")


def study(
    mixtures: str | None, groups: str | None, seeds: str, transfer: str | None, jobs: int, dry_run: bool,
    report_only: bool,
) -> None:  # fmt: skip
    """Run what is missing of the study, and say what all of it says, in figures/study/."""
    from inoculation import study as whole
    from inoculation import study_page
    from inoculation.files import InputError
    from inoculation.params import parse_params
    from inoculation.store import main_checkout

    raw = _raw()
    parse_params(raw)
    chosen = whole.selection(raw, mixtures, groups, seeds, transfer)
    cells = whole.cells(raw, chosen)
    done = _run_missing(raw, cells, jobs, dry_run, report_only)
    if done is None:
        return
    if not done:
        raise InputError("MLflow has no row of these cells, and what was drawn of others stays as it is")
    left = [cell for cell in cells if cell not in done]
    told = whole.outcomes(raw, done)
    profile = str(raw["profile"])
    folder = main_checkout() / "figures" / "study" / profile / chosen.part
    drawn = whole.draw_all(folder, whole.figures(chosen, raw), told, raw)
    study_page.write(
        folder / "report.html",
        told,
        drawn,
        left,
        whole.examples(raw, done),
        raw["evaluate"]["bootstrap"],
    )
    whole.log_report(f"{profile}: {chosen.part}" if chosen.part else profile, folder, told)
    print(f"{len(done)} of {len(cells)} cells; {folder}/report.html")
    if left:
        raise SystemExit(1)


def sweep(
    parameter: str, mixture: str | None, groups: str, seeds: str, jobs: int, dry_run: bool, report_only: bool
) -> None:
    """Run what is missing of a sweep, and draw it, in figures/sweeps/."""
    from inoculation import study as whole
    from inoculation import sweep as over
    from inoculation.params import parse_params
    from inoculation.store import main_checkout

    raw = _raw()
    parse_params(raw)
    wanted = over.settings(raw, parameter)
    own = f"{raw['mixture']['positive']}+{raw['mixture']['negative']}"
    cells = over.cells(raw, whole.selection(raw, mixture or own, groups, seeds, None, "--mixture"), wanted)
    done = _run_missing(raw, cells, jobs, dry_run, report_only)
    if done is None:
        return
    written = over.write(raw, main_checkout() / "figures" / "sweeps" / str(raw["profile"]), done, wanted)
    print(f"{written.read_text(encoding='utf-8')}\n{len(done)} of {len(cells)} cells; {written.with_suffix('.png')}")
    if len(done) < len(cells):
        raise SystemExit(1)


def _run_missing(
    raw: dict[str, Any], cells: "Sequence[Cell]", jobs: int, dry_run: bool, report_only: bool
) -> "dict[Cell, Run] | None":
    """Run the cells that MLflow has no row of, say so, and return all rows; None after a dry run."""
    from inoculation import study as whole

    done = whole.rows_of(raw, cells)
    left = [cell for cell in cells if cell not in done]
    taken, unknown = whole.seconds(raw, left)
    print(f"{len(cells)} cells, {len(done)} of them done", end="")
    hours = f"{taken / 3600 / jobs:.1f} h with {jobs} at once" if taken else "an unknown time"
    print(f"; the other {len(left)}: {hours}" + (f", and {unknown} stages never measured here" if unknown else "") if left else "")  # fmt: skip
    if dry_run:
        for cell in left:
            print(f"  {cell}")
        return None
    for failure in [] if report_only or not left else whole.run(raw, left, jobs):
        print(f"failed: {failure.task}: {failure.reason} (`dvc queue logs {failure.task}` has the rest)")
    return whole.rows_of(raw, cells)


def inoculate(file: Path, out: Path, annotator: str, wanted: str | None) -> None:
    """Write a data set of one's own inoculated."""
    from inoculation.inoculate import describe, look_and_export

    print(describe(look_and_export(file, out, annotator, wanted), out))


def review(folder: Path, port: int) -> None:
    """Serve a review page until it is interrupted."""
    from contextlib import suppress

    from inoculation.review import server

    with server(folder, port) as running, suppress(KeyboardInterrupt):
        print(f"http://127.0.0.1:{running.server_port}/ (Ctrl-C ends it)", flush=True)
        running.serve_forever()


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
    from inoculation import timings

    timings.note(command if argument is None else f"{command} {argument}", _raw().get("profile"), seconds)


def _raw() -> dict[str, Any]:
    from inoculation.files import read_yaml

    return read_yaml(Path("params.yaml"))
