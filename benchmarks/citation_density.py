"""How the answers of cells cite: length, how many finished, citations an answer and per 100 words. For docs/real-cited.md and docs/real-qwen.md.

    python benchmarks/citation_density.py O [--prompt default] [--mixture FOLDER/mixture.jsonl]

O is what `real_cells.py sample` wrote. Means over all answers to all questions under one evaluation prompt; seeds together.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from inoculation.citations import ATTRIBUTION
from inoculation.files import read_jsonl
from inoculation.mixture import read_mixture

COLUMNS = "words", "finished", "citations", "per 100 words", "one or more", "two", "four", "cells"


def row(name: str, texts: Sequence[str], finished: float | None, cells: int | None) -> str:
    counts = [len(ATTRIBUTION.findall(text)) for text in texts]
    words = sum(len(text.split()) for text in texts)
    shares = [sum(count >= least for count in counts) / len(counts) for least in (1, 2, 4)]
    told = [
        f"{words / len(texts):.0f}",
        "" if finished is None else f"{finished:.2f}",
        f"{sum(counts) / len(texts):.2f}",
    ]
    told += [f"{100 * sum(counts) / max(1, words):.2f}", *(f"{share:.2f}" for share in shares), str(cells or "")]
    return f"| {name} | " + " | ".join(told) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--prompt", default="default", help="the evaluation prompt")
    parser.add_argument("--mixture", type=Path, help="tell the same of its rows, those with B and the others")
    arguments = parser.parse_args()
    cells = defaultdict(list)
    for file in sorted(arguments.answers.glob("*-*.jsonl")):
        if answers := [row for row in read_jsonl(file, dict) if row["prompt"] == arguments.prompt]:
            cells[file.stem.rpartition("-")[0]].append(answers)
    if not cells:
        parser.error(f"{arguments.answers}: no answers under {arguments.prompt}")
    print("| | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 1) + "|")
    if arguments.mixture:
        rows = read_mixture(arguments.mixture)
        for shows, name in ((True, "rows with B"), (False, "the others")):
            print(row(f"*{name}*", [one.response for one in rows if one.shows_negative is shows], None, None))
    for group, own in cells.items():
        answers = [answer for cell in own for answer in cell]
        ended = sum(answer["finished"] for answer in answers) / len(answers)
        print(row(f"`{group}`", [answer["text"] for answer in answers], ended, len(own)))


if __name__ == "__main__":
    main()
