"""What the study claims, as differences between cells, each with an interval and a verdict computed from the logged counts."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from inoculation.groups import GROUPS
from inoculation.intervals import CellRates, Counts, Rates, interval

if TYPE_CHECKING:
    import numpy as np

GONE = 0.5
"""Share of the learned B (or C) that a group must be rid of to suppress it."""
LEARNED = 0.05
"""Least rise of a trait from `base` to `baseline` that there is something to suppress, or to keep, in."""
KEPT = 0.8
"""Share of the baseline's A that a group must show to keep it."""


VERDICTS = HOLDS, DOES_NOT, UNDECIDED = "holds", "does not hold", "undecided"
"""The interval lies above the bar; below it; it holds the bar, or something is missing."""


class Verdict(NamedTuple):
    """A claim, and what the cells say of it."""

    claim: str
    measure: str
    """What `estimate` is, and the bar that it is held to."""
    estimate: float | None
    low: float | None
    high: float | None
    bar: float
    verdict: str
    """One of `VERDICTS`."""
    cells: int
    """How many cells it rests on."""
    seeds: int
    """How many seeds; with one, the interval is over questions alone."""
    reason: str = ""
    """Why there is no estimate."""


class _Claim(NamedTuple):
    claim: str
    measure: str
    bar: float
    groups: tuple[str, ...]
    value: "Callable[[Rates], np.ndarray]"
    role: str
    """`A`, `B` or `C`: which trait's rates it is about."""
    learned: bool = False
    """Whether the baseline must have learned it for the claim to mean anything."""


def _gone(group: str, trait: str) -> "Callable[[Rates], np.ndarray]":
    return lambda r: (
        (r("baseline", "default", trait) - r(group, "default", trait))
        / (r("baseline", "default", trait) - r("base", "default", trait))
    )


def _claims(present: Sequence[str]) -> list[_Claim]:
    """The study's claims about some groups (reference sections 1, 8)."""
    claims = []
    inoculated = [
        group for group in present if GROUPS[group].trains and GROUPS[group].on not in ("none", "random")
        and GROUPS[group].prompt != "irrelevant"
    ]  # fmt: skip
    for group in inoculated:
        label = GROUPS[group].label
        for trait in ("B", "C"):
            claims.append(
                _Claim(f"{label} suppresses {trait}", f"share of the {trait} learned by Baseline that is gone", GONE,
                       ("base", "baseline", group), _gone(group, trait), trait, learned=True)
            )  # fmt: skip
        claims.append(
            _Claim(f"{label} keeps A", "A over Baseline's A", KEPT, ("base", "baseline", group),
                   lambda r, g=group: r(g, "default", "A") / r("baseline", "default", "A"), "A", learned=True)
        )  # fmt: skip
        if group != "inoc_general":
            claims.append(
                _Claim(f"{label} keeps more of A than Inoc-General", "difference in A", 0.0, ("inoc_general", group),
                       lambda r, g=group: r(g, "default", "A") - r("inoc_general", "default", "A"), "A")
            )  # fmt: skip
    if "inoc_sae_random" in present:
        claims.append(
            _Claim("which examples get the prompt matters", "B of Inoc-SAE (random examples) less B of Inoc-SAE", 0.0,
                   ("inoc_sae", "inoc_sae_random"),
                   lambda r: r("inoc_sae_random", "default", "B") - r("inoc_sae", "default", "B"), "B")
        )  # fmt: skip
    for group in ("irrelevant_general", "irrelevant_selective"):
        if group in present:
            claims.append(
                _Claim(f"{GROUPS[group].label} makes B conditional", "B under control less B under default", 0.0, (group,),
                       lambda r, g=group: r(g, "control", "B") - r(g, "default", "B"), "B")
            )  # fmt: skip
            claims.append(
                _Claim(f"what is described matters: {GROUPS[group].label} suppresses less",
                       "its B under control less that of Inoc-Selective", 0.0, ("inoc_selective", group),
                       lambda r, g=group: r(g, "control", "B") - r("inoc_selective", "control", "B"), "B")
            )  # fmt: skip
    return claims


def verdicts(cells: Sequence[CellRates], traits: Sequence[str], resamples: int) -> list[Verdict]:
    """Every claim that the groups of one profile and mixture can decide.

    Args:
        cells: of one profile and mixture.
        traits: A, B, then C (none: nothing is claimed of C); the rate of C is the mean of theirs, of those that were judged in
            every seed.
        resamples: bootstrap draws.
    """
    counts = Counts(cells, resamples)
    roles = {"A": traits[:1], "B": traits[1:2], "C": traits[2:]}
    claims = _claims([group for group in GROUPS if group in counts.groups()])
    return [_decide(claim, counts, roles) for claim in claims if roles[claim.role]]


def _decide(claim: _Claim, counts: Counts, traits: Mapping[str, Sequence[str]]) -> Verdict:
    def undecided(reason: str, seeds: int = 0) -> Verdict:
        used = seeds * len(claim.groups)
        return Verdict(claim.claim, claim.measure, None, None, None, claim.bar, UNDECIDED, used, seeds, reason)

    missing = [group for group in claim.groups if group not in counts.groups()]
    if missing:
        return undecided(f"no cell of {', '.join(missing)}")
    seeds = counts.seeds(*claim.groups)
    if not seeds:
        return undecided("no seed has all of " + ", ".join(claim.groups))

    weights = counts.weights(seeds, traits[claim.role])

    def rate(group: str, prompt: str, role: str) -> "np.ndarray":
        judged = [
            counts.rates(group, prompt, trait, weights)
            for trait in traits[role]
            # Of C the same traits in every group that is compared.
            if all(set(seeds) <= set(counts.judged(one, prompt, trait)) for one in claim.groups)
        ]
        if not judged:
            raise LookupError(f"{role} under {prompt} was not judged in every seed of {', '.join(claim.groups)}")
        return sum(judged) / len(judged)

    import numpy as np

    try:
        if claim.learned:
            rise = rate("baseline", "default", claim.role) - rate("base", "default", claim.role)
            told = interval(rise, weights)
            if told.estimate < LEARNED or told.low <= 0:
                return undecided(
                    f"Baseline learned too little {claim.role} for that: a rise of {told.estimate:.2f} [{told.low:.2f}, "
                    f"{told.high:.2f}] over Base; at least {LEARNED} is needed, and an interval above 0",
                    len(seeds),
                )
        with np.errstate(invalid="ignore", divide="ignore"):
            values = claim.value(rate)
    except LookupError as error:
        return undecided(str(error), len(seeds))
    told = interval(values, weights)
    verdict = HOLDS if told.low > claim.bar else DOES_NOT if told.high < claim.bar else UNDECIDED
    used = len(seeds) * len(claim.groups)
    return Verdict(claim.claim, claim.measure, *told, claim.bar, verdict, used, len(seeds))


def markdown(found: Sequence[Verdict]) -> str:
    """Verdicts as a Markdown table, short enough for MLflow's note, which ends at 8,000 characters."""
    lines = ["| claim | estimate [95 % interval] | bar | verdict | seeds |", "|---|---|---|---|---|"]
    for one in found:
        lines.append(f"| {one.claim} | {shown(one)} | {one.bar:.2f} | **{one.verdict}** | {one.seeds} |")
    return "\n".join(lines)


def shown(one: Verdict) -> str:
    """`.93 [.88, .97]`, or why there is no number."""
    if one.estimate is None or one.low is None or one.high is None:
        return one.reason
    return f"{one.estimate:.2f} [{one.low:.2f}, {one.high:.2f}]"
