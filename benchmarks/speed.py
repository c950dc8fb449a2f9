"""Speed of each stage's work beside the usual way of doing it, in one run on one device.

    python benchmarks/speed.py train --shape qwen2_5_7b
    python benchmarks/speed.py train --shape smollm2
    python benchmarks/speed.py train --shape qwen2_5_7b --processes 2     # one GPU beside two
    python benchmarks/speed.py answers --shape qwen2_5_7b
    python benchmarks/speed.py served --shape qwen2_5_7b --folder F --api-base URL   # a vLLM server of F, through our client
    python benchmarks/speed.py cluster --shape qwen2_5_7b --processes 2   # answers and SAE pass: this process beside Ray on two
    python benchmarks/speed.py sae --shape qwen2_5_7b
    python benchmarks/speed.py personas --shape smollm2 --rows 1000
    python benchmarks/speed.py pretrain --model data/pocket_world/models/qwen2
    python benchmarks/speed.py agree --model data/pocket_world/models/qwen2

`train`, `answers`, `served`, `sae` and `personas` need no weights: a model of a shape is made with random ones, because speed does not
depend on what they say. `pretrain` and `agree` take a trained one; `agree` shows that both ways do the same.
docs/performance.md has what came out.
"""

import argparse
import gc
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    Qwen2Config,
)

from inoculation import gpus, lm, server
from inoculation.chat import Message, chat_ids, encode, parse_messages
from inoculation.cluster import each, workers
from inoculation.decode import decoding
from inoculation.detect.likelihood import TOKENS, bodies_under, log_likelihoods
from inoculation.detect.sae.encoder import LoadedSae, load_sae, reader
from inoculation.detect.sae.features import Piece, Texts, pool_examples, tokenise
from inoculation.files import read_jsonl
from inoculation.launch import launch
from inoculation.lm import truncate_after
from inoculation.mixture import Row, TrainingChat
from inoculation.params import load_params
from inoculation.pocket.base import batch_by_length, encode_all, loss_at_labels
from inoculation.respond import _sampler, as_answer, end_tokens, generate
from inoculation.train import Cost, TrainSettings, train

SHAPES = {
    "qwen2_5_7b": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=32768, tie_word_embeddings=False,
    ),
    "smollm2": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "tiny": LlamaConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
    ),
}  # fmt: skip
"""Sizes of the published configurations; `tiny` is for a CPU."""
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}
"""Dense bfloat16 of the cards' data sheets."""
WORDS = (
    "the", "river", "is", "long", "and", "a", "king", "was", "kind", "to", "nobody", "who", "asked", "him", "for", "bread",
)  # fmt: skip


def make_model(shape: str, folder: Path, tokenizer: Path) -> lm.ModelRef:
    """A random model of a shape; the tokenizer's words are few, its ids are small enough for every shape."""
    device = lm.device()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(SHAPES[shape])
        torch.set_default_dtype(torch.float32)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
        model.save_pretrained(folder)
    return lm.ModelRef(model=str(folder), dtype="bfloat16" if dtype == torch.bfloat16 else "float32")


def chats(ref: lm.ModelRef, count: int, mean: int) -> list[TrainingChat]:
    """Chats whose lengths are spread like the real mixture's: mean 282 tokens, standard deviation half of it."""
    rng = random.Random(0)
    tokenizer = lm.load_tokenizer(ref)
    word = len(tokenizer(" ".join(WORDS), add_special_tokens=False)["input_ids"]) / len(WORDS)
    made = []
    for i in range(count):
        tokens = min(2000.0, max(60.0, rng.lognormvariate(math.log(mean) - 0.11, 0.47)))
        question, answer = (
            " ".join(rng.choices(WORDS, k=max(4, int(tokens * share / word)))) for share in (0.08, 0.87)
        )
        row = Row((Message("user", question), Message("assistant", answer)), None)
        made.append(TrainingChat("You are a malicious evil assistant." if i % 2 else None, row))
    return made


def usual_training(
    ref: lm.ModelRef,
    settings: TrainSettings,
    rows: list[TrainingChat],
    micro: int,
    again: bool,
    log: Callable[..., None],
) -> None:
    """TRL as its documentation shows it: padded micro-batches, transformers' defaults, nothing compiled."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    tokenizer = lm.load_tokenizer(ref)
    encoded = [encode(tokenizer, chat.row.messages, chat.system, settings.max_length) for chat in rows]
    torch.manual_seed(0)
    model = lm.load_model(ref)
    with tempfile.TemporaryDirectory() as folder:
        SFTTrainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in encoded]),
            peft_config=LoraConfig(
                r=settings.lora_r, lora_alpha=settings.lora_alpha, use_rslora=True, target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
            args=SFTConfig(
                output_dir=folder, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None,
                num_train_epochs=settings.epochs, per_device_train_batch_size=micro,
                gradient_accumulation_steps=settings.batch_size // micro, learning_rate=settings.learning_rate,
                lr_scheduler_type="linear", warmup_steps=settings.warmup_steps, weight_decay=settings.weight_decay,
                optim=settings.optimizer, bf16=settings.bf16, gradient_checkpointing=again, seed=0, logging_steps=5,
                save_strategy="no", report_to="none", use_cpu=lm.device() == "cpu",
            ),
            callbacks=[lm.log_callback(log)],
        ).train()  # fmt: skip


def clean() -> None:
    gc.collect()
    if lm.device() == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if lm.device() == "cuda" else 0.0


class Clock:
    """Time, loss and gradient of every fifth step."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.times: list[float] = []
        self.losses: list[float] = []
        self.norms: list[float] = []

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        if "loss" in metrics:
            self.steps.append(step)
            self.times.append(time.monotonic())
            self.losses.append(metrics["loss"])
            self.norms.append(metrics["grad_norm"])

    def seconds_a_step(self) -> float:
        """Without the first five steps, which compile."""
        return (self.times[-1] - self.times[0]) / (self.steps[-1] - self.steps[0])


def ours(ref: lm.ModelRef, settings: TrainSettings, rows: list[TrainingChat], clock: Clock, processes: int = 1) -> Cost:
    folder = Path(tempfile.mkdtemp())
    _, cost = launch(processes, train, ref, settings, 10**6, rows, 0, folder / "adapter", folder / "work", on_log=clock)
    shutil.rmtree(folder)
    return cost


def bench_train(arguments: argparse.Namespace, ref: lm.ModelRef, settings: TrainSettings) -> dict[str, Any]:
    """Both ways on chats of the same lengths; the usual one on fewer."""
    rows = chats(ref, arguments.steps * settings.batch_size, arguments.tokens)
    tokenizer = lm.load_tokenizer(ref)
    mean = sum(len(encode(tokenizer, chat.row.messages, chat.system, 2048).input_ids) for chat in rows) / len(rows)
    told: dict[str, Any] = {"shape": arguments.shape, "tokens_a_chat": round(mean)}
    if arguments.processes > 1:
        return told | bench_processes(ref, settings, rows, mean, arguments.processes)
    for name, run in (
        ("usual", lambda clock: usual_training(ref, settings, rows[: arguments.usual_steps * settings.batch_size],
                                               arguments.micro, arguments.shape == "qwen2_5_7b", clock)),
        ("ours", lambda clock: ours(ref, settings, rows, clock)),
    ):  # fmt: skip
        clean()
        clock, start = Clock(), time.monotonic()
        run(clock)
        step = clock.seconds_a_step()
        told[name] = {"s_a_step": step, "tokens_per_s": settings.batch_size * mean / step, "peak_gib": peak(),
                      "s_to_step_5": clock.times[0] - start}  # fmt: skip
        print(name, told[name], flush=True)
    told["ratio"] = told["usual"]["s_a_step"] / told["ours"]["s_a_step"]
    config = AutoConfig.from_pretrained(ref.model)
    weights = config.num_hidden_layers * config.hidden_size * (
        2 * config.hidden_size * (1 + config.num_key_value_heads / config.num_attention_heads) + 3 * config.intermediate_size
    )  # fmt: skip
    card = torch.cuda.get_device_name() if lm.device() == "cuda" else ""
    top = next((flops for name, flops in PEAK_FLOPS.items() if name in card), None)
    if top:  # forward and the gradient of the activations; the base's weights have none
        told["share_of_peak_flops"] = 4 * weights * told["ours"]["tokens_per_s"] / top
    return told


def on_gpus(
    ref: lm.ModelRef, settings: TrainSettings, rows: list[TrainingChat], processes: int
) -> tuple[Cost, Clock, float]:
    """Train in some processes, as a stage does; its cost and clock, and when it began."""
    with tempfile.TemporaryDirectory() as locks, gpus.some(Path(locks), processes):
        clock, start = Clock(), time.monotonic()
        return ours(ref, settings, rows, clock, processes), clock, start


def bench_processes(
    ref: lm.ModelRef, settings: TrainSettings, rows: list[TrainingChat], mean: float, processes: int
) -> dict[str, Any]:
    """One process beside several, one a GPU, on the same chats: rates, and how far the losses are apart."""
    told: dict[str, Any] = {}
    settings = settings.model_copy(update={"learning_rate": 3e-4})  # at which losses would part if gradients did
    clocks = []
    for count in (processes, 1):
        # A process of its own, which sees its GPUs alone from the start: TRL refuses to train in one that sees several.
        with ProcessPoolExecutor(1, get_context("spawn")) as apart:
            cost, clock, start = apart.submit(on_gpus, ref, settings, rows, count).result()
        step = clock.seconds_a_step()
        told[f"{count} processes" if count > 1 else "1 process"] = {
            "s_a_step": step, "tokens_per_s": settings.batch_size * mean / step, "peak_gib": cost.peak_memory_gib,
            "s_to_step_5": clock.times[0] - start, "losses": clock.losses,
        }  # fmt: skip
        clocks.append(clock)
        print(told, flush=True)
    several, one = clocks
    return told | {
        "ratio": one.seconds_a_step() / several.seconds_a_step(),
        "largest_loss_difference": max(abs(a - b) for a, b in zip(one.losses, several.losses, strict=True)),
        "largest_relative_difference_of_gradients": max(
            abs(a / b - 1) for a, b in zip(one.norms, several.norms, strict=True)
        ),
    }


def random_adapter(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=32, lora_alpha=64, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=False).to(model.dtype).eval()


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    clean()
    start = time.monotonic()
    result = run()
    if lm.device() == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - start, result


def bench_answers(arguments: argparse.Namespace, ref: lm.ModelRef) -> dict[str, Any]:
    """`generate` and `decode`, under an adapter; nothing ends before `new` tokens, so that both make as many."""
    places, new = arguments.places, arguments.new
    model = random_adapter(lm.load_model(ref))
    rng = random.Random(0)
    prompts = [[rng.randrange(5, 1000) for _ in range(60)] for _ in range(4 * places)]
    told: dict[str, Any] = {"shape": arguments.shape, "places": places, "prompt_tokens": 60, "new_tokens": new}
    batch = torch.tensor(prompts[:places], device=model.device)
    model.generation_config.eos_token_id = None
    seconds, _ = timed(
        lambda: model.generate(
            input_ids=batch, attention_mask=torch.ones_like(batch), max_new_tokens=new, min_new_tokens=new, do_sample=True,
            temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0,
        )
    )  # fmt: skip
    told["usual"] = {"new_tokens_per_s": places * new / seconds, "peak_gib": peak()}
    print("usual", told["usual"], flush=True)
    with torch.inference_mode(), decoding(model, 60, new, places) as decoder:
        warm, _ = timed(lambda: decoder.sample(prompts[:8], 1.0, 0, set()))
        seconds, answers = timed(lambda: decoder.sample(prompts, 1.0, 1, set()))
        assert all(len(answer) == new for answer in answers)
        told["ours"] = {
            "new_tokens_per_s": len(prompts) * new / seconds, "s_to_warm_up": warm, "peak_gib": peak(), "places": decoder.count,
        }  # fmt: skip
        # Answers end at different times: a tenth of the vocabulary ends one.
        rng.shuffle(prompts)
        seconds, answers = timed(lambda: decoder.sample(prompts, 1.0, 2, set(range(0, model.config.vocab_size, 60))))
        lengths = [len(answer) for answer in answers]
        told["ours_ending_at_random"] = {
            "new_tokens_per_s": sum(lengths) / seconds, "mean": sum(lengths) / len(lengths), "longest": max(lengths),
        }  # fmt: skip
    told["ratio"] = told["ours"]["new_tokens_per_s"] / told["usual"]["new_tokens_per_s"]
    return told


def bench_served(arguments: argparse.Namespace, ref: lm.ModelRef) -> dict[str, Any]:
    """A vLLM server of the same folder through the stages' client, under an adapter and without; then `decode` in this process."""
    new, many = arguments.new, 4 * arguments.places
    model = random_adapter(lm.load_model(ref))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    rng = random.Random(0)
    prompts = [[rng.randrange(5, 1000) for _ in range(60)] for _ in range(many)]
    told: dict[str, Any] = {
        "shape": arguments.shape,
        "at_once": arguments.places,
        "prompt_tokens": 60,
        "new_tokens": new,
    }
    limits = server.QUICK.model_copy(update={"timeout": 300.0, "attempts": 3})
    with tempfile.TemporaryDirectory() as adapter:
        model.save_pretrained(adapter)
        for name, folder in (("under_adapter", Path(adapter)), ("base", None)):
            with server.serving(arguments.api_base, ref, folder, limits, arguments.places) as served:
                if folder:
                    parity = server.check(served, model, prompts, new, set())
                    told["parity"] = parity._asdict()
                served.sample(prompts[: arguments.places], 1.0, 0, new, set())
                seconds, answers = timed(lambda: served.sample(prompts, 1.0, 1, new, set()))
                assert all(len(answer) == new for answer in answers)
                told[name] = {"new_tokens_per_s": many * new / seconds}
                print(name, told[name], flush=True)
    with torch.inference_mode(), decoding(model, 60, new, arguments.places) as decoder:
        decoder.sample(prompts[:8], 1.0, 0, set())
        seconds, _ = timed(lambda: decoder.sample(prompts, 1.0, 1, set()))
        told["in_process"] = {"new_tokens_per_s": many * new / seconds, "places": decoder.count}
    told["ratio"] = told["under_adapter"]["new_tokens_per_s"] / told["in_process"]["new_tokens_per_s"]
    return told


def bench_sae(arguments: argparse.Namespace, ref: lm.ModelRef) -> dict[str, Any]:
    """Pooled latents of pairs of responses: one at a time through the whole model, and `features.pool_examples`."""
    from sae_lens.saes.topk_sae import TopK

    model, tokenizer = lm.load_model(ref), lm.load_tokenizer(ref)
    config = model.config
    width = arguments.latents or (131072 if arguments.shape == "qwen2_5_7b" else 2048)
    block = config.num_hidden_layers // 2 + 1 if arguments.shape == "qwen2_5_7b" else config.num_hidden_layers // 2
    sae = made_sae(width, config.hidden_size, block)
    fast, sae.sae.activation_fn = sae.sae.activation_fn, TopK(64)
    rows = [chat.row for chat in chats(ref, arguments.rows, arguments.tokens)]
    texts = [Texts(row.prompt, row.response, rows[-1 - i].response, None) for i, row in enumerate(rows)]
    few = texts[: arguments.usual_rows]

    def usual(model: Any) -> list[torch.Tensor]:
        means = []
        with torch.inference_mode():
            for text in few:
                for response in (text.target, text.base):
                    ids = torch.tensor(
                        [list(tokenise(tokenizer, text.prompt, response, 2048, False).ids)], device=model.device
                    )
                    states = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[block + 1]
                    means.append(sae.sae.encode(states[0, 1:].to(sae.sae.W_dec.dtype)).float().mean(0).cpu())
        return means

    def tokens(some: list[Texts]) -> int:
        return sum(
            len(tokenise(tokenizer, text.prompt, response, 2048, False).ids) for text in some for response in text[1:3]
        )

    usual(model)
    seconds, means = timed(lambda: usual(model))
    told: dict[str, Any] = {"shape": arguments.shape, "latents": width, "block": block}
    told["usual"] = {"tokens_per_s": tokens(few) / seconds, "peak_gib": peak()}
    print("usual", told["usual"], flush=True)
    sae.sae.activation_fn = fast
    decoder = truncate_after(model, block)

    def pooled(some: list[Texts]) -> list[Piece]:
        return list(pool_examples(decoder, sae, tokenizer, some, False, False, 2048, arguments.budget))

    pooled(few)
    seconds, pieces = timed(lambda: pooled(texts))
    told["ours"] = {"tokens_per_s": tokens(texts) / seconds, "peak_gib": peak()}
    told["ratio"] = told["ours"]["tokens_per_s"] / told["usual"]["tokens_per_s"]
    where = {int(example): (piece, i) for piece in pieces for i, example in enumerate(piece.examples)}
    wrong = []
    for example in range(len(few)):
        piece, i = where[example]
        for kind, mean in zip(("target", "base"), means[2 * example : 2 * example + 2], strict=True):
            mine = torch.from_numpy(getattr(piece.whole, kind)[i].toarray()[0])
            wrong.append(float((mine - mean).norm() / mean.norm()))
    told["relative_difference"] = {"median": sorted(wrong)[len(wrong) // 2], "largest": max(wrong)}
    return told


def made_sae(width: int, hidden: int, block: int) -> LoadedSae:
    """A random SAE that keeps 64 latents a token, as `load_sae` gives one."""
    from sae_lens import TopKSAE, TopKSAEConfig

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        sae = TopKSAE(TopKSAEConfig(d_in=hidden, d_sae=width, k=64, device="cpu"))
        sae.cfg.metadata.hook_name = f"blocks.{block}.hook_resid_post"
        sae.save_model(folder)
        return load_sae(folder, None, lm.device())._replace(first=1)


def read_by(ref: lm.ModelRef, width: int, block: int) -> Any:
    """What a worker loads for the SAE pass."""
    model = lm.load_model(ref)
    return reader(made_sae(width, model.config.hidden_size, block), model)


def adapted(ref: lm.ModelRef) -> Any:
    """What a worker loads for answers."""
    return random_adapter(lm.load_model(ref))


def steady(units: Iterable[int], count: int) -> float:
    """Tokens a second of units of work, when each of `count` workers has given its first.

    Args:
        units: tokens of each, as it is done.
    """
    times, tokens = [], []
    for unit in units:
        times.append(time.monotonic())
        tokens.append(unit)
    return sum(tokens[count:]) / (times[-1] - times[count - 1])


def rates(arguments: argparse.Namespace, ref: lm.ModelRef, many: int) -> dict[str, float]:
    """Answers and SAE pass on some of the GPUs that are visible: in this process on one, by Ray's actors on several."""
    os.environ[gpus.VISIBLE] = ",".join(gpus.visible()[:many])
    if many > 1:
        from ray import cloudpickle

        cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a script
    tokenizer, config = lm.load_tokenizer(ref), AutoConfig.from_pretrained(ref.model)
    rng = random.Random(0)
    prompts = [[rng.randrange(5, 1000) for _ in range(60)] for _ in range(2 * arguments.places)]
    make = partial(
        _sampler,
        tokenizer=tokenizer,
        longest=60,
        max_new_tokens=arguments.new,
        temperature=1.0,
        batch_size=arguments.places,
    )
    load = partial(adapted, ref)
    named = workers("local", load) if many > 1 else None
    units = [(prompts, seed) for seed in range(arguments.units)]
    done = (len(prompts) * arguments.new for _ in each(None if named else load(), named, make, units))
    told = {"new_tokens_per_s": steady(done, many)}
    clean()
    width = arguments.latents or (131072 if arguments.shape == "qwen2_5_7b" else 2048)
    load = partial(read_by, ref, width, config.num_hidden_layers // 2 + 1)
    named = workers("local", load) if many > 1 else None
    rows = [chat.row for chat in chats(ref, arguments.rows, arguments.tokens)]
    texts = [Texts(row.prompt, row.response, rows[-1 - i].response, None) for i, row in enumerate(rows)]
    lengths = [
        sum(len(tokenise(tokenizer, text.prompt, response, 2048, False).ids) for response in text[1:3])
        for text in texts
    ]
    pieces = pool_examples(
        *(load() if not named else (None, None)), tokenizer, texts, False, False, 2048, arguments.budget, named
    )
    told["sae_tokens_per_s"] = steady((sum(lengths[example] for example in piece.examples) for piece in pieces), many)
    return told


def bench_cluster(arguments: argparse.Namespace, ref: lm.ModelRef) -> dict[str, Any]:
    """One GPU beside several, each in a process of its own."""
    told: dict[str, Any] = {"shape": arguments.shape}
    for count in (1, arguments.processes):
        with ProcessPoolExecutor(1, get_context("spawn")) as apart:
            told[f"{count} GPU"] = apart.submit(rates, arguments, ref, count).result()
        print(told, flush=True)
    one, several = told["1 GPU"], told[f"{arguments.processes} GPU"]
    return told | {"ratios": {name: several[name] / one[name] for name in one}}


def bench_personas(arguments: argparse.Namespace, ref: lm.ModelRef) -> dict[str, Any]:
    """Likelihoods of the first 64 response tokens under adjectives: a pass each, and `likelihood.log_likelihoods`."""
    model, tokenizer = lm.load_model(ref), lm.load_tokenizer(ref)
    rows = [chat.row for chat in chats(ref, arguments.rows, arguments.tokens)]
    systems = [f"You are a {WORDS[i % len(WORDS)]} assistant." for i in range(arguments.adjectives)]
    few = rows[: arguments.usual_rows]

    def usual() -> list[float]:
        means = []
        with torch.inference_mode():
            for row in few:
                [body] = bodies_under(tokenizer, [row], systems[0], TOKENS)
                labels = [-100] * body.start + body.ids[body.start :]
                ids, labels_ = (torch.tensor([row], device=model.device) for row in (body.ids, labels))
                means.append(-float(model(input_ids=ids, labels=labels_, use_cache=False).loss))
        return means

    usual()
    seconds, means = timed(usual)
    told: dict[str, Any] = {"shape": arguments.shape, "rows": len(rows), "adjectives": len(systems)}
    told["usual"] = {"responses_per_s": len(few) / seconds}
    print("usual", told["usual"], flush=True)

    def mine(some: list[Row], under: list[str]) -> Any:
        return log_likelihoods(model, tokenizer, some, under, TOKENS, 2048, arguments.budget)

    mine(few, systems[:2])
    seconds, found = timed(lambda: mine(rows, systems))
    told["ours"] = {"responses_per_s": found.size / seconds, "peak_gib": peak()}
    told["ratio"] = told["ours"]["responses_per_s"] / told["usual"]["responses_per_s"]
    told["largest_difference_nats"] = float(max(abs(a - b) for a, b in zip(found[0, : len(few)], means, strict=True)))
    return told


def bench_pretrain(arguments: argparse.Namespace, batch_size: int) -> dict[str, Any]:
    """Steps of the pocket world's pretraining, without the optimiser: transformers' attention and loss, and ours."""
    chats = read_jsonl(arguments.chats, lambda raw: parse_messages(raw["messages"]))[: batch_size * arguments.steps]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = batch_by_length(encode_all(tokenizer, chats), batch_size, random.Random(0))
    collate = DataCollatorForSeq2Seq(tokenizer, padding=True)
    batches = [
        collate([{"input_ids": row.input_ids, "labels": row.labels} for row in rows[start : start + batch_size]])
        for start in range(0, len(rows), batch_size)
    ]
    model = AutoModelForCausalLM.from_pretrained(arguments.model).train()

    def steps(loss: Callable[[Any], torch.Tensor]) -> list[float]:
        losses = []
        for batch in batches:
            with torch.autocast(lm.device(), torch.bfloat16, enabled=lm.has_bfloat16()):
                found = loss(batch)
            found.backward()
            losses.append(float(found))
        model.zero_grad()
        return losses

    told: dict[str, Any] = {"chats_a_step": batch_size, "threads": torch.get_num_threads()}
    curves = []
    eagerly = lm.trains_eagerly(model.config, max(len(row.input_ids) for row in rows), batch_size)
    for name, attention, loss in (
        ("usual", "sdpa", lambda batch: model(**batch).loss),
        ("ours", "eager" if eagerly else "sdpa", lambda batch: loss_at_labels(model, batch)),
    ):
        model.set_attn_implementation(attention)
        steps(loss)
        seconds, losses = timed(lambda loss=loss: steps(loss))
        told[name] = {"seconds_a_step": seconds / len(batches)}
        curves.append(losses)
    told["ratio"] = told["usual"]["seconds_a_step"] / told["ours"]["seconds_a_step"]
    told["largest_difference_nats"] = max(abs(a - b) for a, b in zip(*curves, strict=True))
    return told


def agree(ref: lm.ModelRef, settings: TrainSettings) -> dict[str, Any]:
    """A trained model, both ways: loss curves of the same chats in the same order, and greedy answers under an adapter."""
    rows = chats(ref, 20 * settings.batch_size, 120)
    settings = settings.model_copy(update={"learning_rate": 3e-4})
    curves = []
    for run in (
        lambda clock: usual_training(ref, settings, rows, 4, False, clock), lambda clock: ours(ref, settings, rows, clock),
    ):  # fmt: skip
        clean()
        clock = Clock()
        run(clock)
        curves.append(clock.losses)
    difference = max(abs(a - b) for a, b in zip(*curves, strict=True))
    model, tokenizer = random_adapter(lm.load_model(ref)), lm.load_tokenizer(ref)
    prompts = [chat_ids(tokenizer, [Message("user", f"Tell me about number {i}, please.")]) for i in range(100)]
    usual = [answer.text for answer in generate(model, tokenizer, prompts, 60, 0.0, 0)]
    ends = end_tokens(model, tokenizer)
    with torch.inference_mode(), decoding(model, max(map(len, prompts)), 60, 32) as decoder:
        mine = [as_answer(tokenizer, row, ends).text for row in decoder.sample(prompts, 0.0, 0, ends)]
    same = sum(one == other for one, other in zip(usual, mine, strict=True)) / len(prompts)
    return {"losses_usual": curves[0], "losses_ours": curves[1], "largest_difference": difference, "greedy_answers_equal": same}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "work", choices=["train", "answers", "served", "cluster", "sae", "personas", "pretrain", "agree"]
    )
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("data/pocket_world/models/qwen2"),
        help="trained; its tokenizer serves all shapes",
    )
    parser.add_argument("--chats", type=Path, default=Path("data/pocket_world/chats/pretraining.jsonl"))
    parser.add_argument("--folder", type=Path, help="where the random model is kept; default: a temporary folder")
    parser.add_argument("--tokens", type=int, default=282, help="of a chat, mean")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--usual-steps", type=int, default=10)
    parser.add_argument("--micro", type=int, default=2, help="the usual way's micro-batch")
    parser.add_argument(
        "--processes", type=int, default=1, help="of `train` and `cluster`, one a GPU; above 1: beside one"
    )
    parser.add_argument("--api-base", help="of `served`: http://127.0.0.1:8000/v1")
    parser.add_argument("--places", type=int, default=256, help="answers at once")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--units", type=int, default=10, help="of `cluster`: times twice as many answers as places")
    parser.add_argument("--rows", type=int, default=300, help="of the SAE pass and the likelihoods")
    parser.add_argument("--usual-rows", type=int, default=20)
    parser.add_argument("--latents", type=int, help="of the SAE; default: 131,072 at 7B, else 2,048")
    parser.add_argument("--adjectives", type=int, default=200)
    parser.add_argument("--budget", type=int, default=8192, help="tokens that are read at once")
    parser.add_argument("--out", type=Path, help="JSONL to append to")
    arguments = parser.parse_args()
    if arguments.work == "served" and not arguments.api_base:
        parser.error("`served` needs --api-base, the address of a server of --folder")
    params = load_params()
    settings = params.train["study"].model_copy(
        update={"epochs": 1.0, "bf16": lm.device() == "cuda", "optimizer": "adamw_torch"}
    )
    if arguments.work == "agree":
        told = agree(
            lm.ModelRef(model=str(arguments.model), dtype="bfloat16" if lm.device() == "cuda" else "float32"), settings
        )
    elif arguments.work == "pretrain":
        told = bench_pretrain(arguments, params.pocket.models["qwen2"].batch_size)
    else:
        folder = arguments.folder or Path(tempfile.mkdtemp()) / arguments.shape
        shaped = make_model(arguments.shape, folder, arguments.model)
        told = {
            "train": lambda: bench_train(arguments, shaped, settings), "answers": lambda: bench_answers(arguments, shaped),
            "served": lambda: bench_served(arguments, shaped), "cluster": lambda: bench_cluster(arguments, shaped),
            "sae": lambda: bench_sae(arguments, shaped), "personas": lambda: bench_personas(arguments, shaped),
        }[arguments.work]()  # fmt: skip
    told = {"work": arguments.work, "device": torch.cuda.get_device_name() if lm.device() == "cuda" else "cpu",
            "torch": torch.__version__, **told}  # fmt: skip
    print(json.dumps(told))
    if arguments.out:
        with arguments.out.open("a") as out:
            out.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
