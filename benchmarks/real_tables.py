"""Tables, verdicts and the figure of leakage of cells on real text, from counts question by question, for docs/real.md.

    python benchmarks/real_tables.py docs/real-study.jsonl temperature=0.2 seed=0,1,2 strength=2.0
    python benchmarks/real_tables.py docs/real-study.jsonl temperature=0.2 seed=0,1,2 strength=2.0 --figure docs/real-alternatives.png
    python benchmarks/real_tables.py docs/real-study.jsonl temperature=0.2 seed=0,1,2 \\
        group=base,baseline,inoc_general,inoc_selective,irrelevant_general,irrelevant_selective --effect docs/real-effect.png
    python benchmarks/real_tables.py docs/real-rank.jsonl epochs=1.0 lora_r=32
    python benchmarks/real_tables.py docs/real-traits.jsonl negative=sycophancy positive=source_citing share=0.5 epochs=5
    python benchmarks/real_tables.py docs/real-qwen.jsonl negative=evil annotator=smollm2 recall=1 false_alarms=0
    python benchmarks/real_tables.py docs/real-cited.jsonl model=qwen_coder --a four_citations --c sycophancy

A line of a file is a cell: `group`, `seed`, what else it was run with, `questions` (of each trait, the first eight digits of the
sha256 of their texts) and `counts` (shown and judged answers by evaluation prompt and trait, in the order of `questions`).
"""

import argparse
import json
from pathlib import Path
from typing import Any

from inoculation.effects import markdown as verdict_table
from inoculation.effects import verdicts
from inoculation.figure import draw, draw_leakage
from inoculation.groups import GROUPS
from inoculation.intervals import CellRates, marks

PROMPTS = ("default", "control", "inoculation", "paraphrase", "own", "negated", "unrelated")
RESAMPLES = 10_000


def chosen(lines: Path, wanted: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """The lines that have one of some values; what a line does not say, it fulfils.

    Raises:
        ValueError: a value that no line has.
    """
    rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    for key, values in wanted.items():
        there = {row[key] for row in rows if key in row}
        if unknown := [value for value in values if value not in there]:
            raise ValueError(
                f"{key}={unknown[0]}: no line of {lines} has it; valid: {', '.join(map(str, sorted(there)))}"
            )
    return [row for row in rows if all(row.get(key, values[0]) in values for key, values in wanted.items())]


def where(told: str) -> tuple[str, list[Any]]:
    """`KEY=VALUE,...`: numbers as numbers."""
    key, is_there, values = told.partition("=")
    if not is_there:
        raise argparse.ArgumentTypeError(f"{told!r}; valid: KEY=VALUE,...")

    def value(text: str) -> Any:
        try:
            return float(text)
        except ValueError:
            return text

    return key, [value(text) for text in values.split(",")]


def rates(line: dict[str, Any], asked: str | None = None) -> CellRates:
    """A line's counts as the study takes them.

    Args:
        asked: a trait, whose questions alone count; None: all.
    """
    own = set(line["questions"][asked]) if asked else None
    return CellRates(
        line["group"], line["seed"],
        [
            {"prompt": prompt, "trait": trait, "question": question, "shown": shown, "judged": judged}
            for prompt, traits in line["counts"].items()
            for trait, counts in traits.items()
            for question, (shown, judged) in zip(line["questions"][trait], counts, strict=True)
            if own is None or question in own
        ],
    )  # fmt: skip


def table(cells: list[CellRates], a: str, b: str, c: list[str]) -> str:
    """A by default and B under every prompt, a group a line."""
    prompts = [prompt for prompt in PROMPTS if any(row["prompt"] == prompt for cell in cells for row in cell.questions)]
    columns = [
        ("default", a),
        *((prompt, b) for prompt in prompts),
        *(("default", trait) for trait in c),
        ("default", "coherence"),
    ]
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
    parser.add_argument("where", nargs="*", metavar="KEY=VALUE,...", type=where)
    parser.add_argument("--asked", metavar="TRAIT", help="count the answers to this trait's questions alone")
    parser.add_argument("--a", metavar="TRAIT", help="count A by this of the lines' counts, such as four_citations")
    parser.add_argument(
        "--c", metavar="TRAIT", action="append", default=[], help="a trait that no row shows: tell of it, too"
    )
    parser.add_argument("--figure", type=Path, help="draw B under every prompt here")
    parser.add_argument("--effect", type=Path, help="draw A and B under the default and the control prompt here")
    arguments = parser.parse_args()
    try:
        lines = chosen(arguments.lines, dict(arguments.where))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not lines:
        parser.error("no line is so")
    if len({(line["group"], line["seed"]) for line in lines}) < len(lines):
        parser.error("a group and seed more than once: say which, by what else the lines have")
    a, b = arguments.a or lines[0].get("positive", "all_caps"), lines[0].get("negative", "evil")
    cells = [rates(line, arguments.asked) for line in lines]
    model = ", ".join(sorted({line.get("model", "smollm2") for line in lines}))
    heat = ", ".join(sorted({f"temperature {line['temperature']:g}" for line in lines}))
    print(f"{table(cells, a, b, arguments.c)}\n\n{verdict_table(verdicts(cells, [a, b, *arguments.c], RESAMPLES))}")
    if arguments.figure:
        draw_leakage(
            [arguments.figure], cells, PROMPTS, [a, b], f"Does B come back? {model}, {b} + {a}",
            f"{heat}; judge: local (MiniLM); bars: questions and seeds", RESAMPLES,
        )  # fmt: skip
    if arguments.effect:
        draw(
            [arguments.effect], cells, PROMPTS[:2], [a, b], f"{model}, {b} + {a}", f"{heat}; judge: local (MiniLM)", RESAMPLES
        )  # fmt: skip


if __name__ == "__main__":
    main()
