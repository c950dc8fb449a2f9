"""What a detector found, on disk: `flags.jsonl`, `marked.jsonl` and `detection.json` in one folder, alike for every detector."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from inoculation.detect import Detection
from inoculation.files import InputError, read_json, read_jsonl, write_json, write_jsonl
from inoculation.mixture import Row


def write_detection(folder: Path, detection: Detection, rows: Sequence[Row], **details: Any) -> None:
    """Write `flags.jsonl`, `marked.jsonl` and `detection.json` (with precision and recall where provenance is known).

    Args:
        rows: the mixture with its provenance.
        details: further keys of `detection.json`.
    """
    from inoculation.quality import flag_quality

    marks = zip(detection.flagged, detection.scores, strict=True)
    write_jsonl(folder / "flags.jsonl", ({"flagged": flag, "score": score} for flag, score in marks))
    write_jsonl(folder / "marked.jsonl", (one._asdict() for one in detection.marked))
    known = flag_quality(detection.flagged, [row.shows_negative for row in rows])
    told = {"found": detection.found, "reason": detection.reason, "prompt": detection.prompt, "quality": known}
    write_json(folder / "detection.json", told | details)


class Found(NamedTuple):
    """A detection as a group or an export uses it."""

    flagged: list[bool]
    scores: list[float | None]
    """The more suspicious the higher; None: not judged."""
    prompt: str | None
    """None: nothing was found, or no prompt explains what was flagged; then nothing is inoculated."""
    reason: str
    quality: dict[str, Any]


def read_found(folder: Path, rows: int) -> Found:
    """Read what a detector found.

    Args:
        rows: how many the mixture has.

    Raises:
        InputError: it is about another mixture.
    """
    told = read_json(folder / "detection.json")
    flags = read_jsonl(folder / "flags.jsonl", dict)
    if len(flags) != rows:
        raise InputError(f"{folder}: {len(flags)} flags for a mixture of {rows} rows; run the detector again")
    flagged, scores = [row["flagged"] for row in flags], [row["score"] for row in flags]
    return Found(flagged, scores, told["prompt"], told["reason"], told["quality"])
