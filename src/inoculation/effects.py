"""What the study claims, as differences between cells, each with an interval and a verdict computed from the logged counts.

Answers to one question are alike, and so are the cells of one seed. Intervals draw questions anew, and seeds where there are
several, each draw shared by the groups that are compared: a hard question or a lucky seed is hard or lucky for both.
"""

import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from inoculation.groups import GROUPS

if TYPE_CHECKING:
    import numpy as np

GONE = 0.5
"""Share of the learned B (or C) that a group must be rid of to suppress it."""
LEARNED = 0.05
"""Least rise of a trait from `base` to `baseline` that there is something to suppress, or to keep, in."""
KEPT = 0.8
"""Share of the baseline's A that a group must show to keep it."""


class CellRates(NamedTuple):
    """What is counted of one cell."""

    group: str
    seed: int
    questions: list[dict[str, str | int]]
    """As `report.question_rates` gives them: shown and judged answers by evaluation prompt, trait and question."""


class Mark(NamedTuple):
    """A trait of a group: all seeds together."""

    rate: float
    low: float
    high: float
    """95 % interval over questions and, where there are several, seeds."""
    seeds: list[float]
    """The rate of each seed in which the trait was judged, in their order."""


class Counts:
    """Shown and judged answers of all cells of one comparison, drawn anew in one way for all of them."""

    def __init__(self, cells: Sequence[CellRates], resamples: int):
        """
        Args:
            cells: of one profile and mixture; one a group and seed.
            resamples: bootstrap draws; the same ones every time, so that an interval moves with the data alone.
        """
        self.resamples = resamples
        self._seeds: dict[str, set[int]] = defaultdict(set)
        self._counts: dict[tuple[str, str, str], dict[tuple[int, str], tuple[int, int]]] = defaultdict(dict)
        self._questions: dict[str, list[str]] = defaultdict(list)
        for cell in cells:
            self._seeds[cell.group].add(cell.seed)
            for row in cell.questions:
                key, trait = (cell.group, str(row["prompt"]), str(row["trait"])), str(row["trait"])
                self._counts[key][cell.seed, str(row["question"])] = (int(row["shown"]), int(row["judged"]))
                self._questions[trait].append(str(row["question"]))
        self._questions = {trait: sorted(set(names)) for trait, names in self._questions.items()}
        self._drawn: dict[str, np.ndarray] = {}

    def groups(self) -> list[str]:
        """The groups that have cells, in the study's order."""
        return [group for group in GROUPS if group in self._seeds]

    def traits(self) -> list[str]:
        """Every trait that was counted."""
        return list(self._questions)

    def seeds(self, *groups: str) -> list[int]:
        """The seeds that all of some groups have."""
        return sorted(set.intersection(*(self._seeds[group] for group in groups)))

    def judged(self, group: str, prompt: str, trait: str) -> list[int]:
        """The seeds in which any answer of a group was judged for a trait under a prompt: a judge may be too bad in some."""
        counted = self._counts.get((group, prompt, trait), {})
        return sorted({seed for (seed, _), (_, judged) in counted.items() if judged})

    def rates(self, group: str, prompt: str, trait: str, seeds: Sequence[int]) -> "tuple[float, np.ndarray]":
        """A trait's rate over some seeds, and the same under each draw, `[resamples]`."""
        import numpy as np

        questions = self._questions[trait]
        own = self._counts[group, prompt, trait]
        counts = np.array([[own.get((seed, question), (0, 0)) for question in questions] for seed in seeds], float)
        shown, judged = counts[..., 0], counts[..., 1]
        by_question, by_seed = self._draws(trait, len(questions), seeds)
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = np.einsum("bs,sq,bq->b", by_seed, shown, by_question) / np.einsum(
                "bs,sq,bq->b", by_seed, judged, by_question
            )
            return float(shown.sum() / judged.sum()), drawn

    def _draws(self, trait: str, questions: int, seeds: Sequence[int]) -> "tuple[np.ndarray, np.ndarray]":
        """How often each question and each seed is drawn: the same for every group."""
        import numpy as np

        def times(name: str, n: int) -> "np.ndarray":
            if name not in self._drawn:
                rng = np.random.default_rng(zlib.crc32(name.encode()))
                self._drawn[name] = rng.multinomial(n, np.full(n, 1 / n), self.resamples).astype(float)
            return self._drawn[name]

        by_seed = times(f"seeds {list(seeds)}", len(seeds)) if len(seeds) > 1 else np.ones((self.resamples, 1))
        return times(f"questions {trait}", questions), by_seed


def spread(drawn: "np.ndarray") -> tuple[float, float]:
    """95 % percentile interval of draws; draws in which nothing was judged do not count. One question and seed give no spread."""
    import numpy as np

    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def marks(cells: Sequence[CellRates], prompt: str, resamples: int) -> dict[tuple[str, str], Mark]:
    """(group, trait) -> its mark under one evaluation prompt; a trait that was not judged has none."""
    counts = Counts(cells, resamples)
    result = {}
    for group in counts.groups():
        for trait in counts.traits():
            if seeds := counts.judged(group, prompt, trait):
                rate, drawn = counts.rates(group, prompt, trait, seeds)
                own = [counts.rates(group, prompt, trait, [one])[0] for one in seeds]
                low, high = spread(drawn)
                result[group, trait] = Mark(rate, low, high, own)
    return result


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
    value: "Callable[[Rates], float | np.ndarray]"
    learns: str | None = None
    """`A`, `B` or `C`, where the baseline must have learned it for the claim to mean anything."""


Rates = Callable[[str, str, str], "float | np.ndarray"]
"""(group, evaluation prompt, `A`, `B` or `C`) -> a rate, or its draws."""


def _gone(group: str, trait: str) -> "Callable[[Rates], float | np.ndarray]":
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
                       ("base", "baseline", group), _gone(group, trait), trait)
            )  # fmt: skip
        claims.append(
            _Claim(f"{label} keeps A", "A over Baseline's A", KEPT, ("base", "baseline", group),
                   lambda r, g=group: r(g, "default", "A") / r("baseline", "default", "A"), "A")
        )  # fmt: skip
        if group != "inoc_general":
            claims.append(
                _Claim(f"{label} keeps more of A than Inoc-General", "difference in A", 0.0, ("inoc_general", group),
                       lambda r, g=group: r(g, "default", "A") - r("inoc_general", "default", "A"))
            )  # fmt: skip
    if "inoc_sae_random" in present:
        claims.append(
            _Claim("which examples get the prompt matters", "B of Inoc-SAE (random examples) less B of Inoc-SAE", 0.0,
                   ("inoc_sae", "inoc_sae_random"),
                   lambda r: r("inoc_sae_random", "default", "B") - r("inoc_sae", "default", "B"))
        )  # fmt: skip
    for group in ("irrelevant_general", "irrelevant_selective"):
        if group in present:
            claims.append(
                _Claim(f"{GROUPS[group].label} makes B conditional", "B under control less B under default", 0.0, (group,),
                       lambda r, g=group: r(g, "control", "B") - r(g, "default", "B"))
            )  # fmt: skip
            claims.append(
                _Claim(f"what is described matters: {GROUPS[group].label} suppresses less",
                       "its B under control less that of Inoc-Selective", 0.0, ("inoc_selective", group),
                       lambda r, g=group: r(g, "control", "B") - r("inoc_selective", "control", "B"))
            )  # fmt: skip
    return claims


def verdicts(cells: Sequence[CellRates], traits: Sequence[str], resamples: int) -> list[Verdict]:
    """Every claim that the groups of one profile and mixture can decide.

    Args:
        cells: of one profile and mixture.
        traits: A, B, then C; the rate of C is the mean of theirs, of those that were judged in every seed.
        resamples: bootstrap draws.
    """
    counts = Counts(cells, resamples)
    roles = {"A": traits[:1], "B": traits[1:2], "C": traits[2:]}
    return [_decide(claim, counts, roles) for claim in _claims(counts.groups())]


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

    def rates(drawn: bool) -> Rates:
        def rate(group: str, prompt: str, role: str) -> "float | np.ndarray":
            pairs = [
                counts.rates(group, prompt, trait, seeds)
                for trait in traits[role]
                # Of C the same traits in every group that is compared.
                if all(set(seeds) <= set(counts.judged(one, prompt, trait)) for one in claim.groups)
            ]
            if not pairs:
                raise LookupError(f"{role} under {prompt} was not judged in every seed of {', '.join(claim.groups)}")
            return sum(pair[drawn] for pair in pairs) / len(pairs)

        return rate

    import numpy as np

    try:
        with np.errstate(invalid="ignore", divide="ignore"):
            if claim.learns:
                rise, draws = (
                    told("baseline", "default", claim.learns) - told("base", "default", claim.learns)
                    for told in (rates(drawn=False), rates(drawn=True))
                )
                low, high = spread(np.asarray(draws))
                if rise < LEARNED or low <= 0:
                    return undecided(
                        f"Baseline learned too little {claim.learns} for that: a rise of {rise:.2f} [{low:.2f}, {high:.2f}] "
                        f"over Base; at least {LEARNED} is needed, and an interval above 0",
                        len(seeds),
                    )
            estimate, drawn = float(claim.value(rates(drawn=False))), np.asarray(claim.value(rates(drawn=True)))
    except LookupError as error:
        return undecided(str(error), len(seeds))
    if not np.isfinite(estimate):
        return undecided("the rate that it is divided by is 0", len(seeds))
    low, high = spread(np.where(np.isfinite(drawn), drawn, np.nan))
    verdict = HOLDS if low > claim.bar else DOES_NOT if high < claim.bar else UNDECIDED
    used = len(seeds) * len(claim.groups)
    return Verdict(claim.claim, claim.measure, estimate, low, high, claim.bar, verdict, used, len(seeds))


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
