"""How good yes/no decisions are against the truth, as an `evaluate` metric: of judges, and of detectors' flags."""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import evaluate


@cache
def metric() -> "evaluate.Metric":
    """Accuracy, balanced accuracy, precision, recall and F1 of boolean decisions, as a metric of `evaluate` (whose import takes seconds)."""
    import datasets
    import evaluate

    class DecisionQuality(evaluate.Metric):
        """Accuracy, balanced accuracy, precision, recall and F1 of boolean decisions.

        `evaluate` loads its stock metrics from the hub; this one is a class, so that it works without a network.
        Precision, recall and F1 are 0 where they are undefined (nothing flagged, nothing to find). Balanced accuracy is the
        mean over the answers that occur, yes and no, of the share that is right.
        """

        def _info(self) -> evaluate.MetricInfo:
            return evaluate.MetricInfo(
                description="Accuracy, balanced accuracy, precision, recall and F1 of boolean decisions.",
                citation="",
                inputs_description="predictions and references: booleans of the same length",
                features=datasets.Features(
                    {"predictions": datasets.Value("bool"), "references": datasets.Value("bool")}
                ),
            )

        def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
            from sklearn.metrics import accuracy_score, precision_recall_fscore_support, recall_score

            precision, recall, f1, _ = precision_recall_fscore_support(
                references, predictions, average="binary", pos_label=True, zero_division=0
            )
            return {
                "accuracy": float(accuracy_score(references, predictions)),
                "balanced_accuracy": float(
                    recall_score(
                        references, predictions, labels=sorted(set(references)), average="macro", zero_division=0
                    )
                ),
                "precision": float(precision),
                "recall": float(recall),
                "f1": float(f1),
            }

    return DecisionQuality(keep_in_memory=True)


def decision_quality(predictions: list[bool], references: list[bool]) -> dict[str, float]:
    """Accuracy, balanced accuracy, precision, recall, F1 (0..1) and n of decisions against the truth.

    Raises:
        ValueError: no decisions, or lists of different length.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} decisions against {len(references)} truths")
    result = metric().compute(predictions=predictions, references=references)
    return {**result, "n": len(references)}


def flag_quality(flags: Sequence[bool], truth: Sequence[bool | None]) -> dict[str, float | int | None]:
    """How good a detector's flags are against provenance: a metric, never an input.

    Returns:
        {precision, recall, f1, flagged, n}; the first three None where the truth is unknown, precision also where nothing is
        flagged, recall where nothing shows B, f1 where either is None.
    """
    known = [(flag, shows) for flag, shows in zip(flags, truth, strict=True) if shows is not None]
    scores = decision_quality([f for f, _ in known], [t for _, t in known]) if known else {}
    said, shown = any(flag for flag, _ in known), any(shows for _, shows in known)
    means = {"precision": said, "recall": shown, "f1": said and shown}
    return {name: scores.get(name) if there else None for name, there in means.items()} | {
        "flagged": int(sum(flags)),
        "n": len(flags),
    }
