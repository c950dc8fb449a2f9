"""How good a detector's flags are against provenance: a metric, never an input."""

from collections.abc import Sequence

from inoculation.judge.quality import decision_quality


def quality(flags: Sequence[bool], truth: Sequence[bool | None]) -> dict[str, float | int | None]:
    """{precision, recall, f1, flagged, n}; the first three None where the truth is unknown.

    Precision is 0 when nothing is flagged, recall is 0 when nothing shows B.
    """
    known = [(flag, shows) for flag, shows in zip(flags, truth, strict=True) if shows is not None]
    scores = decision_quality([f for f, _ in known], [t for _, t in known]) if known else {}
    return {name: scores.get(name) for name in ("precision", "recall", "f1")} | {
        "flagged": int(sum(flags)),
        "n": len(flags),
    }
