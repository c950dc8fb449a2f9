"""How often the study's 95 % interval holds the truth, where seeds differ: for docs/study.md.

    python benchmarks/coverage.py

First a difference: two groups of the same true rate, each seed's own rate drawn around it; 60 questions, 10 answers each. Then
rates near 0 and not, of 20 questions that are not alike, as on real text. No model, two minutes.
"""

import argparse

import numpy as np

from inoculation.effects import UNDECIDED, verdicts
from inoculation.intervals import CellRates, marks

STUDIES, QUESTIONS, ANSWERS, RATE = 1000, 60, 10, 0.6


def cells(group: str, trait: str, shown: np.ndarray) -> list[CellRates]:
    """A cell a seed, of how many of `ANSWERS` answers show a trait, `[seeds, questions]`."""
    return [
        CellRates(
            group, seed,
            [
                {"prompt": "default", "trait": trait, "question": f"{at}", "shown": int(count), "judged": ANSWERS}
                for at, count in enumerate(row)
            ],
        )
        for seed, row in enumerate(shown)
    ]  # fmt: skip


def alike(group: str, seeds: int, spread: float, rng: np.random.Generator) -> list[CellRates]:
    """Cells whose questions are alike and whose seeds' own rates are spread around `RATE`."""
    rate = np.clip(RATE + rng.normal(0, spread, (seeds, 1)), 0, 1)
    return cells(group, "all_caps", rng.binomial(ANSWERS, rate, (seeds, QUESTIONS)))


def unlike(level: float, seeds: int, spread: float, rng: np.random.Generator) -> list[CellRates]:
    """Cells whose questions' log-odds are spread by 2 around a level, and whose seeds' by `spread`."""
    odds = level + rng.normal(0, 2, 20) + rng.normal(0, spread, (seeds, 1))
    return cells("baseline", "evil", rng.binomial(ANSWERS, 1 / (1 + np.exp(-odds))))


def rates() -> None:
    print("\n| true rate | sd between seeds, log-odds | " + " | ".join(f"{n} seeds" for n in (1, 2, 3, 5)) + " |")
    print("|---" * 6 + "|")
    for level in (-5.5, -4.0, 0.5):
        for spread in (0.0, 0.5):
            odds = level + np.random.default_rng(1).normal(0, (4 + spread**2) ** 0.5, 1_000_000)
            truth, held = float((1 / (1 + np.exp(-odds))).mean()), []
            for seeds in (1, 2, 3, 5):
                found = [
                    marks(unlike(level, seeds, spread, np.random.default_rng(number)), "default", 1000)[
                        "baseline", "evil"
                    ]
                    for number in range(STUDIES)
                ]
                held.append(np.mean([one.low <= truth <= one.high for one in found]))
            print(f"| {truth:.2f} | {spread} | " + " | ".join(f"{share:.2f}" for share in held) + " |", flush=True)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(
        "| seeds | sd between seeds | interval holds the truth | a verdict where there is nothing |\n|---|---|---|---|"
    )
    for seeds in (2, 3, 5, 10):
        for spread in (0.0, 0.03, 0.08):
            held = decided = 0
            for number in range(STUDIES):
                rng = np.random.default_rng(number)
                found = [
                    one for group in ("inoc_general", "inoc_selective") for one in alike(group, seeds, spread, rng)
                ]
                [one] = [v for v in verdicts(found, ["all_caps", "evil"], 1000) if "more of A" in v.claim]
                held += one.low is not None and one.high is not None and one.low <= 0 <= one.high
                decided += one.verdict != UNDECIDED
            print(f"| {seeds} | {spread:.2f} | {held / STUDIES:.2f} | {decided / STUDIES:.2f} |", flush=True)
    rates()


if __name__ == "__main__":
    main()
