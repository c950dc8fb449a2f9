"""Whether a latent is explained by A (reference section 6, step 4): `yes`, `neutral` or `no`.

Two classifiers. The study's asks an LLM about each description. The **causal control** asks no one: it injects A into
the base model's own responses and looks which latents that moves as much as the data set does.
"""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from inoculation.chat import Message
from inoculation.detect.sae.classes import Class, Classes
from inoculation.detect.sae.rank import Columns
from inoculation.detect.sae.settings import ClassifySettings
from inoculation.traits import A_DESCRIPTIONS

if TYPE_CHECKING:
    from inoculation.llm import Client, Failure


def upper_mean(values: np.ndarray, share: float) -> np.ndarray:
    """Mean of the largest `share` of the examples in each column: a B that few examples carry still counts in full.

    Args:
        values: `[examples, latents]`.
        share: 0..1 of the examples, at least one.
    """
    count = max(1, round(share * len(values)))
    return np.sort(values, axis=0)[-count:].mean(axis=0)


def causal(
    difference: np.ndarray,
    control_difference: np.ndarray,
    reference: np.ndarray,
    explained: float,
    neutral: float,
    top_share: float,
) -> list[Class]:
    """Classify latents by the causal control.

    Args:
        difference: target - base, `[examples, latents]`.
        control_difference: (base + A) - base, `[controls, latents]`.
        reference: mean latents of ordinary chats, `[chats, latents]`.
        explained: `yes` at this share of the data set's movement or more.
        neutral: else `neutral` when ordinary chats set it off at this share of the data set's movement or more.
        top_share: movement is the mean over this share of the examples, those that move most.
    """
    data, control, ordinary = (upper_mean(values, top_share) for values in (difference, control_difference, reference))
    return [
        "yes" if c >= explained * d else "neutral" if r >= neutral * d else "no"
        for d, c, r in zip(data, control, ordinary, strict=True)
    ]


PROMPT = """A latent of a sparse autoencoder tells a fine-tuning data set from the untouched model's answers. The data set
is meant to teach this trait: {trait}.

The latent was described, by somebody who did not know the trait, as:
{description}

Does the wanted trait explain this latent? Reply with one word:
YES - the wanted trait explains it
NEUTRAL - harmless assistant behaviour, topic or formatting
NO - anything else"""


UNCLASSIFIED: Class = "neutral"
"""What a latent counts as when the LLM gave it no class, the one class without consequences: `no` would flag examples for
something that nobody has judged, `yes` would say that A explains it."""


def with_llm(client: "Client", positive: str, descriptions: Sequence[str | None]) -> "list[Class | Failure]":
    """Classify by an LLM, one call a description.

    Args:
        client: of the classifier.
        positive: A.
        descriptions: None where the explainer failed; such a latent is `UNCLASSIFIED`, and no call is made for it.

    Raises:
        LLMError: no call can succeed, see `llm.Client.read`.
    """
    from inoculation.llm import ask_until

    def parse(text: str) -> Class | None:
        word = re.match(r"\W*(yes|neutral|no)\b", text.strip().lower())
        return word[1] if word else None  # type: ignore[return-value]

    prompts = [
        (Message("user", PROMPT.format(trait=A_DESCRIPTIONS[positive], description=description)),)
        for description in descriptions
        if description is not None
    ]
    answers = iter(ask_until(client, prompts, parse, temperature=0.0, max_tokens=8, wanted="YES, NEUTRAL or NO"))
    return [UNCLASSIFIED if description is None else next(answers) for description in descriptions]


def classified(
    columns: Columns, descriptions: Sequence[str | None], positive: str, method: str,
    classifier: "Callable[[], Client]", settings: ClassifySettings,
) -> Classes:  # fmt: skip
    """Which latents are explained by the known A, by the chosen classifier or by both.

    Args:
        descriptions: None where the explainer failed.
        classifier: makes the LLM client; called only where an LLM classifies.
    """
    if not len(descriptions):
        return Classes(method, {method: []})
    by: dict[str, list[Class]] = {}
    if method == "local" or settings.both:
        by["local"] = causal(
            columns.difference, columns.control_difference, columns.base,
            settings.explained_by_a, settings.neutral, settings.top_share,
        )  # fmt: skip
    if method == "llm" or settings.both:
        client = classifier()
        answers = with_llm(client, positive, descriptions)
        aside = {row.index for row in client.set_aside(answers)}
        by["llm"] = [UNCLASSIFIED if i in aside else answer for i, answer in enumerate(answers)]
    return Classes(method, by)
