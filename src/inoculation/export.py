"""An inoculated data set: one's own rows, the flagged ones under the prompt that a detector wrote, and a page to review them.

train.jsonl    {"messages": [...]} a row, in the order of the data set: for TRL, Axolotl, OpenAI's fine-tuning
prompt.txt     the inoculation prompt; absent where nothing was found
flags.jsonl    a row each: flagged, score, uncertain, and what a person decided
summary.json   what was found and why, by which detector, in numbers
review.html    the flagged rows and those nearest to them; `inoculation review FOLDER` saves what a person decides
review.json    row -> whether it is inoculated, as decided; what the export uses from then on
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from inoculation.detect.files import Found
from inoculation.files import InputError, atomic, read_json, read_jsonl, write_json, write_jsonl
from inoculation.mixture import Row, TrainingChat
from inoculation.sft import read_sft
from inoculation.stage import complaints
from inoculation.store import digest

TEMPLATE = Path(__file__).with_name("review.html.j2")
UNCERTAIN = 0.05
"""Share of the rows, on either side of the line between flagged and others, that a person should look at first."""
SHOWN = 200
"""Rows of the others that the page shows, the most suspicious first."""


class Summary(BaseModel):
    """The content of summary.json."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    source: Annotated[str, Field(pattern=r"^[^\x00]+$")]
    """The data set's path."""
    data: str
    """Its digest."""
    rows: int
    detector: str
    flagged: int
    uncertain: int
    not_judged: int
    decided_by_a_person: int
    inoculated: int
    prompt: str | None
    reason: str


class Flag(BaseModel):
    """What is read back of a line of flags.jsonl."""

    model_config = ConfigDict(frozen=True, strict=True)

    flagged: bool
    score: float | None


class Mark(NamedTuple):
    """What is said of one row."""

    flagged: bool
    """By the detector."""
    score: float | None
    """The more suspicious the higher; None: not judged."""
    uncertain: bool
    """Near the line."""
    decided: bool | None
    """By a person; None: not looked at."""

    @property
    def inoculated(self) -> bool:
        return self.flagged if self.decided is None else self.decided


def mark(
    flagged: Sequence[bool], scores: Sequence[float | None], decided: Mapping[int, bool], found: bool
) -> list[Mark]:
    """A mark for every row.

    Args:
        flagged: by the detector, one a row.
        scores: one a row.
        decided: row -> a person's decision.
        found: whether the detector found anything; else nothing is uncertain.
    """
    near: set[int] = set()
    if found:
        amount = max(1, round(UNCERTAIN * len(flagged)))
        known = sorted((score, i) for i, score in enumerate(scores) if score is not None)
        near = {i for _, i in [one for one in known if not flagged[one[1]]][-amount:]}
        near |= {i for _, i in [one for one in known if flagged[one[1]]][:amount]}
    return [
        Mark(flag, score, i in near, decided.get(i))
        for i, (flag, score) in enumerate(zip(flagged, scores, strict=True))
    ]


def parse_review(raw: Any, rows: int) -> dict[int, bool]:
    """The decisions of a review.

    Raises:
        ValueError: not an object of row numbers and true or false, or about rows that are not there.
    """
    decided = raw.get("decided") if isinstance(raw, dict) else None
    if not isinstance(decided, dict) or not all(isinstance(value, bool) for value in decided.values()):
        raise ValueError('an object {"decided": {"<row>": true or false}} is expected')
    for key in decided:
        if not (key.isascii() and key.isdecimal() and int(key) < rows):
            raise ValueError(f"row {key!r} is not one of 0-{rows - 1}")
    return {int(key): value for key, value in decided.items()}


WRITTEN = ("train.jsonl", "flags.jsonl", "summary.json", "prompt.txt", "review.json", "review.html")
"""All files of an export."""
FIRST = "flags.jsonl"
"""The one that is written first: where it is, an export wrote the others."""


def refuse(folder: Path, source: Path) -> None:
    """Before any work: nothing of an export may lie where the data set or somebody else's file does, or where no folder can be.

    Raises:
        InputError: it would.
    """
    inside = source.is_dir() and folder.resolve().is_relative_to(source.resolve())
    if inside or any((folder / name).resolve() == source.resolve() for name in WRITTEN):
        raise InputError(f"--out {folder}: the data set itself, {source}, would be overwritten; valid: another folder")
    lying = [name for name in WRITTEN if (folder / name).exists()]
    if lying and FIRST not in lying:
        raise InputError(
            f"--out {folder}: {', '.join(lying)} there would be overwritten, and no export wrote them; valid: another folder"
        )
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"--out {folder}: {there} is no folder that can be written to")


def export(
    folder: Path, source: Path, content: str, rows: Sequence[Row], found: Found, detector: str
) -> dict[str, Any]:
    """Write the folder; a review that lies in it, of the same data, is used, one of other data put aside.

    Args:
        folder: made where it is not there; other files in it stay.
        source: the data set.
        content: its digest.
        rows: its rows.
        found: what a detector found in them.
        detector: its name.

    Returns:
        The summary.

    Raises:
        InputError: review.json is damaged.
    """
    decided: dict[int, bool] = {}
    review = folder / "review.json"
    if review.exists():
        saved = read_json(review)
        try:
            if not isinstance(saved, dict):
                raise ValueError("an object is expected")
            if saved.get("data") == content:
                decided = parse_review(saved, len(rows))
            elif saved.get("decided"):
                kept = review.rename(folder / f"review-{digest(review)}.json")
                print(
                    f"{review}: what was decided is about another version of the data set, and not used; kept as {kept}"
                )
        except ValueError as error:
            raise InputError(f"{review}: {error}; correct it, or delete it to use the detector's flags alone") from None
    marks = mark(found.flagged, found.scores, decided, found.prompt is not None)
    chats = [
        TrainingChat.under(found.prompt if own.inoculated else None, row) for row, own in zip(rows, marks, strict=True)
    ]
    inoculated = sum(own.inoculated for own in marks) if found.prompt else 0
    summary = Summary(
        source=str(source.resolve()), data=content, rows=len(rows), detector=detector,
        flagged=sum(found.flagged), uncertain=sum(own.uncertain for own in marks),
        not_judged=sum(own.score is None for own in marks), decided_by_a_person=len(decided),
        inoculated=inoculated, prompt=found.prompt, reason=found.reason,
    ).model_dump()  # fmt: skip
    write_jsonl(folder / FIRST, ({"row": i, **own._asdict()} for i, own in enumerate(marks)))
    write_jsonl(folder / "train.jsonl", (chat.as_json() for chat in chats))
    write_json(folder / "summary.json", summary)
    prompt = folder / "prompt.txt"
    prompt.unlink(missing_ok=True)
    if found.prompt:
        with atomic(prompt) as temporary:
            temporary.write_text(found.prompt + "\n", encoding="utf-8")
    write_review_page(folder / "review.html", rows, marks, summary)
    return summary


def read_summary(folder: Path) -> Summary:
    """What was found, as `export` wrote it.

    Raises:
        InputError: the folder was not made by `export`.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; `inoculation inoculate FILE --out {folder}` writes one")
    path = folder / "summary.json"
    try:
        return Summary.model_validate(read_json(path))
    except ValidationError as error:
        raise InputError(f"{path}{next(complaints(error))}; `inoculation inoculate` writes it anew") from None


def again(folder: Path) -> dict[str, Any]:
    """Export once more, after a review.

    Raises:
        InputError: the folder was not made by `export`, or its data set has changed since.
    """
    summary = read_summary(folder)
    flags = read_jsonl(folder / "flags.jsonl", Flag.model_validate)
    source = Path(summary.source)
    # A folder may come from somebody else, and names a file here: a device is read without end, / nearly so.
    try:
        known = source.is_file() or any(
            (source / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")
        )
    except OSError:  # a name that is too long for the file system
        known = False
    if not known or digest(source) != summary.data:
        raise InputError(f"{source}: gone, or changed since it was looked at; run `inoculation inoculate` again")
    rows = read_sft(source)
    if len(flags) != len(rows):
        raise InputError(
            f"{folder}/flags.jsonl: {len(flags)} flags for {len(rows)} rows; run `inoculation inoculate` again"
        )
    found = Found([flag.flagged for flag in flags], [flag.score for flag in flags], summary.prompt, summary.reason, {})
    return export(folder, source, summary.data, rows, found, summary.detector)


def write_review_page(path: Path, rows: Sequence[Row], marks: Sequence[Mark], summary: Mapping[str, Any]) -> None:
    """One self-contained page; text of the data set is escaped."""
    from jinja2 import Environment

    def shown(wanted: Sequence[int]) -> list[dict[str, Any]]:
        return [
            {"row": i, "mark": marks[i], "question": rows[i].prompt[-1].content, "response": rows[i].response,
             "system": rows[i].system, "turns": len(rows[i].messages)}
            for i in wanted
        ]  # fmt: skip

    def by_score(wanted: Sequence[int]) -> list[int]:
        return sorted(wanted, key=lambda i: -(marks[i].score if marks[i].score is not None else float("-inf")))

    flagged = by_score([i for i, own in enumerate(marks) if own.flagged or own.decided])
    others = by_score([i for i, own in enumerate(marks) if not (own.flagged or own.decided)])[:SHOWN]
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    with atomic(path) as temporary:
        temporary.write_text(
            page.render(summary=summary, flagged=shown(flagged), others=shown(others)), encoding="utf-8"
        )
