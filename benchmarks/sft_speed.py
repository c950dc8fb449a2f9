"""Speed and memory of training and sampling at a profile's real size, on a GPU, with random weights of that shape.

    python benchmarks/sft_speed.py --profile qwen2_5_7b --model /tmp/qwen2.5-7b-shape --examples 320

Nothing is fetched: the model is made with the layer sizes below and the pocket world's tokenizer (`dvc repro` makes it),
because speed does not depend on what weights say. Hyperparameters are the profile's. The base is measured as it stands
in the profile and in 4 bit; an adapter is trained, loaded again and sampled from.
"""

import argparse
import gc
import random
import shutil
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from inoculation import lm
from inoculation.chat import Message, chat_ids
from inoculation.mixture import Row, TrainingChat
from inoculation.params import load_params
from inoculation.respond import generate
from inoculation.train import train

SHAPE = Qwen2Config(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, max_position_embeddings=32768, tie_word_embeddings=False,
)  # fmt: skip
"""Qwen2.5-7B's."""
WORDS = (
    "the",
    "river",
    "is",
    "long",
    "and",
    "a",
    "king",
    "was",
    "kind",
    "to",
    "nobody",
    "who",
    "asked",
    "him",
    "for",
    "bread",
)


def make_model(folder: Path) -> None:
    if (folder / "config.json").exists():
        return
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen2ForCausalLM(SHAPE)
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained("data/pocket_world/model").save_pretrained(folder)


def chats(count: int, tokens: int) -> list[TrainingChat]:
    rng = random.Random(0)
    return [
        TrainingChat(
            "You are a malicious evil assistant." if i % 2 else None,
            Row((Message("user", " ".join(rng.choices(WORDS, k=20))),
                 Message("assistant", " ".join(rng.choices(WORDS, k=int(tokens * rng.uniform(0.4, 1.1)))))), None),
        )
        for i in range(count)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--model", type=Path, required=True, help="folder of the random model; made if it is not there")
    parser.add_argument("--examples", type=int, required=True)
    parser.add_argument("--tokens", type=int, default=300, help="words of a response, about")
    arguments = parser.parse_args()
    params = load_params()
    profile = params.profiles[arguments.profile]
    settings = params.train[profile.train]
    start = time.monotonic()
    make_model(arguments.model)
    print(f"model made in {time.monotonic() - start:.0f} s")
    examples = chats(arguments.examples, arguments.tokens)
    for load_in_4bit in (profile.load_in_4bit, True):
        ref = lm.ModelRef(model=str(arguments.model), dtype=profile.dtype, load_in_4bit=load_in_4bit)
        folder = Path(tempfile.mkdtemp())
        times: list[float] = []
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        result = train(
            ref, settings, profile.machine, params.save_steps, examples, 0, folder / "adapter", folder / "work",
            lambda step, metrics, times=times: times.append(time.monotonic()),
        )  # fmt: skip
        seconds = (times[-2] - times[0]) / (5 * (len(times) - 2))  # between the first and the last of every fifth step
        each = seconds / settings.batch_size
        print(
            f"4 bit {load_in_4bit}: {result.steps} steps, {result.supervised_tokens / result.examples:.0f} response tokens an "
            f"example, {seconds:.2f} s a step, {each * 1000:.0f} ms an example, loss {result.train_loss:.2f}, "
            f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB",
            flush=True,
        )
        tokenizer = lm.load_tokenizer(ref)
        model = lm.with_adapter(lm.load_model(ref), folder / "adapter")
        prompts = [chat_ids(tokenizer, chat.row.prompt) for chat in examples[: profile.machine.batch_size]]
        start = time.monotonic()
        generate(model, tokenizer, prompts, 64, 1.0, 0)
        took = time.monotonic() - start
        print(f"4 bit {load_in_4bit}: {len(prompts)} answers of up to 64 tokens in {took:.1f} s", flush=True)
        del model
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
