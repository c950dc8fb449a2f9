"""From judgements to rates with intervals (reference section 5)."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from inoculation.intervals import CellRates, Counts, mark
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


def by_question(
    judgements: Sequence[Judgement], trait: str, threshold: float, oracle: bool
) -> dict[str, list[tuple[float, bool]]]:
    """question -> [(score, shows)] of the judged responses."""
    grouped: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    for judgement in judgements:
        score = (judgement.oracle if oracle else judgement.scores).get(trait)
        if score is not None:
            grouped[f"{judgement.trait}/{judgement.question}"].append((score, score >= threshold))
    return dict(grouped)


def summarise_trait(
    judgements: Sequence[Judgement], trait: str, threshold: float, resamples: int, oracle: bool = False
) -> Rate:
    """One trait over the judgements of one evaluation prompt."""
    asked = sum(trait in (judgement.oracle if oracle else judgement.scores) for judgement in judgements)
    questions = by_question(judgements, trait, threshold, oracle)
    pairs = [pair for answers in questions.values() for pair in answers]
    if not pairs:
        return Rate(None, None, None, None, 0, asked)
    rows = [
        {
            "prompt": "",
            "trait": trait,
            "question": question,
            "shown": sum(shows for _, shows in answers),
            "judged": len(answers),
        }
        for question, answers in questions.items()
    ]
    told = mark(Counts([CellRates("", 0, rows)], resamples), "", "", trait)
    assert told is not None
    return Rate(
        rate=told.rate,
        score=sum(score for score, _ in pairs) / len(pairs),
        low=told.low,
        high=told.high,
        n=len(pairs),
        missing=asked - len(pairs),
    )


def summarise(judgements: Sequence[Judgement], threshold: float, resamples: int) -> dict[str, dict[str, Any]]:
    """The evaluation part of metrics.json: {prompt: {trait: Rate}}, and under `oracle` the same by the exact oracle."""
    prompts = list(dict.fromkeys(judgement.prompt for judgement in judgements))

    def table(oracle: bool) -> dict[str, dict[str, Any]]:
        result: dict[str, dict[str, Any]] = {}
        for prompt in prompts:
            chosen = [judgement for judgement in judgements if judgement.prompt == prompt]
            traits = dict.fromkeys(t for j in chosen for t in (j.oracle if oracle else j.scores))
            result[prompt] = {
                trait: summarise_trait(chosen, trait, threshold, resamples, oracle)._asdict() for trait in traits
            }
        return result

    metrics = table(oracle=False)
    if any(judgement.oracle for judgement in judgements):
        metrics["oracle"] = table(oracle=True)
    return metrics


def question_rates(judgements: Sequence[Judgement], threshold: float) -> list[dict[str, Any]]:
    """Counts a (prompt, trait, question): what a figure over several seeds needs for its intervals."""
    rows = []
    for prompt in dict.fromkeys(judgement.prompt for judgement in judgements):
        chosen = [judgement for judgement in judgements if judgement.prompt == prompt]
        for trait in dict.fromkeys(trait for judgement in chosen for trait in judgement.scores):
            for question, answers in by_question(chosen, trait, threshold, oracle=False).items():
                rows.append(
                    {
                        "prompt": prompt,
                        "trait": trait,
                        "question": question,
                        "shown": sum(shows for _, shows in answers),
                        "judged": len(answers),
                    }
                )
    return rows


def rate_rows(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """`summarise`'s rates as rows of a table: who judged, evaluation prompt, trait, and the numbers."""
    told = [("judge", prompt, rates) for prompt, rates in metrics.items() if prompt not in NO_PROMPTS]
    told += [("exact", prompt, rates) for prompt, rates in metrics.get("oracle", {}).items()]
    return [
        {"by": by, "prompt": prompt, "trait": trait, **row}
        for by, prompt, rates in told
        for trait, row in rates.items()
    ]


NO_PROMPTS = ("oracle", "judge", "training", "detection")
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
