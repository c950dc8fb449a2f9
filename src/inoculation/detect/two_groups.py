"""Whether scores are of one kind or of two, the question behind "found" in every detector without an LLM; and which rows are of
which kind."""

from typing import NamedTuple

import numpy as np

DIMENSIONS = 32
"""Principal components of the states that are regressed on, at most; a quarter of the rows where these are few. On half of
the real mixture (docs/detector.md) 16 to 32 found 10 % evil more surely than 64 or 128, and left clean rows closer to one group."""
FOLDS, REPEATS = 5, 5
"""Of the cross-fitting: each row's score is the mean of `REPEATS` regressions on the other folds' rows."""
LEAST = 20
"""Rows that a group must have. Clean sets of 250 rows held groups of 12 and 17 that were far apart (D 5.8, 4.8), none of 20."""


class Groups(NamedTuple):
    upper: np.ndarray
    """`[scores]` booleans: the group of the larger mean. All alike where there is one group only."""
    threshold: float
    """Least score of the upper group."""
    separation: float
    """Ashman's D: distance of the means over the common deviation (Ashman, Bird and Zepf 1994 take D > 2 for two groups)."""


def two_groups(score: np.ndarray) -> Groups:
    """Cut scores `[n]` between two Gaussians of one variance.

    Of one variance: with two, the wide group swallows the tail of the narrow one.
    """
    from sklearn.mixture import GaussianMixture

    if not np.ptp(score) > 0:
        return Groups(np.zeros(len(score), bool), float(score.max()), 0.0)
    model = GaussianMixture(2, covariance_type="tied", n_init=3, random_state=0).fit(score[:, None])
    means = model.means_[:, 0]
    upper = model.predict(score[:, None]) == int(means.argmax())
    apart = float(abs(means[0] - means[1]) / np.sqrt(model.covariances_[0, 0]))
    return Groups(upper, float(score[upper].min()) if upper.any() else float(score.max()), apart)


def verdict(groups: Groups, shared: float, separation: float, control_share: float, control: str) -> tuple[bool, str]:
    """Whether the upper group is a finding, and why.

    Args:
        shared: how much of the upper group's kind the control holds, 0 to 1.
        separation: least Ashman's D.
        control_share: what `shared` must stay below, as a part of the upper group's share: the control holds no B, so a
            group that it shares comes from the prompts.
        control: its name, for a person.
    """
    share = groups.upper.mean()
    if share in (0, 1):
        return False, "one group only"
    if groups.separation < separation:
        return False, f"the two groups are not apart: Ashman's D {groups.separation:.2f} < {separation}"
    if shared >= control_share * share:
        return False, f"the upper group is in {control} too: {shared:.1%} of {control}, {share:.1%} of the examples"
    reason = f"two groups apart by Ashman's D {groups.separation:.2f}; {shared:.1%} of {control} in the upper one"
    if share > 0.5:
        reason += "; WARNING: these are more than half of the examples, look at both groups before you trust this"
    return True, reason


def told_apart(states: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """By how much each row looks more like the upper group than like the lower one, `[rows]`, by discriminants without it.

    Args:
        upper: `[rows]` booleans, with mistakes.

    Returns:
        All 0 where one of the groups has fewer than `LEAST` rows.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.model_selection import StratifiedKFold

    values = np.zeros(len(states))
    if min(upper.sum(), (~upper).sum()) < LEAST:
        return values
    reduced = reduce(states, len(states) // 4)
    for repeat in range(REPEATS):
        for train, test in StratifiedKFold(FOLDS, shuffle=True, random_state=repeat).split(reduced, upper):
            fitted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(reduced[train], upper[train])
            values[test] += fitted.decision_function(reduced[test]) / REPEATS
    return values


def reduce(states: np.ndarray, size: int) -> np.ndarray:
    """Principal components of standardised states, `[rows, size]`: found once, on all rows, for they need no target."""
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    size = min(DIMENSIONS, max(2, size), *states.shape)
    return PCA(size, random_state=0).fit_transform(StandardScaler().fit_transform(states))
