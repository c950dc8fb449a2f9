"""A static page for a person: how the scores lie, which personas tell the rows apart, and the rows themselves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inoculation.detect import words
from inoculation.files import atomic
from inoculation.mixture import Row

SHOWN = 200
"""Flagged rows, and as many of the others that are nearest to them."""
BINS = 48


def write(
    path: Path, template: Path, title: str, rows: Sequence[Row], flags: Sequence[dict[str, Any]], told: dict[str, Any],
    pieces: Mapping[int, Sequence[tuple[str, int]]],
) -> None:  # fmt: skip
    """Write one self-contained HTML file. Text of the data set is escaped: it cannot become markup.

    Args:
        template: of the page (Jinja).
        rows: the mixture; only questions and responses are shown.
        flags: one a row, as `flags.jsonl` has them.
        told: `detection.json`.
        pieces: of some rows, as `read_marked` gives them.
    """
    from jinja2 import Environment

    def shown(flagged: bool, highest: bool) -> list[dict[str, Any]]:
        own = [i for i, flag in enumerate(flags) if flag["flagged"] is flagged and flag["score"] is not None]
        own.sort(key=lambda i: -flags[i]["score"] if highest else flags[i]["score"])
        return [
            {
                "row": i,
                "score": flags[i]["score"],
                "question": rows[i].prompt[-1].content[:160],
                "response": rows[i].response,
                "words": pieces.get(i),
            }
            for i in own[:SHOWN]
        ]

    page = Environment(autoescape=True).from_string(template.read_text(encoding="utf-8"))
    with atomic(path) as temporary:
        temporary.write_text(
            page.render(
                words=words,
                title=title,
                told=told,
                bars=histogram([flag["score"] for flag in flags], [flag["flagged"] for flag in flags]),
                flagged=shown(True, highest=True),
                doubtful=shown(True, highest=False)[:20],
                nearest=shown(False, highest=True)[:20],
            ),
            encoding="utf-8",
        )


def histogram(scores: Sequence[float | None], flagged: Sequence[bool]) -> list[dict[str, float]]:
    """Bars of a histogram in a box 100 wide and 30 high: x, width, height of all rows, and of the flagged ones."""
    import numpy as np

    known = [(score, flag) for score, flag in zip(scores, flagged, strict=True) if score is not None]
    if not known:
        return []
    values, marks = np.array([score for score, _ in known]), np.array([flag for _, flag in known])
    everything, edges = np.histogram(values, BINS)
    own, _ = np.histogram(values[marks], edges)
    unit = 30 / everything.max()
    return [
        {"x": 100 * place / BINS, "width": 0.9 * 100 / BINS, "all": float(count * unit), "flagged": float(part * unit)}
        for place, (count, part) in enumerate(zip(everything, own, strict=True))
    ]
