"""Rates of traits, and what is computed of them, with 95 % intervals over questions and seeds.

Answers to one question are alike, and so are the cells of one seed. Intervals draw questions anew, and seeds where there are
several, each draw shared by the groups that are compared: a hard question or a lucky seed is hard or lucky for both. Two or
three seeds drawn anew say too little about how much seeds differ, so that an interval is at least as wide as Student's with the
degrees of freedom that there are (`interval`).
"""

import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np


class CellRates(NamedTuple):
    """What is counted of one cell."""

    group: str
    seed: int
    questions: list[dict[str, str | int]]
    """As `report.question_rates` gives them: shown and judged answers by evaluation prompt, trait and question."""


class Interval(NamedTuple):
    """An estimate with its 95 % interval over questions and, where there are several, seeds."""

    estimate: float
    low: float
    high: float


class Mark(NamedTuple):
    """A trait of a group: all seeds together."""

    rate: float
    low: float
    high: float
    """95 % interval, as `Interval`'s."""
    seeds: list[float]
    """The rate of each seed in which the trait was judged, in their order."""


class Weights(NamedTuple):
    """How often each seed and each question counts, row by row: once each; one left out; drawn anew.

    Rows, in order: all once; each seed left out (none, where there is one alone); for every trait each of its questions left out,
    then each seed with each of them; then the draws.
    """

    seeds: list[int]
    by_seed: "np.ndarray"
    """`[rows, seeds]`"""
    by_question: "dict[str, np.ndarray]"
    """Trait -> `[rows, questions]`; the questions of one trait say nothing about another's."""


Rates = Callable[[str, str, str], "np.ndarray"]
"""(group, evaluation prompt, a trait or its role) -> its rate under each row of the weights."""


class Counts:
    """Shown and judged answers of all cells of one comparison, weighted in one way for all of them."""

    def __init__(self, cells: Sequence[CellRates], resamples: int):
        """
        Args:
            cells: of one profile and mixture; one a group and seed.
            resamples: bootstrap draws; the same ones every time, so that an interval moves with the data alone.

        Raises:
            ValueError: a group and seed is there twice.
        """
        self.resamples = resamples
        self._seeds: dict[str, set[int]] = defaultdict(set)
        self._counts: dict[tuple[str, str, str], dict[tuple[int, str], tuple[int, int]]] = defaultdict(dict)
        self._questions: dict[str, list[str]] = defaultdict(list)
        for cell in cells:
            if cell.seed in self._seeds[cell.group]:
                raise ValueError(f"two cells of {cell.group}, seed {cell.seed}")
            self._seeds[cell.group].add(cell.seed)
            for row in cell.questions:
                key, trait = (cell.group, str(row["prompt"]), str(row["trait"])), str(row["trait"])
                self._counts[key][cell.seed, str(row["question"])] = (int(row["shown"]), int(row["judged"]))
                self._questions[trait].append(str(row["question"]))
        self._questions = {trait: sorted(set(names)) for trait, names in self._questions.items()}
        self._weights: dict[tuple[tuple[int, ...], tuple[str, ...]], Weights] = {}

    def groups(self) -> list[str]:
        """The groups that have cells."""
        return list(self._seeds)

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

    def seed_rate(self, group: str, prompt: str, trait: str, seed: int) -> float:
        """A trait's rate in one seed, in which it was judged."""
        own = [counts for (one, _), counts in self._counts[group, prompt, trait].items() if one == seed]
        return sum(shown for shown, _ in own) / sum(judged for _, judged in own)

    def rates(self, group: str, prompt: str, trait: str, weights: Weights) -> "np.ndarray":
        """A trait's rate over some seeds under each row of their weights; nan where nothing was judged."""
        import numpy as np

        own, questions = self._counts[group, prompt, trait], self._questions[trait]
        counts = np.array([[own.get((seed, name), (0, 0)) for name in questions] for seed in weights.seeds], float)
        shown, judged = (
            np.einsum("bs,sq,bq->b", weights.by_seed, counts[..., kind], weights.by_question[trait]) for kind in (0, 1)
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            return shown / judged

    def weights(self, seeds: Sequence[int], traits: Sequence[str]) -> Weights:
        """The weights of some seeds and of the questions of some traits: the same for every group."""
        import numpy as np

        def drawn(name: str, n: int) -> "np.ndarray":
            if n == 1:
                return np.ones((self.resamples, 1))
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            return rng.multinomial(n, np.full(n, 1 / n), self.resamples).astype(float)

        def without(n: int) -> "np.ndarray":
            return 1 - np.eye(n) if n > 1 else np.empty((0, n))

        key = tuple(seeds), tuple(traits)
        if key not in self._weights:
            no_seed, sizes = (
                without(len(seeds)),
                {name: len(self._questions[name]) for name in traits if name in self._questions},
            )
            by_seed = [np.ones((1, len(seeds))), no_seed]
            by_question = {trait: [np.ones((1 + len(no_seed), size))] for trait, size in sizes.items()}
            for left, size in sizes.items():
                no_question = without(size)
                by_seed += [np.ones((len(no_question), len(seeds))), np.repeat(no_seed, len(no_question), 0)]
                left_out = np.concatenate([no_question, np.tile(no_question, (len(no_seed), 1))])
                for trait, own in by_question.items():
                    own.append(left_out if trait == left else np.ones((len(left_out), sizes[trait])))
            by_seed.append(drawn(f"seeds {list(seeds)}", len(seeds)))
            for trait, own in by_question.items():
                own.append(drawn(f"questions {trait}", sizes[trait]))
            self._weights[key] = Weights(
                list(seeds), np.concatenate(by_seed), {trait: np.concatenate(own) for trait, own in by_question.items()}
            )
        return self._weights[key]


def interval(values: "np.ndarray", weights: Weights) -> Interval:
    """The 95 % interval of what was computed from rates, under each row of their weights.

    The percentile interval of the draws, and, where that is wider, as wide as Student's around it: the variance of the mean of
    seeds that all answer the same questions, by the jackknife (for a rate, the mean squares of a two-way analysis of variance
    without replication), with Satterthwaite's (1946) degrees of freedom (of seeds and questions; what neither explains is left out
    of these, which it would make fewer). The draws still say how much of it lies on which side. How often either holds the truth:
    `benchmarks/coverage.py`, docs/study.md. Rows in which nothing was judged do not count. One question in one seed says nothing
    of others: the interval has no ends.
    """
    import numpy as np
    from scipy.stats import t as student

    values = np.where(np.isfinite(values), values, np.nan)
    seeds, whole = len(weights.seeds), float(values[0])
    if seeds == 1 and all(own.shape[1] == 1 for own in weights.by_question.values()):
        return Interval(whole, -np.inf, np.inf)
    at = 1 + (seeds if seeds > 1 else 0)
    by_seed, variance_seeds, unexplained, questions = values[1:at], _jackknife(values[1:at]), 0.0, []
    for own in weights.by_question.values():
        size = own.shape[1]
        if size > 1:
            alone, both = values[at : at + size], values[at + size : at + size * (1 + len(by_seed))]
            if seeds == 1 and np.isnan(alone).any():  # without one question nothing is left
                return Interval(whole, -np.inf, np.inf)
            at += size * (1 + len(by_seed))
            questions.append((_jackknife(alone), size - 1))
            if len(by_seed):
                rest = both.reshape(seeds, size) - by_seed[:, None] - alone + whole
                rest = rest - rest.mean(0) - rest.mean(1, keepdims=True) + rest.mean()
                unexplained += float((seeds - 1) * (size - 1) * np.nansum(rest**2) / (seeds * size))
    variance_questions = sum(own for own, _ in questions)
    # Either holds what neither explains, so that both together hold it twice.
    variance = max(variance_seeds + variance_questions - unexplained, variance_seeds, variance_questions)
    low, high = (float(end) for end in np.nanpercentile(values[at:], [2.5, 97.5]))
    if variance > 0 and high > low:
        uncertain = sum(own**2 / free for own, free in [*questions, (variance_seeds, max(seeds - 1, 1))])
        half = float(student.ppf(0.975, variance**2 / uncertain)) * variance**0.5
        wider = 2 * half / (high - low)
        low, high = min(low, whole - wider * (whole - low)), max(high, whole + wider * (high - whole))
    return Interval(whole, low, high)


def _jackknife(left_out: "np.ndarray") -> float:
    """The variance of an estimate by what it is without each of some units, `[units]`."""
    import numpy as np

    if not len(left_out):
        return 0.0
    return float((len(left_out) - 1) * np.nanmean((left_out - np.nanmean(left_out)) ** 2))


def mark(counts: Counts, group: str, prompt: str, trait: str) -> Mark | None:
    """A trait of a group under an evaluation prompt; None where it was not judged."""
    if not (seeds := counts.judged(group, prompt, trait)):
        return None
    told = interval(counts.rates(group, prompt, trait, weights := counts.weights(seeds, [trait])), weights)
    own = [counts.seed_rate(group, prompt, trait, seed) for seed in seeds]
    return Mark(told.estimate, max(0.0, told.low), min(1.0, told.high), own)


def marks(cells: Sequence[CellRates], prompt: str, resamples: int) -> dict[tuple[str, str], Mark]:
    """(group, trait) -> its mark under one evaluation prompt; a trait that was not judged has none."""
    counts = Counts(cells, resamples)
    found = {
        (group, trait): mark(counts, group, prompt, trait) for group in counts.groups() for trait in counts.traits()
    }
    return {key: one for key, one in found.items() if one}
