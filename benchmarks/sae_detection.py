"""How well the SAE route finds an unknown B in the pocket world, for many mixtures at once, without DVC or MLflow.

    python benchmarks/sae_detection.py --contamination 0.5 0.2 0.1 --seeds 4 5 6
    python benchmarks/sae_detection.py --contamination 0 --seeds 10 11 12 13 14 15 16 17 18 19

Uses the functions of the stages with the values of params.yaml, and needs the pocket world (`dvc repro`). Prints a table
a contamination, and one JSON line a case to --out.
"""

import argparse
import json
import random
from itertools import product
from pathlib import Path

import numpy as np

from inoculation import detection, lm, mixture, traits
from inoculation.chat import chat_ids
from inoculation.detect.sae import classify, flag, rank
from inoculation.detect.sae.encoder import load_sae, truncate_after
from inoculation.detect.sae.features import Texts, pool_examples
from inoculation.params import load_params
from inoculation.respond import generate

CHATS, MODEL = Path("data/pocket_world/chats"), lm.ModelRef(model="data/pocket_world/model")


def base_answers(model, tokenizer, prompts, temperature, seed):
    chats = [chat_ids(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(chats)), key=lambda i: len(chats[i]))
    answers = [""] * len(chats)
    for start in range(0, len(order), 500):
        chunk = order[start : start + 500]
        for i, answer in zip(
            chunk, generate(model, tokenizer, [chats[i] for i in chunk], 96, temperature, seed + start), strict=False
        ):
            answers[i] = answer.text
    return answers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contamination", type=float, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--negative", nargs="+", default=["evil", "hallucination", "sycophancy"])
    parser.add_argument("--positive", nargs="+", default=["all_caps", "source_citing"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    params = load_params()
    s, c, f = params.sae, params.sae.classify, params.sae.flag
    tokenizer = lm.load_tokenizer(MODEL)
    model = lm.load_model(MODEL)
    sae = load_sae(params.world.sae.release, params.world.sae.id, lm.device())
    decoder = truncate_after(lm.load_model(MODEL), sae.block)
    print(
        "| mixture | contamination | seed | no latents | of them specific to B | study P / R | component P / R | D | flagged |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for negative, seed in product(arguments.negative, arguments.seeds):
        pairs = traits.read_trait(CHATS, negative)
        normal = {traits.question_key(pair.prompt): pair.normal for pair in pairs}
        base = dict(
            zip(
                normal,
                base_answers(
                    model, tokenizer, [pair.prompt for pair in pairs], params.base_responses.temperature, seed
                ),
                strict=True,
            )
        )
        for positive, share in product(arguments.positive, arguments.contamination):
            rows = mixture.inject(mixture.partition(pairs, negative, share, seed), positive, seed)
            answers = [base[traits.question_key(row.prompt)] for row in rows]
            chosen = set(random.Random(f"control/{seed}").sample(range(len(rows)), s.control_examples))
            control = mixture.inject(
                [row.with_response(a or " ") for row, a in zip(rows, answers, strict=True)], positive, seed
            )
            texts = [
                Texts(row.prompt, row.response, answer, control[i].response if i in chosen else None)
                for i, (row, answer) in enumerate(zip(rows, answers, strict=True))
            ]
            pieces = list(
                pool_examples(
                    decoder,
                    sae,
                    tokenizer,
                    texts,
                    s.pool == "response_tokens",
                    s.length_match,
                    s.max_length,
                    s.token_budget,
                )
            )
            moments = rank.moments(pieces, "whole")
            component = rank.component(pieces, moments)
            latents = rank.table(rank.moments(pieces, "matched"), component, s.latents)
            columns = rank.columns(pieces, moments, component, [row.latent for row in latents])
            classes = classify.causal(
                columns.difference, columns.control_difference, columns.base, c.explained_by_a, c.neutral, c.top_share
            )
            no = [name == "no" for name in classes]
            study = [i for i, row in enumerate(latents) if row.rank]
            own = [i for i, row in enumerate(latents) if row.component_rank]
            flags = {
                "study": flag.study(columns.matched_difference[:, study], [no[i] for i in study], f.study_top, f.study_hits),
                "component": flag.component(
                    columns.residual[:, own], columns.control_residual[:, own], np.array([latents[i].loading for i in own]),
                    [no[i] for i in own], f.separation, f.control_share,
                ),
            }  # fmt: skip
            truth = np.array([bool(row.shows_negative) for row in rows])
            quality = {k: detection.quality(v.flagged.tolist(), truth.tolist()) for k, v in flags.items()}
            specific = None
            if 0 < truth.sum() < len(truth):
                # Specific to B: at least half of what the contaminated examples show is absent from the clean ones.
                shown, clean = columns.difference[truth].mean(0), columns.difference[~truth].mean(0)
                judged = [clean[i] < 0.5 * shown[i] for i in range(len(no)) if no[i] and shown[i] > 0]
                specific = float(np.mean(judged)) if judged else None
            case = {
                "positive": positive, "negative": negative, "contamination": share, "seed": seed, "no": sum(no),
                "specific": specific, **quality, "separation": flags["component"].separation,
                "control_share": flags["component"].control_share, "reason": flags["component"].reason,
            }  # fmt: skip
            q, p = quality["study"], quality["component"]
            print(
                f"| {positive} + {negative} | {share} | {seed} | {sum(no)} | {'-' if specific is None else f'{specific:.2f}'} | "
                f"{q['precision']:.2f} / {q['recall']:.2f} | {p['precision']:.3f} / {p['recall']:.3f} | "
                f"{flags['component'].separation or 0:.1f} | {p['flagged']} |",
                flush=True,
            )
            if arguments.out:
                with arguments.out.open("a") as out:
                    out.write(json.dumps(case) + "\n")


if __name__ == "__main__":
    main()
