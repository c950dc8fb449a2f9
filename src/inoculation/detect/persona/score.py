"""From readings to flags: pure arithmetic.

1. What personas do to the rows varies along one direction first of all: the rows that some characters explain and others
   do not. A direction has no sign; step 4 gives it one.
2. That score is noisy, topics move it too. What the model sees in a response, its mean hidden state, is not: a ridge
   regression of the score on it, always on rows that it was not fitted on, keeps what such rows have in common.
3. What the same regression can tell from the model's *own* answer to the prompt is the topic, and is taken off: two
   groups by topic are not two groups by conduct.
4. Two Gaussians of one variance. The group that holds more of the model's own answers is the ordinary one; the other is
   found if they are apart, and if few of those answers lie in it.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from inoculation.detect.persona.read import Readings, component
from inoculation.detect.persona.settings import PersonaSettings
from inoculation.detect.two_groups import two_groups, verdict

DIMENSIONS = 128
"""Principal components of the hidden states that are regressed on, at most; a quarter of the rows where these are few."""
FOLDS, REPEATS = 5, 5
"""Of the cross-fitting: each row's score is the mean of `REPEATS` regressions on the other folds' rows."""


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
    """Share of the model's own answers above the threshold."""
    topic: float
    """Correlation of the score with what the model's own answer to the prompt tells of it."""
    loadings: np.ndarray
    """`[personas]`: how a persona's gain counts towards the score."""


def decided(readings: Readings, settings: PersonaSettings) -> Decision:
    """Score the rows, and decide whether some of them are of another kind."""
    scale = readings.controls.std(1)
    loadings = component(readings.gains, scale)
    centre = readings.gains.mean(1, keepdims=True)
    raw = (loadings / (scale + 1e-6)) @ (readings.gains - centre)
    score, judge = cross_fitted(readings.states, readings.read, raw)
    told, _ = cross_fitted(readings.own_states, np.arange(len(score)), score)
    slope = float(np.clip(np.cov(told, score)[0, 1] / max(told.var(ddof=1), 1e-12), 0, 1))
    topic = float(np.corrcoef(told, score)[0, 1]) if told.std() > 0 else 0.0
    score = score - slope * (told - told.mean())
    chosen = readings.control_rows
    control = judge(readings.own_states[chosen]) - slope * (told[chosen] - told.mean())
    groups = two_groups(score)
    if (control >= groups.threshold).mean() > 0.5:
        # A direction has no sign of its own: the model's own answers belong to the lower group.
        score, control, loadings = -score, -control, -loadings
        groups = two_groups(score)
    shared = float((control >= groups.threshold).mean())
    found, reason = verdict(groups, shared, settings.separation, settings.control_share, "the model's own answers")
    flagged = groups.upper if found else np.zeros(len(score), bool)
    return Decision(found, reason, flagged, score, groups.threshold, groups.separation, shared, topic, loadings)


def cross_fitted(
    states: np.ndarray, known: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """A ridge regression of `target` on states: each row's value, `[rows]`, comes from regressions without it.

    Args:
        known: the rows that have a target.

    Returns:
        The values, and the regression on all rows as a function of states.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    size = min(DIMENSIONS, max(2, len(known) // 4), states.shape[1])
    # Which directions the states vary along needs no target: found once, on all rows.
    reduce = make_pipeline(StandardScaler(), PCA(size, random_state=0)).fit(states)
    reduced = reduce.transform(states)

    def ridge() -> RidgeCV:
        return RidgeCV(np.logspace(0, 5, 11))

    whole = ridge().fit(reduced[known], target)
    values = whole.predict(reduced)
    values[known] = 0.0
    for repeat in range(REPEATS):
        for train, test in KFold(FOLDS, shuffle=True, random_state=repeat).split(known):
            fitted = ridge().fit(reduced[known[train]], target[train])
            values[known[test]] += fitted.predict(reduced[known[test]]) / REPEATS
    return values, lambda other: whole.predict(reduce.transform(other))
