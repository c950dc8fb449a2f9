"""The SAE route's rule for real text, where latents alone find any two kinds of text: topics, styles, refusals."""

import numpy as np

from inoculation.detect.persona.read import Likelihoods
from inoculation.detect.persona.score import decided
from inoculation.detect.persona.settings import PersonaSettings
from inoculation.detect.sae.flag import Flags

GUIDED = 2048
"""Latents that `guided` reads: those that vary most. Rare ones, each of a topic, drown the others: with all 8,192 of SmolLM2's
it saw two groups in clean rows (D 3.8)."""


def guided(
    target: np.ndarray, base: np.ndarray, likelihoods: Likelihoods, settings: PersonaSettings, separation: float
) -> Flags:
    """Flag the rows that the latents tell from the others in the direction that personas give.

    That some characters explain a row and others do not is what makes it a matter of conduct. The latents predict that, on
    rows that they were not fitted on; the decision is the persona route's, with latents in place of hidden states.

    Args:
        target: mean latents of each response, `[rows, latents]`, `GUIDED` of them at most.
        base: the same of the model's own answer to each prompt.
        separation: takes the place of the settings': latents leave the groups closer together than hidden states do.
    """
    told = decided(likelihoods, np.sqrt(target), np.sqrt(base), settings.model_copy(update={"separation": separation}))
    return Flags(told.flagged, told.score, told.threshold, told.found, told.reason, told.separation, told.control_share)
