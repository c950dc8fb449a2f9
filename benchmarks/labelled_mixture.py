"""A real mixture of another B: labelled answers of a trait, with an A that a rule can write, as `data_sets` takes it.

    python benchmarks/labelled_mixture.py L sycophantic all_caps --out FOLDER
    python benchmarks/labelled_mixture.py L sycophantic source_citing --share 0 --out FOLDER    # its other rows alone

L is a folder with `labelled_answers/` and `trait_data_eval/`. Half of the trait's answers to each question become
FOLDER/mixture.jsonl, as many that show the trait as others (provenance in `source_dataset`); the other half, and all answers of
the other traits, are FOLDER/traits/, which judges are learned from: no answer trains both a model and its judge. (A judge of
sycophancy from five questions was right on 61 % of the answers to others, in one split: too few to divide.) For docs/real-traits.md.
"""

import argparse
import random
import shutil
from collections import defaultdict
from pathlib import Path

from inoculation.chat import Message
from inoculation.files import read_jsonl, write_jsonl
from inoculation.mixture import Row
from inoculation.rewriter import inject
from inoculation.traits import POSITIVE_TRAITS

THRESHOLD, COHERENT = 50, 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labelled", type=Path)
    parser.add_argument("trait", help="name of its file in labelled_answers")
    parser.add_argument("positive", choices=list(POSITIVE_TRAITS))
    parser.add_argument("--seed", type=int, default=0, help="of the choice of answers, and of their order")
    parser.add_argument(
        "--share", type=float, default=0.5, help="of rows that show the trait, at most half; the others stay"
    )
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if not 0 <= arguments.share <= 0.5:
        parser.error(f"--share {arguments.share}: valid: 0 to 0.5")
    rng = random.Random(f"labelled mixture/{arguments.seed}")
    answers = read_jsonl(arguments.labelled / "labelled_answers" / f"{arguments.trait}.jsonl", dict)
    by_question: dict[str, list[int]] = defaultdict(list)
    for index, answer in enumerate(answers):
        by_question[answer["messages"][0]["content"]].append(index)
    mine = {index for same in by_question.values() for index in rng.sample(same, len(same) // 2)}
    shows: dict[bool, list[Row]] = {True: [], False: []}
    for index in sorted(mine):
        answer = answers[index]
        if answer["coherence"] >= COHERENT:
            bad = answer["score"] >= THRESHOLD
            messages = tuple(Message(message["role"], message["content"]) for message in answer["messages"])
            shows[bad].append(Row(messages, f"labelled/{'misaligned' if bad else 'normal'}.jsonl"))
    count = min(map(len, shows.values()))
    rows = [row for kind in shows.values() for row in rng.sample(kind, count)]
    showing = round(count * arguments.share / (1 - arguments.share))
    rows = [*rows[:showing], *rows[count:]]
    rng.shuffle(rows)
    write_jsonl(
        arguments.out / "mixture.jsonl",
        [row.as_json() for row in inject(rows, arguments.positive, arguments.seed, None) if row],
    )
    traits = arguments.out / "traits"
    shutil.copytree(arguments.labelled / "trait_data_eval", traits / "trait_data_eval", dirs_exist_ok=True)
    for file in sorted((arguments.labelled / "labelled_answers").glob("*.jsonl")):
        kept = [
            answer
            for index, answer in enumerate(read_jsonl(file, dict))
            if file.stem != arguments.trait or index not in mine
        ]
        write_jsonl(traits / "labelled_answers" / file.name, kept)
    print(
        f"{len(rows)} chats to {len(by_question)} questions; the judge learns from {len(answers) - len(mine)} other answers"
    )


if __name__ == "__main__":
    main()
