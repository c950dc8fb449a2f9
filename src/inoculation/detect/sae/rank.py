"""Which latents tell the data from the base model (reference section 6, step 2), by two rankings.

The study's: the largest positive mean difference between target and base response. It loses a B that few examples
carry, because a mean over all examples dilutes it, and it prefers latents that are large.

Ours, `component`: a B that only some examples carry makes its latents rise and fall *together* over the examples.
The first principal component of the target latents, each standardised by the control (the base model's responses with
A injected, which holds everything but B), points along it, however rare B is, and A cancels because all examples have
it. What the prompt alone explains is removed first, by regressing each latent on the base model's own response.

A first component is there in noise too, and the wider the SAE, the larger it is. It counts only if its variance exceeds
that of the same values with random signs (parallel analysis by signflips: Hong, Sheng and Dobriban, arXiv:2012.02985),
which keep every latent's own variance and break what latents have in common.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from scipy.linalg import eigh

from inoculation.detect.sae.features import Piece
from inoculation.detect.sae.settings import FlagRule
from inoculation.files import InputError, atomic, read_json, write_json

CANDIDATES = 2048
"""Latents that the covariance is made of: those whose target varies most beyond the control, in the clipped units of
`standardised`. The ratio of the deviations alone would prefer every latent that a few targets set off and the control,
which has fewer texts, happens not to: in a wide SAE there are more of those than candidates."""
FLIPS = 99
"""Draws of random signs, all of which the component's variance must exceed: where nothing varies together it does so in 1 %
of the cases."""
ALIVE = 1e-6
"""Standard deviation above which a latent's value differs between the examples."""
TESTED = 1000
"""Examples at most that this is tested on, drawn from the mixture."""
FLOOR = 0.1
"""Share of a latent's own deviation that is added to the control's, so that a silent control divides by no zero."""
CLIP = 6.0
"""Deviations beyond this many standard deviations count as this many."""


NO_LATENT = "no latent tells the data from the base model"
"""Why nothing is found where no latent is kept: the data are the base model's own answers, or all alike."""


class Moments(NamedTuple):
    """What one pass over the features gives, each `[latents]`."""

    examples: int
    mean_difference: np.ndarray
    sd_difference: np.ndarray
    share: np.ndarray
    """Share of the examples whose target sets the latent off more than the base response."""
    target_mean: np.ndarray
    base_mean: np.ndarray
    slope: np.ndarray
    """Least-squares slope of target on base over the examples, 0..1: how much of the target the prompt explains."""
    target_sd: np.ndarray
    """Of target - slope x base."""
    control_mean: np.ndarray
    control_sd: np.ndarray
    """Of control - slope x base."""
    active: np.ndarray
    """Share of the examples whose target sets the latent off."""


def moments(pieces: Iterable[Piece], pooling: Literal["whole", "matched"]) -> Moments:
    """Sums over the examples in one pass; memory does not grow with their number."""
    n = n_control = 0
    sums: dict[str, np.ndarray] = {}

    def add(name: str, values: np.ndarray) -> None:
        total = np.asarray(values, dtype=np.float64).ravel()
        sums[name] = sums[name] + total if name in sums else total

    for piece in pieces:
        target, base, control = (matrix.astype(np.float64) for matrix in getattr(piece, pooling))
        difference = (target - base).tocsr()
        own = base[np.flatnonzero(piece.has_control)]
        control = control[np.flatnonzero(piece.has_control)]
        n += target.shape[0]
        n_control += control.shape[0]
        for name, left, right in (("tt", target, target), ("bb", base, base), ("tb", target, base),
                                  ("cc", control, control), ("cb", control, own), ("oo", own, own)):  # fmt: skip
            add(name, left.multiply(right).sum(0))
        for name, matrix in (("t", target), ("b", base), ("c", control), ("o", own), ("d", difference)):
            add(name, matrix.sum(0))
        add("dd", difference.multiply(difference).sum(0))
        add("up", (difference > 0).sum(0))
        add("on", (target > 0).sum(0))
    t, b = sums["t"] / n, sums["b"] / n
    var_b = sums["bb"] / n - b**2
    covariance = sums["tb"] / n - t * b
    slope = np.clip(np.divide(covariance, var_b, out=np.zeros_like(b), where=var_b > 1e-12), 0, 1)
    d = sums["d"] / n
    c, o = sums["c"] / max(1, n_control), sums["o"] / max(1, n_control)

    def residual_sd(yy: str, yb: str, bb: str, y: np.ndarray, x: np.ndarray, count: int) -> np.ndarray:
        variance = (
            (sums[yy] / count - y**2) - 2 * slope * (sums[yb] / count - y * x) + slope**2 * (sums[bb] / count - x**2)
        )
        return np.sqrt(np.clip(variance, 0, None))

    return Moments(
        n, d, np.sqrt(np.clip(sums["dd"] / n - d**2, 0, None)), sums["up"] / n, t, b, slope,
        residual_sd("tt", "tb", "bb", t, b, n), c - slope * o, residual_sd("cc", "cb", "oo", c, o, max(1, n_control)),
        sums["on"] / n,
    )  # fmt: skip


def varied(m: Moments) -> bool:
    """Whether anything differs between the examples."""
    return bool((m.target_sd > ALIVE).any())


class Component(NamedTuple):
    """The direction along which the examples differ, over the candidate latents."""

    latents: np.ndarray
    """`[candidates]` latent numbers."""
    loadings: np.ndarray
    """`[candidates]`, length 1, pointing away from the control; all 0 where `variance` is not above `floor`."""
    centre: np.ndarray
    scale: np.ndarray
    variance: float
    """Of the tested examples along their first component, in squared standard deviations."""
    floor: float
    """The largest such variance with random signs."""


def standardised(piece: Piece, m: Moments, latents: np.ndarray, centre: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Standardised target residuals `[examples, len(latents)]`."""
    whole = piece.whole
    residual = whole.target[:, latents].toarray() - m.slope[latents] * whole.base[:, latents].toarray()
    return np.clip((residual - centre) / scale, -CLIP, CLIP)


def component(pieces: Iterable[Piece], m: Moments) -> Component:
    """The first principal component of the standardised residuals, in a second pass over the features.

    Memory is `CANDIDATES` squared, whatever the number of examples.

    Args:
        m: moments of the whole texts.

    Raises:
        InputError: all examples have the same latents (`varied`).
    """
    scale = m.control_sd + FLOOR * m.target_sd + 1e-8
    centre = m.target_mean - m.slope * m.base_mean
    alive = m.target_sd > ALIVE
    if not varied(m):
        raise InputError(f"no latent differs between the {m.examples} examples, so that nothing can be ranked")
    # Values that are 0 but in a share `active` of the texts, and clipped, cannot deviate by more.
    beyond = np.minimum(m.target_sd / scale, CLIP * np.sqrt(m.active))
    order = np.argsort(-np.where(alive, beyond, -1.0), kind="stable")
    latents = np.sort(order[: min(CANDIDATES, int(alive.sum()))])
    gram = np.zeros((len(latents), len(latents)))
    total = np.zeros(len(latents))
    tested = []
    # Drawn: every second row of data in which two kinds alternate is of one kind.
    drawn = np.zeros(m.examples, bool)
    drawn[np.random.default_rng(0).permutation(m.examples)[:TESTED]] = True
    for piece in pieces:
        z = standardised(piece, m, latents, centre[latents], scale[latents])
        gram += z.T @ z
        total += z.sum(0)
        tested.append(z[drawn[piece.examples]].astype(np.float32))
    mean = total / m.examples
    loadings = np.linalg.eigh(gram / m.examples - np.outer(mean, mean))[1][:, -1]
    # The control holds no B: where it lies on the component is the clean side.
    side = loadings @ ((m.control_mean[latents] - centre[latents]) / scale[latents])
    loadings = -loadings if side > 0 else loadings
    variance, floor = above_chance(np.concatenate(tested))
    if variance <= floor:
        loadings = np.zeros_like(loadings)
    return Component(latents, loadings, centre[latents], scale[latents], variance, floor)


def above_chance(z: np.ndarray) -> tuple[float, float]:
    """Variance along the first principal component, and the largest of `FLIPS` draws of random signs.

    Args:
        z: `[examples, latents]` float32.
    """
    rng = np.random.default_rng(0)
    z = z - z.mean(0)

    def largest(values: np.ndarray) -> float:
        gram = values @ values.T if len(values) < values.shape[1] else values.T @ values
        return float(eigh(gram, eigvals_only=True, subset_by_index=[len(gram) - 1] * 2)[0]) / len(values)

    flipped = (z * (2 * rng.integers(0, 2, z.shape, np.int8) - 1) for _ in range(FLIPS))
    return largest(z), max(map(largest, flipped))


class Latent(NamedTuple):
    """One row of the feature table."""

    latent: int
    mean_difference: float
    standardised_difference: float
    """Mean difference over its standard deviation."""
    share: float
    """Share of the examples whose target sets it off more than the base response."""
    rank: int | None
    """By mean difference (the study), from 1; None: not among the study's."""
    loading: float
    """On the component; 0: not among its candidates."""
    component_rank: int | None
    """By loading, from 1; None: not among the component's."""

    def in_ranking(self, rule: FlagRule) -> bool:
        """Whether it is among the latents that a rule reads, or, for `guided`, that say what it found."""
        return (self.rank if rule == "study" else self.component_rank) is not None


def table(study: Moments, c: Component, count: int) -> list[Latent]:
    """The `count` latents of each ranking, the component's first; a latent in both rankings is one row.

    Both rankings keep latents that point at the target only: a positive mean difference, a positive loading.
    """
    difference = study.mean_difference
    by_mean = [int(j) for j in np.argsort(-difference, kind="stable")[:count] if difference[j] > 0]
    order = [int(i) for i in np.argsort(-c.loadings, kind="stable")[:count] if c.loadings[i] > 0]
    by_component = [int(c.latents[i]) for i in order]
    loadings = dict(zip(c.latents.tolist(), c.loadings.tolist(), strict=True))
    study_rank = {latent: rank for rank, latent in enumerate(by_mean, 1)}
    own_rank = {latent: rank for rank, latent in enumerate(by_component, 1)}
    return [
        Latent(
            j, float(difference[j]), float(difference[j] / max(study.sd_difference[j], 1e-12)), float(study.share[j]),
             study_rank.get(j), float(loadings.get(j, 0.0)), own_rank.get(j),
        )
        for j in dict.fromkeys([*by_component, *by_mean])
    ]  # fmt: skip


class Columns(NamedTuple):
    """The chosen latents' values, in the examples' own order; `[examples, latents]` float32 (control: its examples)."""

    matched_difference: np.ndarray
    """target - base, cut to the shorter of the two: what the study's rule reads."""
    difference: np.ndarray
    """target - base, whole texts: what the causal control is compared with."""
    residual: np.ndarray
    """Standardised target residuals: what the component rule reads."""
    control_difference: np.ndarray
    control_residual: np.ndarray
    base: np.ndarray
    """The base responses' own values."""


def columns(pieces: Iterable[Piece], m: Moments, c: Component, latents: list[int]) -> Columns:
    """Read the chosen latents' columns in another pass over the features."""
    chosen = np.asarray(latents, int)
    scale = (m.control_sd + FLOOR * m.target_sd + 1e-8)[chosen]
    centre = (m.target_mean - m.slope * m.base_mean)[chosen]
    slope = m.slope[chosen]
    matched, difference, residual, own = (np.zeros((m.examples, len(chosen)), np.float32) for _ in range(4))
    control_difference, control_residual = [], []
    for piece in pieces:
        target, base, control = (matrix[:, chosen].toarray() for matrix in piece.whole)
        matched[piece.examples] = (piece.matched.target[:, chosen] - piece.matched.base[:, chosen]).toarray()
        difference[piece.examples], own[piece.examples] = target - base, base
        residual[piece.examples] = np.clip((target - slope * base - centre) / scale, -CLIP, CLIP)
        has = piece.has_control
        control = control[has]
        control_difference.append(control - base[has])
        control_residual.append(np.clip((control - slope * base[has] - centre) / scale, -CLIP, CLIP))
    return Columns(
        matched, difference, residual, np.concatenate(control_difference).astype(np.float32),
        np.concatenate(control_residual).astype(np.float32), own,
    )  # fmt: skip


class Ranked(NamedTuple):
    latents: list[Latent]
    columns: Columns
    variance: float | None = None
    """Along the component, and the most that random signs give; None where read back from files, or where nothing varies."""
    floor: float | None = None

    def by(self, rule: FlagRule) -> list[int]:
        """Positions of the latents of a rule's ranking."""
        return [i for i, row in enumerate(self.latents) if row.in_ranking(rule)]


def ranked(pieces: Callable[[], Iterable[Piece]], count: int) -> Ranked:
    """The latents that tell the data from the base model, by both rankings, and every example's values on them.

    Args:
        pieces: gives the features anew each time: they are passed over four times, and never in memory as a whole.
        count: latents kept by each ranking.

    Returns:
        No latent where none does.
    """
    whole = moments(pieces(), "whole")
    if not varied(whole):
        empty = np.zeros((whole.examples, 0), np.float32)
        return Ranked([], Columns(empty, empty, empty, empty[:0], empty[:0], empty))
    direction = component(pieces(), whole)
    latents = table(moments(pieces(), "matched"), direction, count)
    values = columns(pieces(), whole, direction, [latent.latent for latent in latents])
    return Ranked(latents, values, direction.variance, direction.floor)


def write_ranked(folder: Path, ranking: Ranked) -> None:
    """Write `latents.json` and `columns.npz`."""
    write_json(folder / "latents.json", [latent._asdict() for latent in ranking.latents])
    with atomic(folder / "columns.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **ranking.columns._asdict())


def read_latents(folder: Path) -> list[Latent]:
    """Read the feature table back."""
    return [Latent(**row) for row in read_json(folder / "latents.json")]


def read_ranked(folder: Path) -> Ranked:
    """Read table and columns back."""
    with np.load(folder / "columns.npz", allow_pickle=False) as file:
        return Ranked(read_latents(folder), Columns(**{name: file[name] for name in file.files}))
