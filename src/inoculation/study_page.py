"""The study's report: one HTML file that tells it in order and opens offline."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from inoculation.detect import words
from inoculation.effects import VERDICTS, shown
from inoculation.files import atomic
from inoculation.groups import GROUPS
from inoculation.intervals import Counts, mark
from inoculation.study import Cell, Example, Figure, Outcome, listed

TEMPLATE = Path(__file__).with_name("study.html.j2")


def write(
    path: Path, told: Sequence[Outcome], figures: Sequence[Figure], missing: Sequence[Cell], examples: Sequence[Example],
    resamples: int,
) -> None:  # fmt: skip
    """Write the report. Text of data sets and models is escaped: it cannot become markup.

    Args:
        told: what the cells say, a question each.
        figures: drawn into the report's folder.
        missing: cells without a row.
        examples: flagged rows to show.
        resamples: bootstrap draws of the table's intervals.
    """
    from jinja2 import Environment

    pictures = [
        (figure, base64.b64encode((path.parent / f"figure-{figure.number:02}.png").read_bytes()).decode())
        for figure in figures
    ]
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    decided = [(outcome.question, one) for outcome in told for one in outcome.verdicts]
    with atomic(path) as temporary:
        temporary.write_text(
            page.render(
                told=told, tables=[effect_tables(outcome, resamples) for outcome in told], pictures=pictures,
                missing=len(missing), listed=listed(missing), examples=examples, groups=GROUPS, shown=shown, words=words,
                counts={name: sum(one.verdict == name for _, one in decided) for name in VERDICTS},
            ),
            encoding="utf-8",
        )  # fmt: skip


class Table(NamedTuple):
    """Rates of some traits under some evaluation prompts."""

    title: str
    columns: list[tuple[str, str]]
    """(evaluation prompt, trait)."""
    rows: list[dict[str, Any]]
    """A group each: `label`, `seeds`, and an entry a column: (rate, low, high, seeds), None where it was not judged."""


def effect_tables(outcome: Outcome, resamples: int) -> list[Table]:
    """Every trait under the first two prompts; where there are more, B under each: does it come back?"""
    counts = Counts(outcome.cells, resamples)
    chosen = {"": [(prompt, trait) for prompt in outcome.prompts[:2] for trait in outcome.traits]}
    if len(outcome.prompts) > 2:
        chosen["Does B come back? Its rate under every prompt"] = [
            (prompt, outcome.traits[1]) for prompt in outcome.prompts
        ]
    return [Table(title, columns, _rows(counts, columns)) for title, columns in chosen.items()]


def _rows(counts: Counts, columns: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    rows = []
    for group in (group for group in GROUPS if group in counts.groups()):
        entries: list[tuple[float, float, float, int] | None] = []
        for prompt, trait in columns:
            told = mark(counts, group, prompt, trait)
            entries.append((told.rate, told.low, told.high, len(told.seeds)) if told else None)
        rows.append({"label": GROUPS[group].label, "seeds": len(counts.seeds(group)), "entries": entries})
    return rows
