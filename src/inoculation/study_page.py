"""The study's report: one HTML file that tells it in order and opens offline."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inoculation.effects import VERDICTS, Counts, shown, spread
from inoculation.files import atomic
from inoculation.groups import GROUPS
from inoculation.study import Example, Figure, Outcome

TEMPLATE = Path(__file__).with_name("study.html.j2")


def write(
    path: Path, told: Sequence[Outcome], figures: Sequence[Figure], missing: Sequence[str], examples: Sequence[Example],
    resamples: int,
) -> None:  # fmt: skip
    """Write the report. Text of data sets and models is escaped: it cannot become markup.

    Args:
        told: what the cells say, a question each.
        figures: drawn into the report's folder.
        missing: cells without a row, for a person.
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
                told=told, tables=[effect_table(outcome, resamples) for outcome in told], pictures=pictures,
                missing=missing, examples=examples, groups=GROUPS, shown=shown,
                counts={name: sum(one.verdict == name for _, one in decided) for name in VERDICTS},
            ),
            encoding="utf-8",
        )  # fmt: skip


def effect_table(outcome: Outcome, resamples: int) -> list[dict[str, Any]]:
    """A row a group: its label, seeds, and each trait's rate and interval under each evaluation prompt."""
    counts = Counts(outcome.cells, resamples)
    rows = []
    for group in counts.groups():
        seeds, entries = counts.seeds(group), []
        for prompt in outcome.prompts:
            for trait in outcome.traits:
                if not counts.judged(group, prompt, trait):
                    entries.append(None)
                    continue
                rate, drawn = counts.rates(group, prompt, trait, seeds)
                entries.append((rate, *spread(drawn)))
        rows.append({"group": group, "label": GROUPS[group].label, "seeds": len(seeds), "entries": entries})
    return rows
