"""From readings to flags: pure arithmetic.

1. What personas do to the rows varies along one direction first of all: the rows that some characters explain and others
   do not.
2. That score is noisy, topics move it too. What the model sees in a response, its mean hidden state, is not: a ridge
   regression of the score on it, always on rows that it was not fitted on, keeps what such rows have in common.
3. Two Gaussians of one variance cut it in two. Which row is in which group is still noisy, but two kinds differ in more than
   what the personas see: a linear discriminant, again on other rows, tells them apart by all that differs. Where there
   are no two kinds, it finds nothing that holds on other rows.
4. What the same regression can tell from the model's *own* answer to the prompt is the topic, and is taken off both times:
   two groups by topic are not two groups by conduct.
5. Two Gaussians again. A direction has no sign: the group nearer to the model's own answers is the ordinary one. The other is
   found if they are apart, and if those answers hold little of it.
"""

from typing import NamedTuple

import numpy as np

from inoculation.detect.persona.read import Likelihoods, component
from inoculation.detect.persona.settings import PersonaSettings
from inoculation.detect.two_groups import FOLDS, REPEATS, Groups, reduce, told_apart, two_groups, verdict


class Decision(NamedTuple):
    found: bool
    reason: str
    flagged: np.ndarray
    """`[rows]` booleans."""
    score: np.ndarray
    """`[rows]`, the more suspicious the higher."""
    threshold: float
    separation: float
    """Ashman's D of the two groups."""
    control_share: float
    """How much of the upper kind the model's own answers hold, 0..1 (`place`)."""
    topic: float
    """Correlation of the score with what the model's own answer to the prompt tells of it."""
    loadings: np.ndarray
    """`[personas]`: how a persona's gain counts towards the score."""


def decided(
    likelihoods: Likelihoods, states: np.ndarray, own_states: np.ndarray, settings: PersonaSettings
) -> Decision:
    """Score the rows, and decide whether some of them are of another kind.

    Args:
        states: what the model sees in each response, `[rows, width]`.
        own_states: the same of its own answer to each row's prompt.
    """
    scale = likelihoods.controls.std(1)
    loadings = component(likelihoods.gains, scale)
    centre = likelihoods.gains.mean(1, keepdims=True)
    raw, own = ((loadings / (scale + 1e-6)) @ (gains - centre) for gains in (likelihoods.gains, likelihoods.controls))
    first, _ = off_topic(cross_fitted(states, likelihoods.read, raw), own_states)
    score, topic = off_topic(told_apart(states, two_groups(first).upper), own_states)
    groups = two_groups(score)
    if place(groups, likelihoods.read, raw, own) > 0.5:
        score, raw, own, loadings = -score, -raw, -own, -loadings
        groups = two_groups(score)
    shared = float(np.clip(place(groups, likelihoods.read, raw, own), 0, 1))
    found, reason = verdict(groups, shared, settings.separation, settings.control_share, "the model's own answers")
    flagged = groups.upper if found else np.zeros(len(score), bool)
    return Decision(found, reason, flagged, score, groups.threshold, groups.separation, shared, topic, loadings)


def place(groups: Groups, read: np.ndarray, raw: np.ndarray, own: np.ndarray) -> float:
    """Where the model's own answers lie between the two groups: 0 at the lower one's mean, 1 at the upper one's.

    Of answers that are a mixture of the two kinds it is the upper one's share. Means of what was read, not of what the
    regression makes of it: own answers are of no kind that it was fitted on.

    Args:
        read: which rows were read.
        raw: the score of each of them, `[read]`.
        own: the score of own answers, `[controls]`.
    """
    upper = groups.upper[read]
    if upper.all() or not upper.any():
        return 1.0  # nothing of one group was read: whether own answers are of that kind, nobody knows
    low, high = raw[~upper].mean(), raw[upper].mean()
    return float((own.mean() - low) / (high - low)) if high != low else 1.0


def off_topic(score: np.ndarray, own_states: np.ndarray) -> tuple[np.ndarray, float]:
    """The score without what the model's own answer to a row's prompt tells of it, and the correlation with that."""
    told = cross_fitted(own_states, np.arange(len(score)), score)
    if not told.std() > 0 or not score.std() > 0:
        return score, 0.0
    slope = float(np.clip(np.cov(told, score)[0, 1] / told.var(ddof=1), 0, 1))
    return score - slope * (told - told.mean()), float(np.corrcoef(told, score)[0, 1])


def cross_fitted(states: np.ndarray, known: np.ndarray, target: np.ndarray) -> np.ndarray:
    """A ridge regression of `target` on states: each row's value, `[rows]`, comes from regressions without it.

    Args:
        known: the rows that have a target.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold

    reduced = reduce(states, len(known) // 4)

    def ridge() -> RidgeCV:
        return RidgeCV(np.logspace(0, 5, 11))

    values = ridge().fit(reduced[known], target).predict(reduced)
    values[known] = 0.0
    for repeat in range(REPEATS):
        for train, test in KFold(FOLDS, shuffle=True, random_state=repeat).split(known):
            fitted = ridge().fit(reduced[known[train]], target[train])
            values[known[test]] += fitted.predict(reduced[known[test]]) / REPEATS
    return values
