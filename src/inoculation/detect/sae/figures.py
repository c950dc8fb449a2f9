"""How much the study's two numbers matter, and where our score stands: precision and recall against provenance."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from inoculation.detect.sae.flag import Flags
from inoculation.files import atomic

TOPS = (5, 10, 20, 40)
HITS = range(1, 9)


def sensitivity(
    path: Path,
    difference: np.ndarray,
    suspicious: Sequence[bool],
    component: Flags,
    truth: Sequence[bool | None],
    study_top: int,
    study_hits: int,
) -> None:
    """Draw precision-recall curves of the study's rule over k and n beside ours, and the histogram of our score.

    Args:
        difference: over the study's latents, `[examples, latents]`.
        truth: provenance; where it is unknown the curves are left out.
        study_top: the study's k, marked.
        study_hits: the study's n, marked.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from sklearn.metrics import precision_recall_curve

    known = np.array([shows is not None for shows in truth])
    labels = np.array([bool(shows) for shows in truth])[known]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    if labels.any() and not labels.all():
        order = np.argsort(-difference, axis=1, kind="stable")
        for index, top in enumerate(TOPS):
            hits = np.asarray(suspicious, bool)[order[:, :top]].sum(axis=1)[known]
            points = [
                (labels[hits >= n].sum() / labels.sum(), labels[hits >= n].mean(), n) for n in HITS if (hits >= n).any()
            ]
            if points:
                recall, precision, counts = zip(*points, strict=True)
                left.plot(recall, precision, ".-", color=f"C{index}", label=f"study, {top} strongest, n = 1, 2, ...")
                if top == study_top and study_hits in counts:
                    at = counts.index(study_hits)
                    left.plot(recall[at], precision[at], "o", color=f"C{index}", markersize=9, fillstyle="none")
        precision, recall, thresholds = precision_recall_curve(labels, component.score[known])
        left.plot(recall, precision, color="black", label="component, every threshold")
        if component.found:
            at = int(np.abs(thresholds - component.threshold).argmin())
            left.plot(recall[at], precision[at], "k*", markersize=13)
        left.legend(fontsize=8)
        left.set(xlabel="recall", ylabel="precision", xlim=(-0.03, 1.03), ylim=(-0.03, 1.05))
        left.set_title("against provenance; marked: the rules as configured", fontsize=10)
    else:
        left.text(0.5, 0.5, "provenance unknown or of one kind: no curve", ha="center", transform=left.transAxes)
    right.hist(component.score, bins=60, color="0.6")
    if component.threshold:
        right.axvline(component.threshold, color="black", linestyle="-" if component.found else ":")
    right.set(xlabel="component score of an example", ylabel="examples")
    right.set_title(component.reason, fontsize=8)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)
