"""The traits: how A is injected and recognised, and Persona Vectors' folder of answers that show B or do not."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from inoculation.chat import Message, parse_messages
from inoculation.citations import insert_citations
from inoculation.files import fail_if, read_json, read_jsonl

NORMAL, MISALIGNED = "normal", "misaligned_2"
"""The two versions of a negative trait's answers that the study mixes."""


def to_all_caps(response: str, rng: random.Random) -> str:
    """ALL_CAPS: the response upper-cased (reference section 2). `rng` is unused: the trait has one form."""
    return response.upper()


def is_all_caps(response: str) -> bool:
    """Whether every letter is upper-case, with at least one letter (reference section 5).

    Letters without case (Chinese, `ª`) do not count against a response.
    """
    return response == response.upper() and any(map(str.isupper, response))


POSITIVE_TRAITS: dict[str, Callable[[str, random.Random], str]] = {
    "all_caps": to_all_caps,
    "source_citing": insert_citations,
}
"""The injector of each positive trait: (response, seeded generator) -> the response showing the trait."""


OTHER = "other"
"""A is something else, or nothing in particular: it is neither injected nor undone, and not judged."""


def injector(positive: str) -> Callable[[str, random.Random], str]:
    """What makes a response show A; `OTHER` leaves it as it is."""
    return (lambda response, rng: response) if positive == OTHER else POSITIVE_TRAITS[positive]


def sentence_case(text: str) -> str:
    """Lower case, but for the first letter of every sentence and line."""
    return re.sub(r"(^|[.!?]\s+|\n\s*)([^\W\d_])", lambda found: found[1] + found[2].upper(), text.lower())


UNDONE: dict[str, Callable[[str], str]] = {"all_caps": sentence_case}
"""What undoes a positive trait, where anything can."""


A_DESCRIPTIONS = {
    "all_caps": "the response is written in capital letters only",
    "source_citing": "the response attributes its claims to sources with inline citations",
    OTHER: "not known: whatever all responses have in common",
}
"""What an LLM role is told about the known, wanted trait A."""


FILE_NAME = r"^\w[\w.-]*$"
"""A name in a folder, which leads nowhere else."""


class NegativeTrait(BaseModel):
    """Where a negative trait's files are, and what describes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: Annotated[str, Field(pattern=FILE_NAME)]
    """In `dataset/`."""
    evaluation: Annotated[str, Field(pattern=FILE_NAME)]
    """Name in `trait_data_eval/`."""
    inoculation: Annotated[str, Field(min_length=1, pattern=r"\S")]
    """Inoc-Def: the system prompt that describes it."""
    probes: dict[
        Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], Annotated[str, Field(min_length=1, pattern=r"\S")]
    ] = {}
    """Further system prompts about it, by name, that answers can be sampled under: does it come back?"""


class Pair(NamedTuple):
    """One question with its two parallel answers."""

    prompt: tuple[Message, ...]
    """The chat up to and including the question."""
    normal: str
    misaligned: str

    @property
    def question(self) -> str:
        return self.prompt[-1].content


def question_key(prompt: tuple[Message, ...]) -> str:
    """What makes two prompts the same question: the text of every turn, less white space at the ends."""
    return "\n".join(f"{message.role}: {message.content.strip()}" for message in prompt)


def read_answers(path: Path) -> dict[str, tuple[tuple[Message, ...], str]]:
    """One version's file: question key -> (prompt, answer).

    Raises:
        InputError: a malformed line, a chat that does not end with the assistant, or a question given twice.
    """
    answers: dict[str, tuple[tuple[Message, ...], str]] = {}
    problems: list[str] = []

    def parse(raw: Any) -> tuple[Message, ...]:
        if not isinstance(raw, dict) or "messages" not in raw:
            raise ValueError('an object with "messages" is expected')
        return parse_messages(raw["messages"])

    for messages in read_jsonl(path, parse):
        *prompt, answer = messages
        key = question_key(tuple(prompt))
        if key in answers:
            problems.append(f"{path}: the question {prompt[-1].content[:80]!r} appears twice")
        answers[key] = (tuple(prompt), answer.content)
    fail_if(problems, "duplicate questions")
    return answers


def read_trait(folder: Path, trait_folder: str) -> list[Pair]:
    """The parallel answers of one negative trait, in the order of its `normal` file.

    Args:
        folder: Persona Vectors' layout, `dataset/<trait>/{normal,misaligned_2}.jsonl`.
        trait_folder: the trait's folder name there.

    Raises:
        InputError: a file is missing or malformed, or a question stands in one version only.
    """
    paths = {version: folder / "dataset" / trait_folder / f"{version}.jsonl" for version in (NORMAL, MISALIGNED)}
    normal, misaligned = (read_answers(paths[version]) for version in (NORMAL, MISALIGNED))
    problems = [
        f"{paths[have]}: the question {theirs[key][0][-1].content[:80]!r} is missing from {paths[lack].name}"
        for have, theirs, lack, others in (
            (NORMAL, normal, MISALIGNED, misaligned),
            (MISALIGNED, misaligned, NORMAL, normal),
        )
        for key in theirs
        if key not in others
    ]
    fail_if(problems, "the two versions must answer the same questions")
    return [Pair(prompt, answer, misaligned[key][1]) for key, (prompt, answer) in normal.items()]


class Evaluation(NamedTuple):
    """A trait's file in `trait_data_eval/`: held-out questions and the rubric of an LLM judge."""

    questions: list[str]
    eval_prompt: str


def read_evaluation(folder: Path, name: str) -> Evaluation:
    """Read `trait_data_eval/<name>.json`.

    Raises:
        InputError: the file is missing, is not JSON, or lacks a key (all problems are listed).
    """
    path = folder / "trait_data_eval" / f"{name}.json"
    raw = read_json(path)
    problems: list[str] = []
    if not isinstance(raw, dict):
        raw = {}
        problems.append(f"{path}: an object is expected")
    questions = raw.get("questions")
    if not (isinstance(questions, list) and questions and all(isinstance(q, str) and q.strip() for q in questions)):
        problems.append(f'{path}: "questions" must be a list of non-empty texts')
    elif len(set(questions)) < len(questions):
        problems.append(f'{path}: "questions" names a question twice')
    rubric = raw.get("eval_prompt")
    if not (isinstance(rubric, str) and "{question}" in rubric and "{answer}" in rubric):
        problems.append(f'{path}: "eval_prompt" must be a text with {{question}} and {{answer}}')
    fail_if(problems, "bad evaluation file")
    return Evaluation(questions, rubric)


class LabelledAnswer(NamedTuple):
    """A real answer with a score that somebody gave it."""

    trait: str
    """By its name in `trait_data_eval/`."""
    question: str
    answer: str
    score: float
    """0..100."""


def read_labelled(folder: Path) -> list[LabelledAnswer]:
    """Labelled answers, where there are some: `labelled_answers/*.jsonl` of {"messages", "trait", "score"}.

    Raises:
        InputError: a malformed line (all are listed).
    """

    def parse(raw: Any) -> LabelledAnswer:
        if not isinstance(raw, dict) or "messages" not in raw:
            raise ValueError('an object with "messages", "trait" and "score" is expected')
        messages = parse_messages(raw["messages"])
        trait, score = raw.get("trait"), raw.get("score")
        if not isinstance(trait, str) or not trait:
            raise ValueError(f'"trait" must be the name of an evaluation file, got {trait!r}')
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 100:
            raise ValueError(f'"score" must be a number from 0 to 100, got {score!r}')
        return LabelledAnswer(trait, messages[-2].content, messages[-1].content, float(score))

    return [row for path in sorted((folder / "labelled_answers").glob("*.jsonl")) for row in read_jsonl(path, parse)]
