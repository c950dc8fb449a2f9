"""What selective inoculation keeps of A on real text, beside what the rows left without a prompt teach alone, for docs/real-traits.md.

python benchmarks/real_kept.py docs/real-traits.jsonl docs/real-kept.png
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from real_tables import RESAMPLES, chosen, rates

from inoculation.intervals import CellRates, Counts, interval, mark

A = "source_citing"
COMPARED = [
    ("sycophancy, 5 epochs", "sycophancy", 0.5, 5), ("sycophancy, 10 epochs", "sycophancy", 0.5, 10),
    ("sycophancy in a quarter\nof the rows, 5 epochs", "sycophancy", 0.25, 5), ("evil, 5 epochs", "evil", 0.5, 5),
]  # fmt: skip
"""A label; B, its share of the rows, epochs."""
ALONE = "filter_persona"
"""The group that the other rows alone are counted as: they were trained as `baseline` of a mixture without B."""
SHOWN = [("baseline", "all rows, no prompt", "C1", "o"), ("inoc_selective", "rows with B under a prompt", "C3", "d"),
         (ALONE, "rows without B alone", "black", "s")]  # fmt: skip


def cells(lines: Path, b: str, share: float, epochs: int) -> list[CellRates]:
    """Baseline and selective inoculation of a mixture, and the baseline of its rows without B."""

    def where(share: float) -> dict[str, list[str | float]]:
        return {"positive": [A], "negative": [b], "share": [share], "epochs": [epochs]}

    mixture = [rates(line) for line in chosen(lines, where(share)) if line["group"] in ("baseline", "inoc_selective")]
    return [*mixture, *(rates(line)._replace(group=ALONE) for line in chosen(lines, where(0)))]


def alike(found: list[CellRates], prompt: str) -> list[CellRates]:
    """The same cells, with A's answers under a prompt to the questions that all of them were judged for."""
    asked = [
        {row["question"] for row in cell.questions if (row["prompt"], row["trait"]) == (prompt, A) and row["judged"]}
        for cell in found
    ]
    kept = set.intersection(*asked)
    return [
        cell._replace(questions=[row for row in cell.questions if row["trait"] == A and row["question"] in kept])
        for cell in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path)
    parser.add_argument("figure", type=Path)
    arguments = parser.parse_args()
    lines, figure = arguments.lines, arguments.figure
    drawn, axis = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
    print(
        "| | prompt | `baseline` | `inoc_selective` | the other rows alone | `inoc_selective` less those | share of A kept |"
    )
    print("|---" * 7 + "|")
    for row, (label, *which) in enumerate(COMPARED):
        for prompt in ("default", "control"):
            counts = Counts(alike(cells(lines, *which), prompt), RESAMPLES)
            weights = counts.weights(counts.seeds(*(group for group, *_ in SHOWN)), [A])
            told = {group: counts.rates(group, prompt, A, weights) for group, *_ in SHOWN}
            less = interval(told["inoc_selective"] - told[ALONE], weights)
            kept = interval(told["inoc_selective"] / told["baseline"], weights)
            print(
                f"| {' '.join(label.split())} | {prompt} | " + " | ".join(f"{told[group][0]:.2f}" for group, *_ in SHOWN)
                + "".join(f" | {one.estimate:.2f} [{one.low:.2f}, {one.high:.2f}]" for one in (less, kept)) + " |"
            )  # fmt: skip
        counts = Counts(alike(cells(lines, *which), "default"), RESAMPLES)
        for place, (group, name, colour, shape) in enumerate(SHOWN):
            found = mark(counts, group, "default", A)
            assert found is not None
            axis.errorbar(
                found.rate, -row - 0.18 * place, xerr=[[found.rate - found.low], [found.high - found.rate]], fmt=shape, color=colour,
                capsize=3, label=name if not row else None,
            )  # fmt: skip
    axis.set_yticks([-row - 0.18 for row in range(len(COMPARED))], [label for label, *_ in COMPARED])
    axis.set_xlim(0, 1)
    axis.set_xlabel("share of responses that cite (A), default prompt, [95 % interval]")
    axis.grid(axis="x", alpha=0.4)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    drawn.savefig(figure, dpi=110)


if __name__ == "__main__":
    main()
