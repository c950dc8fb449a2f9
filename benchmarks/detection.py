"""How well a detector finds an unknown B in a generated world, over many mixtures, without DVC or MLflow.

    python benchmarks/detection.py --detector sae --contamination 0.5 0.2 0.1 --seeds 4 5 6
    python benchmarks/detection.py --detector sae --contamination 0 --seeds 10 11 12 13 14 15 16 17 18 19
    python benchmarks/detection.py --detector audit --contamination 0.5 --seeds 4

Calls the detectors with the values of params.yaml and needs the pocket world (`dvc repro`). Prints a line a case, and
writes one as JSON to --out.
"""

import argparse
import json
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from detectors import DETECTORS, detect

from inoculation import lm, mixture, traits
from inoculation.detect import Annotator, Evidence, blind
from inoculation.detect.control import control_responses
from inoculation.detect.language import language
from inoculation.detect.sae.encoder import load_sae
from inoculation.params import Params, load_params
from inoculation.quality import flag_quality
from inoculation.respond import continue_chats
from inoculation.rewriter import inject

CHATS = Path("data/pocket_world/chats")


def annotator(params: Params, rule: str, seed: int) -> Annotator:
    """The chosen annotator's model, its SAE, and nobody who helps."""
    profile = params.profiles[params.annotator]
    ref = lm.ModelRef(model=profile.model, dtype=profile.dtype)
    return Annotator(
        model=lambda: lm.load_model(ref), tokenizer=lm.load_tokenizer(ref), synthesis=params.synthesise,
        client=lambda role: None, seed=seed, token_budget=profile.machine.token_budget,
        sae=load_sae(profile.sae, None, lm.device()), flag_rule=rule,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contamination", type=float, nargs="+", required=True, help="shares of rows that show B")
    parser.add_argument("--seeds", type=int, nargs="+", required=True, help="of partition and sampling")
    parser.add_argument("--detector", choices=DETECTORS, required=True)
    parser.add_argument("--rule", choices=["component", "study"], default="component", help="of the SAE route")
    parser.add_argument("--negative", nargs="+", default=["evil", "hallucination", "sycophancy"])
    parser.add_argument("--positive", nargs="+", default=["all_caps", "source_citing"])
    parser.add_argument("--out", type=Path, help="JSONL to append to")
    arguments = parser.parse_args()
    params = load_params()
    profile = params.profiles[params.annotator]

    @cache
    def base(negative: str, seed: int) -> dict[str, str]:
        asker = annotator(params, arguments.rule, seed)
        prompts = [pair.prompt for pair in traits.read_trait(CHATS, negative)]
        with TemporaryDirectory() as folder:  # answers of another model or setting must never be continued
            answers = continue_chats(
                asker.model(), asker.tokenizer, [(prompt, None) for prompt in prompts], profile.max_new_tokens,
                params.base_responses.temperature, profile.machine.batch_size, seed, Path(folder) / "batches.jsonl",
            )  # fmt: skip
        return {traits.question_key(prompt): answer.text for prompt, answer in zip(prompts, answers, strict=True)}

    print("| mixture | contamination | seed | found | precision / recall | flagged | prompt | reason |")
    print("|---|---|---|---|---|---|---|---|")
    for negative, seed, positive, share in product(
        arguments.negative, arguments.seeds, arguments.positive, arguments.contamination
    ):
        pairs = traits.read_trait(CHATS, negative)
        rows = inject(mixture.partition(pairs, negative, share, seed), positive, seed, None)
        answers = [base(negative, seed)[traits.question_key(row.prompt)] for row in rows]
        control = control_responses(rows, answers, positive, params.control.examples, seed, None)
        asker = annotator(params, arguments.rule, seed)
        told = language(asker.model(), asker.tokenizer, blind(rows), answers, positive, seed, asker.token_budget)
        evidence = Evidence(blind(rows), answers, control, positive, told.unfit)
        found = detect(arguments.detector, evidence, asker, params)
        quality = flag_quality(found.flagged, [row.shows_negative for row in rows])
        precision, recall = (
            "-" if quality[name] is None else f"{quality[name]:.3f}" for name in ("precision", "recall")
        )
        print(
            f"| {positive} + {negative} | {share} | {seed} | {found.found} | {precision} / "
            f"{recall} | {quality['flagged']} | {found.prompt} | {found.reason} |",
            flush=True,
        )
        if arguments.out:
            case = {"positive": positive, "negative": negative, "contamination": share, "seed": seed, **quality}
            with arguments.out.open("a") as out:
                out.write(
                    json.dumps(case | {"found": found.found, "prompt": found.prompt, "reason": found.reason}) + "\n"
                )


if __name__ == "__main__":
    main()
