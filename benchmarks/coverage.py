"""How often the study's 95 % interval holds the truth, where seeds differ: for docs/study.md.

    python benchmarks/coverage.py

Two groups of the same true rate, each seed's own rate drawn around it; 60 questions, 10 answers each; no model, a minute.
"""

import numpy as np

from inoculation.effects import UNDECIDED, CellRates, verdicts

STUDIES, QUESTIONS, ANSWERS, RATE = 300, 60, 10, 0.6


def cell(group: str, seed: int, spread: float, rng: np.random.Generator) -> CellRates:
    rate = float(np.clip(RATE + rng.normal(0, spread), 0, 1))
    asked = [f"question {number}" for number in range(QUESTIONS)]
    shown = rng.binomial(ANSWERS, rate, QUESTIONS)
    return CellRates(
        group, seed,
        [
            {"prompt": "default", "trait": "all_caps", "question": question, "shown": int(count), "judged": ANSWERS}
            for question, count in zip(asked, shown, strict=True)
        ],
    )  # fmt: skip


def main() -> None:
    print(
        "| seeds | sd between seeds | interval holds the truth | a verdict where there is nothing |\n|---|---|---|---|"
    )
    for seeds in (2, 3, 5, 10):
        for spread in (0.0, 0.03, 0.08):
            held = decided = 0
            for number in range(STUDIES):
                rng = np.random.default_rng(number)
                cells = [cell(g, s, spread, rng) for g in ("inoc_general", "inoc_selective") for s in range(seeds)]
                [one] = [v for v in verdicts(cells, ["all_caps", "evil"], 1000) if "more of A" in v.claim]
                held += one.low is not None and one.high is not None and one.low <= 0 <= one.high
                decided += one.verdict != UNDECIDED
            print(f"| {seeds} | {spread:.2f} | {held / STUDIES:.2f} | {decided / STUDIES:.2f} |", flush=True)


if __name__ == "__main__":
    main()
