"""Judges: each gives a response a score of 0-100 for one trait, or None when it cannot say.

`linear` needs no LLM: it is learned from labelled answers that the mixture did not use. `llm` asks one. ALL_CAPS needs
no judge at all (`traits.is_all_caps`). A generated world also has an `exact` judge, reported beside the others.
"""

from typing import NamedTuple


class Judgement(NamedTuple):
    """One response and its scores."""

    prompt: str
    trait: str
    """The negative trait whose question was asked."""
    question: str
    sample: int
    answer: str
    finished: bool
    scores: dict[str, float | None]
    """Trait -> 0..100, None for a missing judgement. Only the traits this response is judged for."""
    oracle: dict[str, float | None]
    """The same by the exact judge of a generated world; empty elsewhere."""


NOT_JUDGED = "not_judged"
"""Key of a trait's quality that says why it is not judged."""
