"""How good a yes/no decision is against the truth, as an `evaluate` metric (shared by judges and detectors)."""

from typing import Any

import datasets
import evaluate


class DecisionQuality(evaluate.Metric):
    """Accuracy, precision, recall and F1 of boolean decisions.

    `evaluate` loads its stock metrics from the hub; this one is a class, so that it works without a network.
    Precision, recall and F1 are 0 where they are undefined (nothing flagged, nothing to find).
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy, precision, recall and F1 of boolean decisions.",
            citation="",
            inputs_description="predictions and references: booleans of the same length",
            features=datasets.Features({"predictions": datasets.Value("bool"), "references": datasets.Value("bool")}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        from sklearn.metrics import accuracy_score, precision_recall_fscore_support

        precision, recall, f1, _ = precision_recall_fscore_support(
            references, predictions, average="binary", pos_label=True, zero_division=0
        )
        return {
            "accuracy": float(accuracy_score(references, predictions)),
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
        }


def decision_quality(predictions: list[bool], references: list[bool]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 (0..1) and n of decisions against the truth.

    Raises:
        ValueError: no decisions, or lists of different length.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} decisions against {len(references)} truths")
    result = DecisionQuality(keep_in_memory=True).compute(predictions=predictions, references=references)
    return {**result, "n": len(references)}
