"""Which examples carry the suspicious latents (reference section 6, step 6). No rule reads provenance."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from inoculation.detect.sae.rank import Ranked
from inoculation.detect.sae.settings import FlagRule, FlagSettings
from inoculation.detect.two_groups import told_apart, two_groups, verdict

LEAST = 5
"""Suspicious latents that a component's group rests on. In clean rows of a tiny world three latents made two groups (D 9)."""


class Flags(NamedTuple):
    flagged: np.ndarray
    """`[examples]` booleans."""
    score: np.ndarray
    """`[examples]`; what the rule compares with its threshold."""
    threshold: float
    found: bool
    """False: the rule saw no two groups, and nothing is flagged."""
    reason: str
    separation: float | None = None
    """Ashman's D of the two groups; None for a rule without groups."""
    control_share: float | None = None
    """Share of the control above the threshold; of the rule `guided`, how much of the flagged kind the own answers hold
    (`persona.score.place`)."""


def none(examples: int, reason: str) -> Flags:
    """Nothing found."""
    return Flags(np.zeros(examples, bool), np.zeros(examples), 0.0, False, reason)


def study(difference: np.ndarray, suspicious: Sequence[bool], top: int, hits: int) -> Flags:
    """The study's rule: of an example's `top` largest differences, at least `hits` are on suspicious latents.

    Args:
        difference: target - base over the study's latents, `[examples, latents]`.
        suspicious: `[latents]`, the class is `no`.
        top: 10 in the study.
        hits: 3 in the study.
    """
    strongest = np.argsort(-difference, axis=1, kind="stable")[:, :top]
    count = np.asarray(suspicious, bool)[strongest].sum(axis=1)
    flagged = count >= hits
    reason = f"{int(flagged.sum())} examples have {hits} or more suspicious latents among their {top} strongest"
    return Flags(flagged, count.astype(float), float(hits), bool(flagged.any()), reason)


def component(
    residual: np.ndarray,
    control_residual: np.ndarray,
    loadings: np.ndarray,
    suspicious: Sequence[bool],
    separation: float,
    control_share: float,
) -> Flags:
    """Our rule: the loading-weighted sum over the suspicious latents, cut between two Gaussians of one variance.

    The two groups must be apart, and the upper one must not be there in the control too (`two_groups.verdict`).

    Args:
        residual: standardised target residuals over the component's latents, `[examples, latents]`.
        control_residual: the same of the control, `[controls, latents]`.
        loadings: `[latents]`; all 0: the component is no more than chance gives.
        suspicious: `[latents]`, the class is `no`.
        separation: least Ashman's D (distance of the means over the common deviation).
        control_share: the share of the control above the threshold must stay below this part of the flagged share.
    """
    if not np.any(loadings):
        return none(len(residual), "the latents vary together no more than with random signs")
    weights = np.where(np.asarray(suspicious, bool), loadings, 0.0)
    if (count := np.count_nonzero(weights)) < LEAST:
        return none(
            len(residual),
            f"{count} suspicious latents, at least {LEAST} are needed: what few latents share can be their own noise",
        )
    score, control = residual @ weights, control_residual @ weights
    groups = two_groups(score)
    shared = float((control >= groups.threshold).mean())
    found, reason = verdict(groups, shared, separation, control_share, "the control")
    upper = groups.upper if found else np.zeros(len(residual), bool)
    return Flags(upper, score, groups.threshold, found, reason, groups.separation, shared)


def sharpened(flags: Flags, residual: np.ndarray) -> Flags:
    """A component's two groups, told apart by all in which they differ.

    Which rows are in which group is noisy: the suspicious latents miss an answer with one mild sentence of B. But two kinds differ
    in more latents than in those, and a discriminant that was fitted on other rows puts wrong rows right (`told_apart`).
    Whether there are two groups was decided before, and stays.

    Args:
        residual: standardised target residuals over every latent of both rankings, `[examples, latents]`.
    """
    if not flags.found:
        return flags
    score = told_apart(residual, flags.flagged)
    groups = two_groups(score)
    if not groups.separation:  # one of the groups is too small for a discriminant
        return flags
    return flags._replace(flagged=groups.upper, score=score, threshold=groups.threshold)


def flagged(ranking: Ranked, suspicious: Sequence[bool], settings: FlagSettings) -> dict[FlagRule, Flags]:
    """The flags of the two rules that need nothing but the ranking."""
    by_study, own = ranking.by("study"), ranking.by("component")
    columns = ranking.columns
    return {
        "study": study(
            columns.matched_difference[:, by_study], [suspicious[i] for i in by_study], settings.study_top, settings.study_hits
        ),
        "component": sharpened(
            component(
                columns.residual[:, own], columns.control_residual[:, own],
                np.array([ranking.latents[i].loading for i in own]), [suspicious[i] for i in own],
                settings.separation, settings.control_share,
            ),
            columns.residual,
        ),
    }  # fmt: skip


def why(ranking: Ranked, suspicious: Sequence[bool], count: int = 5) -> list[list[int]]:
    """For each example the suspicious latents that it sets off most."""
    residual = ranking.columns.residual
    top = np.argsort(-residual * np.asarray(suspicious), axis=1, kind="stable")[:, :count]
    return [
        [ranking.latents[j].latent for j in row if suspicious[j] and residual[i, j] > 0] for i, row in enumerate(top)
    ]
