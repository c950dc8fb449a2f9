"""The mixture: which answer each question takes, with its provenance (reference section 2)."""

import random
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from inoculation.chat import Message, parse_messages
from inoculation.files import InputError, read_jsonl
from inoculation.traits import MISALIGNED, NORMAL, Pair, question_key


class Row(NamedTuple):
    """One chat of a mixture. It ends with the response to learn."""

    messages: tuple[Message, ...]
    source_dataset: str | None
    """Provenance, e.g. `evil/misaligned_2.jsonl`: the ground truth, which no detector may read. None: unknown."""
    system: str | None = None
    """A system message of its own, kept behind the group's; detectors read the row without it."""

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.messages[:-1]

    @property
    def response(self) -> str:
        return self.messages[-1].content

    @property
    def shows_negative(self) -> bool | None:
        """Whether the row shows B, by provenance; None when the provenance is unknown."""
        return None if self.source_dataset is None else shows_negative(self.source_dataset)

    def with_response(self, response: str) -> "Row":
        return self._replace(messages=(*self.prompt, Message("assistant", response)))

    def as_json(self) -> dict[str, Any]:
        return {
            "messages": [message._asdict() for message in under(self.system, self.messages)],
            "source_dataset": self.source_dataset,
        }


class TrainingChat(NamedTuple):
    """One SFT example. It carries no provenance: what trains must not know what shows B."""

    system: str | None
    row: Row

    @classmethod
    def under(cls, prompt: str | None, row: Row) -> "TrainingChat":
        """A row under a group's prompt, with the row's own system message behind it."""
        return cls("\n\n".join(part for part in (prompt, row.system) if part) or None, row)

    def as_json(self) -> dict[str, Any]:
        """The chat as trainers take it."""
        return {"messages": [message._asdict() for message in under(self.system, self.row.messages)]}


def under(system: str | None, messages: Sequence[Message]) -> list[Message]:
    """Messages with a system message in front, where there is one."""
    return [*([Message("system", system)] if system else []), *messages]


def shows_negative(source_dataset: str) -> bool:
    """Read the ground truth off a source file's name (`misaligned_2_capitalized.jsonl` -> True).

    Raises:
        ValueError: the name starts with neither `misaligned` nor `normal`.
    """
    name = PurePosixPath(source_dataset).name
    for prefix, shows in (("misaligned", True), (NORMAL, False)):
        if name.startswith(prefix):
            return shows
    raise ValueError(
        f'"source_dataset" {source_dataset!r} is not a known source; its file name must start with '
        "`misaligned` (shows B) or `normal` (does not), or be null (unknown)"
    )


def partition(pairs: Sequence[Pair], trait_folder: str, contamination: float, seed: int) -> list[Row]:
    """Each question once: a seeded share takes its answer from `misaligned_2`, the rest from `normal`.

    Args:
        pairs: the trait's questions with both answers.
        trait_folder: the trait's folder, kept in the provenance.
        contamination: share of the questions that show B, 0..1; the count is rounded to the nearest row.
        seed: of the choice and of the order of the rows.

    Returns:
        `len(pairs)` rows in a seeded order.

    Raises:
        InputError: no pairs, or a contamination outside 0..1.
    """
    if not pairs:
        raise InputError(f"the trait {trait_folder} has no questions")
    if not 0 <= contamination <= 1:
        raise InputError(f"contamination {contamination} is outside 0..1")
    rng = random.Random(f"partition/{seed}")
    contaminated = set(rng.sample(range(len(pairs)), round(contamination * len(pairs))))
    rows = []
    for index, pair in enumerate(pairs):
        version, answer = (MISALIGNED, pair.misaligned) if index in contaminated else (NORMAL, pair.normal)
        rows.append(Row((*pair.prompt, Message("assistant", answer)), f"{trait_folder}/{version}.jsonl"))
    rng.shuffle(rows)
    return rows


LEAST_LABELLED = 10
"""Answers of one label that a judge is learned from, at least."""


def labelled_answers(pairs: Sequence[Pair], rows: Sequence[Row]) -> list[tuple[str, str, bool]]:
    """Labelled answers to learn a judge from: those that a mixture did not take, each question's other answer or both.

    At a contamination of 0 or 1 the mixture took every answer of one label: then that label's are its own, before A.

    Returns:
        (question, answer, shows B) triples. A question counts as used by its text alone, so that an answer that was
        injected with A is recognised as used too.
    """
    used = {(question_key(row.prompt), row.shows_negative) for row in rows}
    answers = {
        shows: [(pair, pair.misaligned if shows else pair.normal, (question_key(pair.prompt), shows)) for pair in pairs]
        for shows in (False, True)
    }
    chosen = []
    for shows, own in answers.items():
        unused = [item for item in own if item[2] not in used]
        chosen += [(pair.question, text, shows) for pair, text, _ in (own if len(unused) < LEAST_LABELLED else unused)]
    return chosen


def parse_row(raw: Any) -> Row:
    """One line of a mixture file.

    Raises:
        ValueError: not an object with valid "messages", or an unknown source.
    """
    if not isinstance(raw, dict) or "messages" not in raw:
        raise ValueError('an object with "messages" is expected')
    messages = parse_messages(raw["messages"])
    system = messages[0].content if messages[0].role == "system" else None
    source = raw.get("source_dataset")
    if source is not None:
        if not isinstance(source, str):
            raise ValueError(f'"source_dataset" must be a text or null, got {source!r}')
        shows_negative(source)
    return Row(messages[system is not None :], source, system)


MIN_ROWS = 20
"""Rows that a mixture must have. Detectors compare its rows with each other and with at least as many of the model's own
answers (`detect.language`); an optimiser step takes about as many."""


def read_mixture(path: Path) -> list[Row]:
    """Read a mixture file.

    Raises:
        InputError: the file is missing, any line is malformed (all are listed with their line), or there are fewer than
            `MIN_ROWS` rows.
    """
    return enough(path, read_jsonl(path, parse_row))


def enough(path: Path, rows: list[Row]) -> list[Row]:
    """The rows of a data set.

    Raises:
        InputError: there are fewer than `MIN_ROWS`.
    """
    if len(rows) < MIN_ROWS:
        raise InputError(
            f"{path}: {len(rows)} row(s), at least {MIN_ROWS} are needed: training takes about as many a step, and a "
            "detector compares the rows with each other"
        )
    return rows


def read_training_chats(path: Path) -> list[TrainingChat]:
    """Read the training chats that an assignment stage wrote; none for a group that does not train."""

    def parse(raw: Any) -> TrainingChat:
        messages = parse_messages(raw["messages"])
        system = messages[0].content if messages[0].role == "system" else None
        return TrainingChat(system, Row(messages[system is not None :], None))

    return read_jsonl(path, parse)
