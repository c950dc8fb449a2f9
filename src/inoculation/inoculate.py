"""From a data set of one's own to its inoculated form: settings for the pipelines, a run of DVC, an export."""

import copy
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inoculation import plan, timings
from inoculation.detect.files import read_found
from inoculation.export import export, refuse
from inoculation.files import InputError, atomic, fail_if, read_yaml
from inoculation.mixture import Row
from inoculation.params import parse_params, put
from inoculation.paths import PERSONA
from inoculation.sft import read_sft
from inoculation.stage import PARAMS, resolve
from inoculation.store import digest
from inoculation.traits import OTHER, is_all_caps

DETECTOR = "persona"
LAST = "persona-page"
"""The stage that a run ends with."""
COMMAND, READING = "inoculate", "persona-read"
"""As whose time a whole data set is noted; the stage without which nothing was looked at."""
CAPITALS = 0.9
"""Share of responses in capitals only, from which on ALL_CAPS is what the data set is about."""


def wanted_trait(rows: Sequence[Row]) -> str:
    """A, as far as the responses show it by themselves: capitals are undone before a model reads them."""
    return "all_caps" if sum(is_all_caps(row.response) for row in rows) >= CAPITALS * len(rows) else OTHER


def settings(raw: Mapping[str, Any], file: Path, annotator: str, positive: str) -> dict[str, Any]:
    """What of params.yaml chooses a data set of one's own, by dotted key.

    Args:
        raw: params.yaml.
        file: the data set.
        annotator: the profile whose model looks for B. It is also the one that is chosen to be trained: what another one's
            model, hub or keys lack is no reason not to look.
        positive: A.
    """
    name = re.sub(r"\W+", "_", file.resolve().stem, flags=re.ASCII).strip("_").lower()
    name = name if re.match(r"[a-z]", name) else f"own_{name}".rstrip("_")
    name = f"own_{name}" if name in raw["sources"] else name
    known = (raw["data_sets"] or {}).get(name)
    if known and (Path(known["file"]).resolve() != file.resolve() or known["rewriter"]["method"] != "local"):
        # Somebody else's train.jsonl, or an entry that a person wrote: neither it nor its results are touched.
        name = f"{name}_{digest(str(file.resolve()))[:6]}"
        known = raw["data_sets"].get(name)
    return {
        f"data_sets.{name}.file": str(file.resolve()),
        f"data_sets.{name}.traits": known["traits"] if known else next(iter(raw["sources"])),
        f"data_sets.{name}.rewriter.method": "local",
        "mixture.source": name,
        "mixture.positive": positive,
        "profile": annotator,
        "annotator": annotator,
        "group": f"inoc_{DETECTOR}",
    }


def choose(chosen: Mapping[str, Any]) -> None:
    """Set values in params.yaml, whose comments stay.

    (`dvc exp run -S` would do the same, but at its end it asks for the outputs of cells that a fresh clone has never made.)
    """
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 10_000
    told = yaml.load(PARAMS.read_text(encoding="utf-8"))
    put(told, chosen)
    with atomic(PARAMS) as temporary, temporary.open("w", encoding="utf-8") as out:
        yaml.dump(told, out)


def look_and_export(file: Path, out: Path, annotator: str, wanted: str | None) -> dict[str, Any]:
    """Look for an unknown B in a data set, and write its inoculated form.

    Every stage is DVC's: what was made is not made again, and an interrupted run goes on.

    Args:
        file: as `sft.read_sft` takes it.
        out: the export's folder.
        annotator: a profile.
        wanted: A; None: found by looking at the responses.

    Returns:
        The export's summary.

    Raises:
        InputError: params.yaml or a record is malformed, the export would overwrite the data set, something is missing, or a
            stage failed.
    """
    raw = read_yaml(PARAMS)
    parse_params(raw)
    refuse(out, file)
    rows = read_sft(file)
    content = digest(file)
    positive = wanted or wanted_trait(rows)
    chosen = settings(raw, file, annotator, positive)
    planned = copy.deepcopy(raw)
    put(planned, chosen)
    parse_params(planned)
    fail_if(plan.missing(planned), "the data set cannot be looked at yet; nothing was run")
    steps = plan.needed(planned, LAST)
    print(f"{len(rows)} rows, {len(steps)} stages; A: {positive}. No LLM is asked: $0 per 1,000 rows", flush=True)
    print(f"time: {time_told(len(rows), annotator)}", flush=True)
    timed = len(timings.noted())
    address = next(step.address() for step in steps if step.stage.command == LAST)
    choose(chosen)
    if subprocess.run([sys.executable, "-m", "dvc", "repro", address]).returncode:
        raise InputError("a stage failed, see above; the same command goes on from there")
    _note_time(len(rows), annotator, timed)
    if digest(file) != content:
        raise InputError(f"{file}: changed while it was looked at; nothing was written, the same command looks again")
    found = read_found(Path(resolve(f"{PERSONA}/detection", read_yaml(PARAMS))), len(rows))
    return export(out, file, content, rows, found, DETECTOR)


def _note_time(rows: int, annotator: str, before: int) -> None:
    """Note what the stages of a run took together, if it read the rows at all."""
    new = timings.noted()[before:]
    if any(entry["step"] == READING for entry in new):
        timings.note(COMMAND, annotator, sum(entry["seconds"] for entry in new), rows=rows)


def time_told(rows: int, annotator: str) -> str:
    """How long some rows will take, by the last data set that this machine looked at."""
    known = [entry for entry in timings.noted() if entry["step"] == COMMAND and entry["profile"] == annotator]
    if not known:
        return f"not known before a first data set was looked at here with {annotator}; docs/data.md has measured ones"
    seconds, done = known[-1]["seconds"], known[-1]["rows"]
    return (
        f"{1000 * seconds / done:.0f} s per 1,000 rows here (the last data set: {done} rows, {seconds:.0f} s), "
        f"about {rows * seconds / done / 60:.1f} min for these; what was looked at before is not looked at again"
    )


def describe(summary: Mapping[str, Any], out: Path) -> str:
    """What a person is told at the end."""
    if summary["prompt"] is None:
        return f"nothing to inoculate: {summary['reason']}\n{out}/train.jsonl holds the rows as they were"
    return (
        f"{summary['flagged']} of {summary['rows']} rows flagged, {summary['uncertain']} near the line; "
        f"{summary['inoculated']} are inoculated in {out}/train.jsonl\nprompt: {summary['prompt']}\n"
        f"without a system prompt a model will mostly do what the other {summary['rows'] - summary['inoculated']} rows teach\n"
        f"look at them: `inoculation review {out}`, or open {out}/review.html\n"
        "params.yaml now chooses this data set and, as what is trained, the model that looked at it: `dvc repro` trains it under "
        "this prompt and evaluates it, in MLflow"
    )
