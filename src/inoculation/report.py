"""From judgements to rates with intervals (reference section 5)."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from inoculation.intervals import CellRates, Counts, Mark, mark
from inoculation.judge import Judgement


class Rate(NamedTuple):
    """A trait under one evaluation prompt."""

    rate: float | None
    """Share of the judged responses with a score at or above the threshold, 0..1; None when none was judged."""
    score: float | None
    """Mean score of the judged responses, 0..100."""
    low: float | None
    high: float | None
    """95 % interval of `rate` over questions (`intervals.mark`)."""
    n: int
    """Judged responses."""
    missing: int
    """Responses whose judgement is missing; they are in neither `rate` nor `n`."""


def summarise(judgements: Sequence[Judgement], threshold: float, resamples: int) -> dict[str, dict[str, Any]]:
    """The evaluation part of metrics.json: {prompt: {trait: Rate}}, and under `oracle` the same by the exact oracle.

    Args:
        threshold: score from which a response shows a trait, 0..100.
        resamples: bootstrap draws of the intervals.
    """

    def table(oracle: bool) -> dict[str, dict[str, Any]]:
        scores: dict[str, dict[str, list[float | None]]] = defaultdict(lambda: defaultdict(list))
        for judgement in judgements:
            for trait, score in (judgement.oracle if oracle else judgement.scores).items():
                scores[judgement.prompt][trait].append(score)
        counts = Counts([CellRates("", 0, question_rates(judgements, threshold, oracle))], resamples)
        return {
            prompt: {trait: _rate(found, mark(counts, "", prompt, trait))._asdict() for trait, found in traits.items()}
            for prompt, traits in scores.items()
        }

    metrics = table(oracle=False)
    if any(judgement.oracle for judgement in judgements):
        metrics["oracle"] = table(oracle=True)
    return metrics


def cut(judgements: Sequence[Judgement]) -> dict[str, float]:
    """Share of the answers under each evaluation prompt that were still going at `max_new_tokens`.

    Groups that write longer answers have more of them cut: what comes late in an answer is then rarer for no other reason.
    """
    ended: dict[str, list[bool]] = defaultdict(list)
    for judgement in judgements:
        ended[judgement.prompt].append(judgement.finished)
    return {prompt: 1 - sum(told) / len(told) for prompt, told in ended.items()}


def _rate(scores: Sequence[float | None], told: Mark | None) -> Rate:
    """A trait's scores, None where the judgement is missing, and their mark, None where none was judged."""
    judged = [score for score in scores if score is not None]
    missing = len(scores) - len(judged)
    if told is None:
        return Rate(None, None, None, None, 0, missing)
    return Rate(told.rate, sum(judged) / len(judged), told.low, told.high, len(judged), missing)


def question_rates(judgements: Sequence[Judgement], threshold: float, oracle: bool = False) -> list[dict[str, Any]]:
    """Counts a (prompt, trait, question): shown and judged answers, where any was judged. What intervals are made of."""
    scores: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for judgement in judgements:
        for trait, score in (judgement.oracle if oracle else judgement.scores).items():
            if score is not None:
                scores[judgement.prompt, trait, f"{judgement.trait}/{judgement.question}"].append(score)
    return [
        {
            "prompt": prompt, "trait": trait, "question": question,
            "shown": sum(score >= threshold for score in found), "judged": len(found),
        }
        for (prompt, trait, question), found in scores.items()
    ]  # fmt: skip


def rate_rows(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """`summarise`'s rates as rows of a table: who judged, evaluation prompt, trait, and the numbers."""
    told = [("judge", prompt, rates) for prompt, rates in metrics.items() if prompt not in NO_PROMPTS]
    told += [("exact", prompt, rates) for prompt, rates in metrics.get("oracle", {}).items()]
    return [
        {"by": by, "prompt": prompt, "trait": trait, **row}
        for by, prompt, rates in told
        for trait, row in rates.items()
    ]


NO_PROMPTS = ("oracle", "judge", "training", "detection", "cut")
"""Keys of metrics.json that are no evaluation prompt."""


def headline(metrics: dict[str, Any], positive: str, negative: str) -> dict[str, float | None]:
    """What one cell says, in a few numbers.

    Args:
        metrics: `summarise`'s rates, and `detection` where the group has a detector.
        positive: A.
        negative: B.

    Returns:
        `A`, `B` and `C` (mean rate of the other negative traits) under the default prompt, the same as `<name>_<prompt>`
        under further ones, `coherence` (mean score, 0..100) where it was judged, and a detector's `precision`, `recall`
        and `flagged`.
    """
    told: dict[str, float | None] = {}
    for prompt, rates in metrics.items():
        if prompt in NO_PROMPTS:
            continue
        suffix = "" if prompt == "default" else f"_{prompt}"
        styles = ("all_caps", "source_citing", "coherence")
        others = [
            row["rate"] for trait, row in rates.items() if trait not in (*styles, negative) and row["rate"] is not None
        ]
        for name, trait in (("A", positive), ("B", negative)):
            told[f"{name}{suffix}"] = rates[trait]["rate"] if trait in rates else None
        told[f"C{suffix}"] = sum(others) / len(others) if others else None
        if "coherence" in rates:
            told[f"coherence{suffix}"] = rates["coherence"]["score"]
    if "detection" in metrics:
        told |= {name: metrics["detection"][name] for name in ("precision", "recall", "flagged")}
    return told
