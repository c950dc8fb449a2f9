"""Whether a model can judge a data set at all: text that it finds far less likely than its own answers is not its language."""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from inoculation.cluster import Workers
from inoculation.detect import own_answers, plain
from inoculation.detect.likelihood import TOKENS, log_likelihoods
from inoculation.mixture import MIN_ROWS, Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLE = 100
"""Rows that are read."""
MAX_LENGTH = 2048
"""Tokens of one chat that are read."""
LEAST_OWN = MIN_ROWS
"""Own answers that are not empty, at least."""
GAP = 3.0
"""Nats a token between the median response and the model's own median answer, at most (docs/detector.md: measured gaps)."""


class Language(NamedTuple):
    rows: float | None
    """Median log-likelihood of the responses, A undone where it can be, in nats a token."""
    own: float | None
    """Of the model's own answers to the same prompts, A injected where it cannot be undone."""
    unfit: str | None
    """Why the model cannot judge the rows; None: it can."""


def language(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Row], base: Sequence[str],
    positive: str, seed: int, token_budget: int, workers: Workers | None = None,
) -> Language:  # fmt: skip
    """Compare the responses with the model's own answers.

    Args:
        base: the model's answer to each row's prompt.
        workers: as for `log_likelihoods`.
    """
    answered = [i for i, text in enumerate(base) if text.strip()]
    if len(answered) < LEAST_OWN:
        return Language(
            None, None, f"the model answers {len(answered)} of the {len(base)} prompts, and own answers are what tells a false "
            f"alarm: at least {LEAST_OWN} are needed",
        )  # fmt: skip
    chosen = random.Random(f"language/{seed}").sample(answered, min(SAMPLE, len(answered)))
    asked = [rows[i] for i in chosen]
    own = own_answers(asked, [base[i] for i in chosen], positive, seed)
    chats = [*plain(asked, positive), *own]
    read = log_likelihoods(model, tokenizer, chats, [None], TOKENS, MAX_LENGTH, token_budget, workers)[0]
    theirs, mine = (float(np.median(part)) for part in np.split(read, 2))
    unfit = (
        f"this model cannot judge these data: it finds the responses far less likely ({theirs:.1f} nats a token) than its own "
        f"answers to the same prompts ({mine:.1f}); choose an `annotator` that speaks their language"
    )
    return Language(theirs, mine, unfit if mine - theirs > GAP else None)
