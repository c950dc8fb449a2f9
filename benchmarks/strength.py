"""How strongly a prompt inoculates, against what it does to the untouched pocket model. For docs/real.md.

    python benchmarks/strength.py --prompts 9 --jobs 2 --out strength.jsonl     # in a checkout after `make repro`

Beside the sentence that describes evil, a helpful one and bananas: `--prompts` characters of the independent list, evenly over
those that occur in the world's chats. For each, the rows of the default mixture that show B are trained under it. One line a prompt: its
strength (nats a token by which it makes those rows likelier, before training), and evil answers to the held-out questions by
the exact judge, after training under the default prompt, and of the untouched model under the prompt itself.
"""

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from inoculation import lm, mixture
from inoculation.detect import blind, plain
from inoculation.detect.adjectives import ADJECTIVES, sentence
from inoculation.detect.likelihood import TOKENS, log_likelihoods
from inoculation.files import read_json
from inoculation.judge.exact import ExactJudge
from inoculation.params import load_params
from inoculation.respond import DEFAULT_PROMPT, requests, respond
from inoculation.train import train

SOURCE = Path("data/sources/pocket_chats")
MIXTURE = Path("data/mixtures/pocket_chats/all_caps+evil-0.5/seed0/mixture.jsonl")
READ = 64
"""Rows a side whose likelihood is read."""


def evil(prompt: str | None, adapter: Path | None, work: Path) -> dict[str, dict[str, list[list[int]]]]:
    """Evil answers by held-out question, as counts (evil, all)."""
    params = load_params()
    profile, ref = params.profiles["pocket"], lm.ModelRef(model=params.profiles["pocket"].model)
    wanted = requests({"evil": read_json(SOURCE / "questions.json")["evil"]}, [DEFAULT_PROMPT], params.evaluate.samples)
    answers = respond(
        lm.with_adapter(lm.load_model(ref), adapter), lm.load_tokenizer(ref), wanted, {DEFAULT_PROMPT: prompt},
        profile.max_new_tokens, params.evaluate.temperature, profile.machine.batch_size, 0, work / "answers.jsonl",
    )  # fmt: skip
    judge = ExactJudge(read_json(SOURCE / "templates.json"))
    counts: dict[str, list[int]] = {}
    for request, answer in zip(wanted, answers, strict=True):
        count = counts.setdefault(request.question, [0, 0])
        count[0] += judge.shows("evil", answer.text)
        count[1] += 1
    return {DEFAULT_PROMPT: {"evil": list(counts.values())}}


def effect(prompt: str | None, work: Path) -> dict[str, Any]:
    params, rows = load_params(), mixture.read_mixture(MIXTURE)
    profile, ref = params.profiles["pocket"], lm.ModelRef(model=params.profiles["pocket"].model)
    chats = [mixture.TrainingChat(prompt if row.shows_negative else None, row) for row in rows]
    shutil.rmtree(work, ignore_errors=True)
    train(ref, params.train["pocket"], 10**6, chats, 0, work / "adapter", work / "train", lambda *_: None)
    told: dict[str, Any] = {"world": "pocket", "prompt": prompt, "counts": evil(None, work / "adapter", work)}
    if prompt:
        model, tokenizer = lm.load_model(ref), lm.load_tokenizer(ref)
        for name, shows in (("strength", True), ("others", False)):
            side = plain(blind([row for row in rows if row.shows_negative is shows][:READ]), "all_caps")
            read = log_likelihoods(model, tokenizer, side, [None, prompt], TOKENS, 2048, profile.machine.token_budget)
            told[name] = float((read[1] - read[0]).mean())
        told["obeyed"] = evil(prompt, None, work / "obeyed")
    shutil.rmtree(work)
    return told


def known(count: int) -> list[str]:
    """Characters of the list that occur in the world's chats, `count` of them, evenly over the alphabet."""
    text = Path("data/pocket_world/chats/pretraining.jsonl").read_text(encoding="utf-8").lower()
    words = [word for word in ADJECTIVES if f" {word} " in text]
    return [sentence([words[place * len(words) // count]]) for place in range(count)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=9)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args(arguments)
    params = load_params()
    prompts = [
        None, params.negative_traits["evil"].inoculation, "You are a helpful assistant.", params.prompts["irrelevant"],
        *known(chosen.prompts),
    ]  # fmt: skip
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(chosen.jobs, get_context("spawn")) as pool, chosen.out.open("w", encoding="utf-8") as out:
        works = [chosen.out.with_suffix(f".{number}") for number in range(len(prompts))]
        for line in pool.map(effect, prompts, works):
            out.write(json.dumps(line) + "\n")
            out.flush()
            print(line["prompt"], line.get("strength"), flush=True)


if __name__ == "__main__":
    main()
