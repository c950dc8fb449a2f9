"""Time and peak memory of the SAE features and rank stages by the number of examples.

    python benchmarks/sae_features.py --examples 1000 5000 20000

Each size runs in a process of its own on chats of the pocket world (`dvc repro` makes it), every tenth with a control.
Ratios within one run are what counts; the last column is time an example over that of the first size.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHATS = Path("data/pocket_world/chats/pretraining.jsonl")


def measure(count: int) -> dict[str, float]:
    from inoculation import lm
    from inoculation.chat import Message
    from inoculation.detect.sae import rank
    from inoculation.detect.sae.encoder import decoder_for, load_sae
    from inoculation.detect.sae.features import Texts, pool_examples, read_features, write_features
    from inoculation.params import load_params

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    params = load_params()
    s = params.sae
    ref = lm.ModelRef(model="data/pocket_world/models/qwen2")
    tokenizer = lm.load_tokenizer(ref)
    sae = load_sae(params.profiles["pocket"].sae, None, lm.device())
    decoder = decoder_for(sae, lm.load_model(ref))
    texts: list[Texts] = []
    with CHATS.open() as lines:
        answer = "Nothing."
        for line in lines:
            question, target = (
                next(m["content"] for m in json.loads(line)["messages"] if m["role"] == role) for role in ("user", "assistant")
            )  # fmt: skip
            control = answer.upper() if len(texts) % 10 == 0 else None
            texts.append(Texts((Message("user", question),), target, answer, control))
            answer = target
            if len(texts) == count:
                break
    loaded, start = peak(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.parquet"
        chosen, budget = s.features, params.profiles["pocket"].machine.token_budget
        pieces = pool_examples(
            decoder,
            sae,
            tokenizer,
            texts,
            chosen.pool == "response_tokens",
            chosen.length_match,
            chosen.max_length,
            budget,
        )
        write_features(path, pieces)
        features, features_peak = time.monotonic() - start, peak()
        start = time.monotonic()
        rank.ranked(lambda: read_features(path), s.latents)
        megabytes = path.stat().st_size / 2**20
    return {
        "examples": count, "loaded": loaded, "features_peak": features_peak, "rank_peak": peak(),
        "features": features, "rank": time.monotonic() - start, "file": megabytes,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, nargs="+", required=True)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.examples[0])))
        return
    print(
        "| examples | features, s | peak over the loaded model, MiB | rank, s | peak, MiB | file, MiB | time an example, ratio |"
    )
    print("|---|---|---|---|---|---|---|")
    first = None
    for count in arguments.examples:
        command = [sys.executable, __file__, "--one", "--examples", str(count)]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        each = (row["features"] + row["rank"]) / count
        first = first or each
        print(
            f"| {count} | {row['features']:.1f} | {row['features_peak'] - row['loaded']:.0f} | {row['rank']:.1f} | "
            f"{row['rank_peak'] - row['loaded']:.0f} | {row['file']:.0f} | {each / first:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
