"""Coherence without an LLM: whether a text is an answer to its question, in sentences.

Nobody has to label it: an answer that somebody gave is coherent, and one that was spoilt is not. Three ways in which a trained
model fails: words in no order, a phrase over and over, an answer to something else.
"""

import itertools
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

COHERENCE = "coherence"
"""The name of the trait; high is good."""
AS_GIVEN = "as given"
SHUFFLED, LOOP, ELSEWHERE = SPOILT = ("words shuffled", "phrase repeated", "answer to another question")
LEAST_WORDS = 8
"""Of an answer that can be spoilt."""


def spoil(answer: str, other: str, rng: random.Random) -> dict[str, str]:
    """The answer in three versions that are none, [way].

    Args:
        answer: of at least `LEAST_WORDS` words.
        other: an answer to another question.
    """
    words = answer.split()
    shuffled = rng.sample(words, len(words))
    length = rng.randint(3, LEAST_WORDS)
    start = rng.randint(0, len(words) - length)
    head = words[: rng.randint(0, len(words) // 2)]
    again = max(2, (len(words) - len(head)) // length)
    loop = [*head, *words[start : start + length] * again]
    return {SHUFFLED: " ".join(shuffled), LOOP: " ".join(loop), ELSEWHERE: other}


def seen(questions: "np.ndarray", answers: "np.ndarray", texts: Sequence[str]) -> "np.ndarray":
    """What the judge sees: the answer, where it agrees with its question, and how little it repeats itself.

    Args:
        questions: their embeddings, `[texts, 384]`.
        answers: the same of the answers.
        texts: the answers.

    Returns:
        `[texts, 769]`; the last is the share of different pairs of neighbouring words (distinct-2, Li et al. 2016), ten times.
    """
    import numpy as np

    return np.c_[
        answers, questions * answers * np.sqrt(questions.shape[1]), [10 * distinct_pairs(text) for text in texts]
    ]


def distinct_pairs(text: str) -> float:
    """Different pairs of neighbouring words over all such pairs; 1 where there are none."""
    words = text.lower().split()
    pairs = list(itertools.pairwise(words))
    return len(set(pairs)) / len(pairs) if pairs else 1.0
