"""Tables, verdicts and the figure of leakage of cells on real text, from counts question by question, for docs/real.md.

    python benchmarks/real_tables.py docs/real-study.jsonl temperature=0.2 seed=0,1,2 strength=2.0
    python benchmarks/real_tables.py docs/real-study.jsonl temperature=0.2 seed=0,1,2 strength=2.0 --figure docs/real-alternatives.png
    python benchmarks/real_tables.py docs/real-study.jsonl temperature=0.2 seed=0,1,2 \\
        group=base,baseline,inoc_general,inoc_selective,irrelevant_general,irrelevant_selective --effect docs/real-effect.png
    python benchmarks/real_tables.py docs/real-rank.jsonl epochs=1.0 lora_r=32
    python benchmarks/real_tables.py docs/real-traits.jsonl negative=sycophancy positive=source_citing share=0.5 epochs=5

A line of a file is a cell: `group`, `seed`, what else it was run with, and `counts`: shown and judged answers by evaluation
prompt, trait and question, in the questions' order.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inoculation.effects import CellRates, marks, verdicts
from inoculation.effects import markdown as verdict_table
from inoculation.figure import draw, draw_leakage
from inoculation.groups import GROUPS

PROMPTS = ("default", "control", "inoculation", "paraphrase", "own", "negated", "unrelated")
RESAMPLES = 10_000


def chosen(lines: Path, wanted: dict[str, list[str]]) -> Iterator[dict[str, Any]]:
    """The lines that have one of some values; what a line does not say, it fulfils."""
    for line in map(json.loads, lines.read_text(encoding="utf-8").splitlines()):
        if all(str(line.get(key, values[0])) in values for key, values in wanted.items()):
            yield line


def rates(line: dict[str, Any]) -> CellRates:
    """A line's counts as the study takes them."""
    return CellRates(
        line["group"], line["seed"],
        [
            {"prompt": prompt, "trait": trait, "question": f"{number:03d}", "shown": shown, "judged": judged}
            for prompt, traits in line["counts"].items()
            for trait, counts in traits.items()
            for number, (shown, judged) in enumerate(counts)
        ],
    )  # fmt: skip


def table(cells: list[CellRates], a: str, b: str) -> str:
    """A by default and B under every prompt, a group a line."""
    prompts = [prompt for prompt in PROMPTS if any(row["prompt"] == prompt for cell in cells for row in cell.questions)]
    columns = [("default", a), *((prompt, b) for prompt in prompts), ("default", "coherence")]
    found = {prompt: marks(cells, prompt, RESAMPLES) for prompt in prompts}
    lines = [
        "| group | " + " | ".join(f"{trait}, {prompt}" for prompt, trait in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for group in (group for group in GROUPS if any(cell.group == group for cell in cells)):
        told = [found[prompt].get((group, trait)) for prompt, trait in columns]
        shown = [f"{one.rate:.2f} [{one.low:.2f}, {one.high:.2f}] ({len(one.seeds)})" if one else "" for one in told]
        lines.append(f"| `{group}` | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path)
    parser.add_argument("where", nargs="*", metavar="KEY=VALUE,...")
    parser.add_argument("--figure", type=Path, help="draw B under every prompt here")
    parser.add_argument("--effect", type=Path, help="draw A and B under the default and the control prompt here")
    arguments = parser.parse_args()
    lines = list(
        chosen(arguments.lines, {key: values.split(",") for key, values in (one.split("=") for one in arguments.where)})
    )
    if not lines:
        parser.error("no line is so")
    if len({(line["group"], line["seed"]) for line in lines}) < len(lines):
        parser.error("a group and seed more than once: say which, by what else the lines have")
    a, b = lines[0].get("positive", "all_caps"), lines[0].get("negative", "evil")
    cells = [rates(line) for line in lines]
    print(f"{table(cells, a, b)}\n\n{verdict_table(verdicts(cells, [a, b], RESAMPLES))}")
    if arguments.figure:
        draw_leakage(
            [arguments.figure], cells, PROMPTS, [a, b], f"Does B come back? SmolLM2, {b} + {a}",
            "temperature 0.2; judge: local (MiniLM); bars: questions and seeds", RESAMPLES,
        )  # fmt: skip
    if arguments.effect:
        draw(
            [arguments.effect],
            cells,
            PROMPTS[:2],
            [a, b],
            f"SmolLM2, {b} + {a}",
            "temperature 0.2; judge: local (MiniLM)",
            RESAMPLES,
        )


if __name__ == "__main__":
    main()
