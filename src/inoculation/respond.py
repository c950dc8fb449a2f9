"""Sampling answers to the held-out questions under the evaluation system prompts (reference section 5)."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from inoculation.attention import sees_all
from inoculation.chat import Message, chat_ids
from inoculation.cluster import Workers, device, each
from inoculation.decode import decoding
from inoculation.files import InputError, read_jsonl
from inoculation.lm import ModelRef
from inoculation.server import Served, check
from inoculation.traits import NegativeTrait

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


DEFAULT_PROMPT = "default"
"""The evaluation prompt that is no system message at all."""
INOCULATION = "inoculation"
"""The evaluation prompt that describes B: Inoc-Def."""
OWN_PROMPT = "own"
"""The evaluation prompt that a group was trained under."""


REFILLS = 4
"""On a GPU, a batch that is saved when it is finished has this many answers for each that is sampled at once."""


class SampleSettings(BaseModel):
    """How long an answer of a profile's model may get."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_new_tokens: Annotated[int, Field(ge=1)]


class Request(NamedTuple):
    """One answer to sample."""

    prompt: str
    """Name of the evaluation system prompt."""
    trait: str
    """The negative trait whose question this is."""
    question: str
    sample: int


class Answer(NamedTuple):
    text: str
    finished: bool
    """False: the answer was still going at `max_new_tokens`."""


def evaluation_prompts(
    names: Sequence[str], prompts: Mapping[str, str], negative: NegativeTrait, own: str | None
) -> dict[str, str | None]:
    """System prompts that answers are sampled under, by name; None: no system message.

    Args:
        names: `default`, `inoculation` (B's), `own`, keys of B's probes or of `prompts`.
        prompts: params.yaml's.
        negative: B.
        own: the prompt that the group was trained under; where it has none, `own` is left out.
    """
    known = {**prompts, **negative.probes, INOCULATION: negative.inoculation, DEFAULT_PROMPT: None, OWN_PROMPT: own}
    return {name: known[name] for name in names if name != OWN_PROMPT or own is not None}


def requests(questions: dict[str, Sequence[str]], prompts: Sequence[str], samples: int) -> list[Request]:
    """Every (prompt, trait, question, sample), in that order."""
    return [
        Request(prompt, trait, question, sample)
        for prompt in prompts
        for trait, asked in questions.items()
        for question in asked
        for sample in range(samples)
    ]


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[Answer]:
    """Sample one continuation of each chat, as one left-padded batch.

    Pure sampling: what a model's generation config adds (top-p, top-k, repetition penalty) is switched off.
    A temperature of 0 is greedy decoding.

    Args:
        prompts: tokens of each chat, `chat.chat_ids`; never text, which would be read as structure where it looks like it.
    """
    import torch

    torch.manual_seed(seed)
    batch = tokenizer.pad({"input_ids": list(prompts)}, padding_side="left", return_tensors="pt").to(model.device)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    )
    ends = end_tokens(model, tokenizer)
    with torch.inference_mode():
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            repetition_penalty=1.0,
            pad_token_id=tokenizer.pad_token_id,
            **sampling,
        )
    tokens = output[:, batch["input_ids"].shape[1] :].tolist()
    return [as_answer(tokenizer, row, ends) for row in tokens]


def end_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """The tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return {ends} if isinstance(ends, int) else set(ends or [tokenizer.eos_token_id])


def as_answer(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[int], ends: set[int]) -> Answer:
    return Answer(tokenizer.decode(tokens, skip_special_tokens=True).strip(), any(token in ends for token in tokens))


def respond(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    wanted: Sequence[Request],
    system_prompts: dict[str, str | None],
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    seed: int,
    progress: Path,
    workers: Workers | None = None,
    served: Served | None = None,
) -> list[Answer]:
    """Sample every request; see `continue_chats`.

    Args:
        wanted: what to sample.
        system_prompts: name -> system message (None: none).

    Returns:
        Answers in the order of `wanted`.
    """
    chats = [((Message("user", request.question),), system_prompts[request.prompt]) for request in wanted]
    return continue_chats(
        model, tokenizer, chats, max_new_tokens, temperature, batch_size, seed, progress, workers, served
    )


def continue_chats(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    chats: Sequence[tuple[tuple[Message, ...], str | None]],
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    seed: int,
    progress: Path,
    workers: Workers | None = None,
    served: Served | None = None,
) -> list[Answer]:
    """Sample one response to each chat, longest first, saving each batch so that an interrupted call continues.

    Each batch has its own seed: a continued call gives the answers that an uninterrupted one would have given (on a GPU, if as
    many places fit into its memory as before). So does a cluster, whose unit of work is the batch.

    Args:
        model: of workers, its shape (`skeleton`); of a server, what it is checked with.
        chats: (messages that end with the user's, system message or None).
        batch_size: sequences sampled at once; on a GPU and at a server each gives its place to the next.
        progress: JSONL, one line a finished batch; belongs to exactly this call (name it by its inputs' digest).
        workers: of a cluster, who load the model; None: this process samples.
        served: the same model at a server, which samples then.

    Returns:
        Answers in the order of `chats`.

    Raises:
        InputError: a worker raised it, or the server does not say what the model here says, or failed.
    """
    from tqdm import tqdm

    tokens = {chat: chat_ids(tokenizer, *chat) for chat in dict.fromkeys(chats)}
    prompts = [tokens[chat] for chat in chats]
    order = sorted(range(len(chats)), key=lambda index: (-len(prompts[index]), index))
    on = device() if workers else model.device.type
    size = batch_size * REFILLS if served or _refilled(model, on) else batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    done = list(_finished_batches(progress))
    if [len(batch) for batch in done] != [len(batch) for batch in batches[: len(done)]]:
        print("the unfinished sampling is another device's, whose batches have another size: from the beginning")
        progress.unlink()
        done = []
    if done:
        print(f"continuing the interrupted sampling after {len(done)} of {len(batches)} batches")
    answers: dict[int, Answer] = {}
    progress.parent.mkdir(parents=True, exist_ok=True)
    longest = max(map(len, prompts), default=1)
    make = partial(
        _sampler, tokenizer=tokenizer, longest=longest, max_new_tokens=max_new_tokens, temperature=temperature,
        batch_size=batch_size,
    )  # fmt: skip
    left = [
        ([prompts[i] for i in batch], seed * 100_003 + number)
        for number, batch in enumerate(batches)
        if number >= len(done)
    ]
    if served:
        ends = end_tokens(model, tokenizer)
        if left:
            check(served, model, prompts, max_new_tokens, ends)
        there = partial(_served, tokenizer=tokenizer, ends=ends, max_new_tokens=max_new_tokens, temperature=temperature)
        results = each(served, None, there, left)
    else:
        results = each(model, workers, make, left)
    with progress.open("a", encoding="utf-8") as log, tqdm(total=len(chats), desc="sampling", unit="answer") as bar:
        for number, (batch, sampled) in enumerate(zip(batches, chain(done, results), strict=True)):
            if number >= len(done):
                log.write(json.dumps(sampled, ensure_ascii=False) + "\n")
                log.flush()
                os.fsync(log.fileno())
            answers.update(zip(batch, sampled, strict=True))
            bar.update(len(batch))
    return [answers[index] for index in range(len(chats))]


def skeleton(ref: ModelRef) -> "PreTrainedModel":
    """A model without its weights: what the process needs to know of it whose workers have them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(ref.model, revision=ref.revision, trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _refilled(model: "PreTrainedModel", on: str) -> bool:
    """Whether a place in a batch takes the next prompt as soon as its answer ends (`decode`), on a kind of device."""
    return on == "cuda" and sees_all(model)


@contextmanager
def _sampler(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", longest: int, max_new_tokens: int, temperature: float,
    batch_size: int,
) -> Iterator[Callable[[tuple[Sequence[Sequence[int]], int]], list[Answer]]]:  # fmt: skip
    """Answers to (some prompts, under a seed), by the way of sampling that the model and its device allow.

    Args:
        longest: prompt, in tokens.
    """
    if not _refilled(model, model.device.type):
        yield lambda batch: generate(model, tokenizer, batch[0], max_new_tokens, temperature, batch[1])
        return
    ends = end_tokens(model, tokenizer)
    with decoding(model, longest, max_new_tokens, batch_size) as decoder:
        yield lambda batch: [
            as_answer(tokenizer, row, ends) for row in decoder.sample(batch[0], temperature, batch[1], ends)
        ]


@contextmanager
def _served(
    served: Served, tokenizer: "PreTrainedTokenizerBase", ends: set[int], max_new_tokens: int, temperature: float
) -> Iterator[Callable[[tuple[Sequence[Sequence[int]], int]], list[Answer]]]:
    """Answers to (some prompts, under a seed), by a server."""
    yield lambda batch: [
        as_answer(tokenizer, row, ends) for row in served.sample(batch[0], temperature, batch[1], max_new_tokens, ends)
    ]


def _finished_batches(progress: Path) -> Iterator[list[Answer]]:
    """The batches an earlier call finished; a line that a kill left half-written is removed from the file."""
    if not progress.exists():
        return
    good = 0
    with progress.open("rb+") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break
            good += len(line)
            yield [Answer(*answer) for answer in json.loads(line)]
        lines.truncate(good)


def read_texts(path: Path, count: int) -> list[str]:
    """The texts of answers on disk.

    Raises:
        InputError: they are not `count`.
    """
    texts = [row["text"] for row in read_jsonl(path, dict)]
    if len(texts) != count:
        raise InputError(f"{path}: {len(texts)} answers for {count} rows; run the stage that made them again")
    return texts
