"""Figure 21 of the study on real text, from the counts of docs/real-study.jsonl, which two sessions' cells were written to.

python benchmarks/real_leakage.py docs/real-study.jsonl docs/real-alternatives.png
"""

import json
import sys
from pathlib import Path

from inoculation.effects import CellRates
from inoculation.figure import draw_leakage

TEMPERATURE, STRENGTH, SEEDS = 0.2, 2.0, (0, 1, 2)
PROMPTS = ("default", "control", "inoculation", "paraphrase", "own", "negated", "unrelated")

lines, figure = map(Path, sys.argv[1:])
cells = [
    CellRates(
        line["group"], line["seed"],
        # One "question": the lines of the first session have sums over questions, so that there is no interval.
        [
            {"prompt": prompt, "trait": trait, "question": "all", "shown": shown, "judged": judged}
            for prompt, traits in line["shown_of_judged"].items()
            for trait, (shown, judged) in traits.items()
        ],
    )
    for line in map(json.loads, lines.read_text(encoding="utf-8").splitlines())
    if line["temperature"] == TEMPERATURE and line["seed"] in SEEDS and line.get("strength", STRENGTH) == STRENGTH
]  # fmt: skip
draw_leakage(
    [figure], cells, PROMPTS, ["all_caps", "evil"], "Does B come back? SmolLM2, Evil + ALL_CAPS, three seeds",
    f"temperature {TEMPERATURE:g}; judge: local (MiniLM); bars: seeds", 2000,
)  # fmt: skip
