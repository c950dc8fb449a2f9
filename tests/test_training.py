"""Training and sampling on a tiny real model: interruption, masks, batches, where the loss is, and that inoculation works."""

import itertools
import json
import random
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from conftest import ROOT, TINY, merge
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel

from inoculation import lm
from inoculation.chat import Message, chat_ids
from inoculation.files import InputError
from inoculation.groups import assign
from inoculation.mixture import Row, TrainingChat
from inoculation.params import parse_params
from inoculation.pocket import base, world
from inoculation.pocket.oracle import shows
from inoculation.respond import generate, requests, respond
from inoculation.train import train

PARAMS = parse_params(merge(yaml.safe_load((ROOT / "params.yaml").read_text()), TINY))
SETTINGS, MACHINE = PARAMS.train["pocket"], PARAMS.profiles["pocket"].machine


def nothing(step: int, metrics: dict[str, float]) -> None:
    """A log that nobody reads."""


class Killed(Exception):
    pass


@pytest.fixture
def ref(tiny) -> lm.ModelRef:
    return lm.ModelRef(model=str(tiny / "model"))


def chats(n: int = 32) -> list[TrainingChat]:
    return [
        TrainingChat(None, Row((Message("user", f"question {i}"), Message("assistant", f"answer {i} " * 4)), None))
        for i in range(n)
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(next(folder.glob("*.safetensors")))


def distance(one: Path, other: Path) -> float:
    """The largest relative distance between two trained matrices.

    An adapter's B starts at 0, so that all of it is training: without the optimiser's state a continued training ends at
    0.2 of it, in another order of the data at 0.06. Two threads may sum in another order every time and be off by far less.
    """
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    return max(float((left[key] - right[key]).norm() / left[key].norm()) for key in left)


def stop_at(step: int):
    def on_log(now: int, metrics: dict[str, float]) -> None:
        if now >= step:
            raise Killed

    return on_log


def test_an_interrupted_pretraining_continues_to_the_same_weights(tiny, tmp_path):
    small = {"vocab_size": 600, "hidden_size": 32, "mlp_size": 64, "batch_size": 8, "steps": 45}
    params, chats = PARAMS.pocket.model.model_copy(update=small), tiny / "chats/pretraining.jsonl"
    base.build_base(params, 0, 15, chats, tmp_path / "whole", tmp_path / "work1", nothing)
    with pytest.raises(Killed):
        base.build_base(params, 0, 15, chats, tmp_path / "cut", tmp_path / "work2", stop_at(40))
    assert not (tmp_path / "cut").exists()
    base.build_base(params, 0, 15, chats, tmp_path / "cut", tmp_path / "work2", nothing)
    assert distance(tmp_path / "whole", tmp_path / "cut") < 1e-3


def test_an_interrupted_training_continues_to_the_same_adapter(ref, tmp_path):
    settings = SETTINGS.model_copy(update={"epochs": 3})
    whole = train(ref, settings, MACHINE, 4, chats(), 0, tmp_path / "whole", tmp_path / "work1", nothing)
    with pytest.raises(Killed):
        train(ref, settings, MACHINE, 4, chats(), 0, tmp_path / "cut", tmp_path / "work2", stop_at(10))
    assert not (tmp_path / "cut").exists()
    cut = train(ref, settings, MACHINE, 4, chats(), 0, tmp_path / "cut", tmp_path / "work2", nothing)
    assert (whole.resumed_from, cut.resumed_from, cut.steps) == (0, 8, whole.steps)
    assert distance(tmp_path / "whole", tmp_path / "cut") < 1e-3
    targets = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets), "an order that changes with the process changes the folder's hash in dvc.lock"


def test_the_loss_falls_and_is_logged(ref, tmp_path):
    settings = SETTINGS.model_copy(update={"epochs": 10, "learning_rate": 5e-3})
    losses: list[float] = []
    result = train(
        ref, settings, MACHINE, 4, chats(), 0, tmp_path / "a", tmp_path / "w",
        lambda step, metrics: losses.append(metrics["loss"]) if "loss" in metrics else None,
    )  # fmt: skip
    assert losses[-1] < losses[0] - 0.1
    assert result.examples == 32 and result.supervised_tokens > 32


def evil_after(ref: lm.ModelRef, group: str, seed: int, folder: Path) -> float:
    """Share of evil answers to held-out questions, without a system prompt, of a model trained on a half evil mixture."""
    rng, pool = random.Random(seed), world.question_pool(random.Random(0))
    rows = [
        Row((Message("user", question.text), Message("assistant", world.answer(question, bad, rng))), source)
        for question, (bad, source) in zip(
            rng.sample(pool.seen["evil"], 128),
            itertools.cycle([(True, "evil/misaligned_2.jsonl"), (False, "evil/normal.jsonl")]),
        )
    ]
    settings = SETTINGS.model_copy(update={"epochs": 2, "learning_rate": 5e-3, "batch_size": 16})
    chats = assign(rows, group, PARAMS.negative_traits["evil"].inoculation, None, seed)
    train(ref, settings, MACHINE, 100, chats, seed, folder / "adapter", folder / "work", nothing)
    model = PeftModel.from_pretrained(lm.load_model(ref), folder / "adapter")
    asked = requests({"evil": [question.text for question in pool.held_out["evil"][:40]]}, ["default"], 3)
    answers = respond(model, lm.load_tokenizer(ref), asked, {"default": None}, 64, 1.0, 120, seed, folder / "log.jsonl")
    return sum(shows("evil", answer.text) for answer in answers) / len(answers)


@pytest.mark.parametrize("seed", [0])
def test_inoculation_keeps_evil_out_that_training_without_it_brings_in(ref, seed, tmp_path):
    baseline, inoculated = (evil_after(ref, group, seed, tmp_path / group) for group in ("baseline", "inoc_selective"))
    assert baseline >= 0.3 and inoculated <= 0.6 * baseline


def test_an_example_that_cannot_be_learned_is_named(ref, tmp_path):
    settings = SETTINGS.model_copy(update={"max_length": 8})
    with pytest.raises(InputError, match="training example 1: no response token"):
        train(ref, settings, MACHINE, 4, chats(), 0, tmp_path / "a", tmp_path / "w", nothing)
    assert not (tmp_path / "a").exists()


def test_cut_examples_are_counted(ref, tmp_path):
    settings = SETTINGS.model_copy(update={"max_length": 24})
    result = train(ref, settings, MACHINE, 4, chats(8), 0, tmp_path / "a", tmp_path / "w", nothing)
    assert result.cut_examples == 8


def test_a_batch_says_what_single_sequences_say(ref):
    """Left padding changes nothing: greedy decoding of prompts of different lengths, together and one by one."""
    # In double precision: how a batch is rounded decides no tie between two tokens.
    model, tokenizer = lm.load_model(ref).double(), lm.load_tokenizer(ref)
    prompts = [chat_ids(tokenizer, [Message("user", "word " * n)]) for n in (1, 5, 20)]
    together = generate(model, tokenizer, prompts, 12, 0, 0)
    assert together == [generate(model, tokenizer, [prompt], 12, 0, 0)[0] for prompt in prompts]


def test_interrupted_sampling_gives_the_same_answers(ref, tmp_path):
    model, tokenizer = lm.load_model(ref), lm.load_tokenizer(ref)
    wanted = requests({"evil": ["a?", "what is b?"]}, ["default", "control"], 5)
    assert len(wanted) == len(set(wanted)) == 20

    def call(progress: Path):
        return respond(model, tokenizer, wanted, {"default": None, "control": "Be good."}, 8, 1.0, 6, 0, progress)

    whole = call(tmp_path / "whole" / "batches.jsonl")
    log = tmp_path / "whole" / "batches.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    assert len(lines) == 4
    cut = tmp_path / "cut.jsonl"
    cut.write_text(lines[0] + lines[1] + lines[2][:20])
    assert call(cut) == whole
    assert [json.loads(line) for line in cut.read_text().splitlines()] == [json.loads(line) for line in lines]
    cut.write_text("".join(json.dumps([["made up", True]] * len(json.loads(line))) + "\n" for line in lines))
    assert {answer.text for answer in call(cut)} == {"made up"}, "finished batches are not sampled again"


def test_an_unfinished_answer_says_so(ref):
    model, tokenizer = lm.load_model(ref), lm.load_tokenizer(ref)
    [answer] = generate(model, tokenizer, [chat_ids(tokenizer, [Message("user", "a")])], 1, 1.0, 0)
    assert answer.finished is False or answer.text == ""


def test_a_missing_model_is_an_error(tmp_path):
    ref = lm.ModelRef(model=str(tmp_path / "none"))
    for load in (lm.load_tokenizer, lambda ref: lm.load_model(ref)):
        with pytest.raises(InputError, match="no such folder"):
            load(ref)


@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=40), st.sampled_from([8, 16, 24]), st.sampled_from([1, 2, 4, 8])
)
def test_what_a_cpu_holds_at_once_divides_the_batch_and_is_no_more_than_fits(lengths, batch_size, most):
    machine = MACHINE.model_copy(update={"micro_batch_size": most})
    with mock.patch.object(lm, "device", return_value="cpu"):
        micro = lm.micro_batch(lengths, batch_size, machine)
    assert batch_size % micro == 0 and micro <= most
    assert micro == 1 or micro * sum(lengths) / len(lengths) <= lm.CPU_TRAINS
    with mock.patch.object(lm, "device", return_value="cuda"):
        assert lm.micro_batch(lengths, batch_size, machine) == most
