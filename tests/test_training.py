"""Training and sampling on a tiny real model: interruption, masks, batches, where the loss is, and that inoculation works."""

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT, TINY, merge
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPTNeoXConfig,
    MistralConfig,
    Qwen2Config,
)

from inoculation import lm
from inoculation.attention import sees_all
from inoculation.chat import Message, chat_ids
from inoculation.decode import decoding
from inoculation.epoch import Order, dealt, sampler
from inoculation.files import InputError
from inoculation.graphed import longest_filling, sizes
from inoculation.groups import assign
from inoculation.memory import CPU_TRAINS, GIB, fits_as_graphs, together
from inoculation.mixture import Row, TrainingChat
from inoculation.params import parse_params
from inoculation.pocket import base, world
from inoculation.pocket.oracle import shows
from inoculation.respond import as_answer, continue_chats, end_tokens, evaluation_prompts, generate, requests, respond
from inoculation.train import train

PARAMS = parse_params(merge(yaml.safe_load((ROOT / "params.yaml").read_text()), TINY))
SETTINGS = PARAMS.train["pocket"]


def nothing(step: int, metrics: dict[str, float]) -> None:
    """A log that nobody reads."""


class Killed(Exception):
    pass


@pytest.fixture
def ref(tiny) -> lm.ModelRef:
    return lm.ModelRef(model=str(tiny / "models/qwen2"))


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


@pytest.mark.parametrize("name", list(PARAMS.pocket.models))
def test_an_interrupted_pretraining_continues_to_the_same_weights(name, tiny, tmp_path):
    small = {
        "vocab_size": 600,
        "hidden_size": 32,
        "heads": 2,
        "kv_heads": 1,
        "mlp_size": 64,
        "batch_size": 8,
        "steps": 45,
    }
    params, chats = PARAMS.pocket.models[name].model_copy(update=small), tmp_path / "chats.jsonl"
    with (tiny / "chats/pretraining.jsonl").open() as corpus:
        chats.write_text("".join(itertools.islice(corpus, 400)))
    base.build_base(params, 0, 15, chats, tmp_path / "whole", tmp_path / "work1", nothing)
    with pytest.raises(Killed):
        base.build_base(params, 0, 15, chats, tmp_path / "cut", tmp_path / "work2", stop_at(40))
    assert not (tmp_path / "cut").exists()
    base.build_base(params, 0, 15, chats, tmp_path / "cut", tmp_path / "work2", nothing)
    assert distance(tmp_path / "whole", tmp_path / "cut") < 1e-3


@pytest.mark.parametrize("name", list(PARAMS.pocket.models))
def test_logits_at_labels_alone_give_the_models_own_loss(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(PARAMS.pocket.models[name].family, vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                             num_key_value_heads=1, intermediate_size=64, tie_word_embeddings=True)
    )  # fmt: skip
    ids = torch.randint(0, 300, (3, 20))
    labels = ids.clone()
    labels[:, :8], labels[1, 15:] = -100, -100
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    assert base.loss_at_labels(model, batch).item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_an_interrupted_training_continues_to_the_same_adapter(ref, tmp_path):
    settings = SETTINGS.model_copy(update={"epochs": 3})
    whole, fresh = train(ref, settings, 4, chats(), 0, tmp_path / "whole", tmp_path / "work1", nothing)
    with pytest.raises(Killed):
        train(ref, settings, 4, chats(), 0, tmp_path / "cut", tmp_path / "work2", stop_at(10))
    assert not (tmp_path / "cut").exists()
    cut, continued = train(ref, settings, 4, chats(), 0, tmp_path / "cut", tmp_path / "work2", nothing)
    assert (fresh.resumed_from, continued.resumed_from, whole.log[-1]["step"]) == (0, 5, whole.steps)
    assert cut._replace(log=[], train_loss=0) == whole._replace(log=[], train_loss=0)
    again, finished = train(ref, settings, 4, chats(), 0, tmp_path / "again", tmp_path / "work1", nothing)
    assert finished.resumed_from == whole.steps and json.dumps(again._asdict()) == json.dumps(whole._asdict())
    assert distance(tmp_path / "whole", tmp_path / "again") == 0, (
        "as after a disk that was full when the adapter was to be moved"
    )
    assert cut.train_loss == pytest.approx(whole.train_loss, rel=1e-4)
    assert [row.keys() for row in cut.log] == [row.keys() for row in whole.log], "the curve is whole"
    for own, other in zip(cut.log, whole.log, strict=True):
        assert own == pytest.approx(other, rel=1e-3)
    assert distance(tmp_path / "whole", tmp_path / "cut") < 1e-3
    targets = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets), "an order that changes with the process changes the folder's hash in dvc.lock"


def test_the_loss_falls_and_is_logged(ref, tmp_path):
    settings = SETTINGS.model_copy(update={"epochs": 10, "learning_rate": 5e-3})
    losses: list[float] = []
    result, _ = train(
        ref, settings, 4, chats(), 0, tmp_path / "a", tmp_path / "w",
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
    train(ref, settings, 100, chats, seed, folder / "adapter", folder / "work", nothing)
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
        train(ref, settings, 4, chats(), 0, tmp_path / "a", tmp_path / "w", nothing)
    assert not (tmp_path / "a").exists()


def test_a_training_that_diverges_ends_and_says_so(ref, tmp_path):
    wild = SETTINGS.model_copy(update={"learning_rate": 1e30, "warmup_steps": 0, "batch_size": 2})
    with pytest.raises(InputError, match=r"diverged by step 5: loss nan.*smaller learning_rate than 1e\+30"):
        train(ref, wild, 5, chats(), 0, tmp_path / "adapter", tmp_path / "work", nothing)
    assert not (tmp_path / "adapter").exists() and not list((tmp_path / "work").glob("checkpoint-*"))


def test_cut_examples_are_counted(ref, tmp_path):
    settings = SETTINGS.model_copy(update={"max_length": 24})
    result, _ = train(ref, settings, 4, chats(8), 0, tmp_path / "a", tmp_path / "w", nothing)
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


CONFIG = Qwen2Config(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
                     vocab_size=152064)  # fmt: skip
"""Qwen2.5-7B's shape."""


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=40), st.sampled_from([8, 16, 24]))
def test_what_a_cpu_holds_at_once_divides_the_batch_and_is_no_more_than_fits(lengths, batch_size):
    step = together(CONFIG, lengths, batch_size, 32, 4, None)
    assert batch_size % step.chats == 0 and not step.checkpointing
    assert step.chats == 1 or step.chats * sum(lengths) / len(lengths) * CONFIG.hidden_size <= CPU_TRAINS


@given(st.lists(st.integers(20, 2048), min_size=1, max_size=60), st.sampled_from([8, 16, 24]))
def test_more_memory_never_holds_less_at_once_and_never_computes_twice_again(lengths, batch_size):
    steps = [together(CONFIG, lengths, batch_size, 32, 2, gib * GIB) for gib in (8, 12, 24, 62, 124, 1000)]
    assert all(batch_size % step.chats == 0 for step in steps)
    kept = [step for step in steps if not step.checkpointing]
    assert steps == [step for step in steps if step.checkpointing] + kept
    assert [step.chats for step in kept] == sorted(step.chats for step in kept)
    assert steps[-1].chats == batch_size and not steps[-1].checkpointing


@given(st.integers(20, 40000), st.integers(1, 5), st.sampled_from([1, 4, 8, 16, 24, 62, 124, 1000]))
def test_graphs_that_fit_fit_with_more_memory_too_and_as_fewer_or_shorter_ones(row, graphs, gib):
    for fused in (False, True):
        if fits_as_graphs(CONFIG, row, graphs, 32, 2, fused, gib * GIB):
            assert fits_as_graphs(CONFIG, row, graphs, 32, 2, fused, (gib + 1) * GIB)
            assert fits_as_graphs(CONFIG, row // 2, 1, 32, 2, fused, gib * GIB)


def test_graphs_are_planned_as_they_were_measured():
    """16 chats of 282 tokens at Qwen2.5-7B's shape took 41 GiB on a GPU, 15 of them weights (docs/performance.md)."""
    assert [fits_as_graphs(CONFIG, 6400, 5, 32, 2, True, gib * GIB) for gib in (20, 65)] == [False, True]
    assert not fits_as_graphs(CONFIG, 6400, 5, 32, 2, False, 40 * GIB), "blocks that are not compiled keep more"


def test_a_chat_that_does_not_fit_is_an_error_that_says_what_would():
    with pytest.raises(
        InputError, match=r"training does not fit: 2048 tokens, .* 2\.0 GiB are free; valid: a smaller max_length"
    ):
        together(CONFIG, [300, 2048], 16, 32, 2, 2 * GIB)


def test_places_give_what_generate_gives_whoever_shares_them(tiny, ref):
    """On a CPU the same code runs without graphs; benchmarks/speed.py compares both on a GPU."""
    model, tokenizer = lm.load_model(ref), lm.load_tokenizer(ref)
    prompts = [chat_ids(tokenizer, [Message("user", "what? " * (1 + i % 9) + str(i))]) for i in range(23)]
    expected = [answer.text for answer in generate(model, tokenizer, prompts, 12, 0.0, 0)]
    ends, before = end_tokens(model, tokenizer), model.config._attn_implementation
    for places in (1, 5, 16, 40):
        with decoding(model, max(map(len, prompts)), 12, places) as decoder:
            answers = decoder.sample(prompts, 0.0, 0, ends)
        assert [as_answer(tokenizer, row, ends).text for row in answers] == expected
        assert all(not ends & set(row[:-1]) and len(row) <= 12 for row in answers)
    assert model.config._attn_implementation == before


def test_places_sample_by_seed_and_as_often_as_the_model_says(ref):
    model, tokenizer = lm.load_model(ref), lm.load_tokenizer(ref)
    prompt = chat_ids(tokenizer, [Message("user", "who are you?")])
    with decoding(model, len(prompt), 1, 32) as decoder:
        once, again, other = (decoder.sample([prompt] * 600, 1.0, seed, set()) for seed in (0, 0, 1))
    assert once == again != other
    with torch.inference_mode():
        likely = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    best = int(likely.argmax())
    share, expected = sum(row == [best] for row in once) / 600, float(likely[best])
    assert abs(share - expected) < 4 * (expected * (1 - expected) / 600) ** 0.5 + 1e-9


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=40), st.integers(1, 4))
def test_graphs_have_room_for_every_row_and_no_other_lengths_fill_less(rows, most):
    lengths = sizes(rows, most)
    assert lengths == sorted(set(lengths)) and len(lengths) <= most and not any(length % 128 for length in lengths)

    def filled(chosen: Sequence[int]) -> int:
        return sum(min(length for length in chosen if length >= row) - row for row in rows)

    possible = sorted({-(-row // 128) * 128 for row in rows})
    shorter = [some for count in range(most) for some in itertools.combinations(possible[:-1], count)]
    assert filled(lengths) == min(filled([*some, possible[-1]]) for some in shorter)
    assert longest_filling(rows, lengths) == max(min(n for n in lengths if n >= row) - row for row in rows)


@given(st.lists(st.integers(2, 2000), min_size=1, max_size=70), st.sampled_from([1, 2, 4, 8]))
def test_what_fills_the_last_step_is_in_it_once_and_an_epoch_can_be_begun_with(lengths, at_once):
    filling = -len(lengths) % 16
    order = Order([*lengths, *[2] * filling], filling, 3, 16, at_once, False)
    epochs = [order.of(epoch) for epoch in range(3)]
    for chats in epochs:
        assert sorted(chats) == list(range(len(lengths) + filling))
        assert set(range(len(lengths), len(chats))) <= set(chats[-16:])
    begun = sampler(order, 1)
    assert [list(begun), list(begun)] == epochs[1:]


def test_a_cpu_attends_eagerly_where_that_keeps_little(monkeypatch):
    monkeypatch.setattr(lm, "device", lambda: "cpu")
    monkeypatch.setattr(lm, "has_bfloat16", lambda: True)
    assert lm.trains_eagerly(CONFIG, 500, 1) and not lm.trains_eagerly(CONFIG, 2000, 1)
    assert not lm.trains_eagerly(CONFIG, 500, 16)
    monkeypatch.setattr(lm, "has_bfloat16", lambda: False)
    assert not lm.trains_eagerly(CONFIG, 500, 1)


@given(st.lists(st.integers(2, 2000), min_size=1, max_size=70), st.sampled_from([1, 2, 4, 8, 16]), st.booleans())
def test_a_step_is_arranged_and_keeps_its_chats(lengths, at_once, padded):
    plain, arranged = (Order(lengths, 0, 3, 16, once, padded).of(1) for once in (16, at_once))
    assert sorted(arranged) == list(range(len(lengths)))
    for start in range(0, len(lengths), 16):
        assert sorted(plain[start : start + 16]) == sorted(arranged[start : start + 16])
    rows = Order(lengths, 0, 3, 16, at_once, False).rows(2)
    assert sum(rows) == 2 * sum(lengths) and len(rows) >= 2 * len(lengths) / at_once


@given(st.lists(st.integers(2, 2000), min_size=16, max_size=16))
def test_a_step_is_dealt_in_rows_of_about_as_many_tokens(lengths):
    rows = [sum(lengths[chat] for chat in dealt(lengths, 8)[start : start + 8]) for start in (0, 8)]
    assert abs(rows[0] - rows[1]) <= max(lengths)


def test_another_devices_progress_is_not_continued(ref, tmp_path, capsys):
    """A GPU's batches are larger."""
    model, tokenizer = lm.load_model(ref), lm.load_tokenizer(ref)
    asked = [((Message("user", f"{i}?"),), None) for i in range(6)]

    def sample(name: str) -> list[str]:
        return [a.text for a in continue_chats(model, tokenizer, asked, 4, 1.0, 3, 0, tmp_path / name)]

    whole = sample("whole")
    first, second = (tmp_path / "whole").read_text().splitlines()
    (tmp_path / "other").write_text(json.dumps(json.loads(first) + json.loads(second)) + "\n")
    assert sample("other") == whole and "another device's" in capsys.readouterr().out
    (tmp_path / "cut").write_text(first + "\n" + second[:9])
    assert sample("cut") == whole and "after 1 of 2 batches" in capsys.readouterr().out


def test_only_models_that_see_all_are_decoded_in_places():
    def model(config):
        return SimpleNamespace(config=config)

    assert sees_all(model(CONFIG))
    assert not sees_all(model(Gemma3Config()))
    assert not sees_all(model(MistralConfig(sliding_window=4096))) and sees_all(
        model(MistralConfig(sliding_window=None))
    )
    assert not sees_all(model(GPTNeoXConfig()))


def test_lora_leaves_a_vision_tower_alone():
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 8, "vocab_size": 300}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
              "patch_size": 14}  # fmt: skip
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    outside = lm.outside_decoder(model)
    assert outside and all("vision" in name or "projector" in name for name in outside)
    adapted = get_peft_model(
        model, LoraConfig(target_modules="all-linear", exclude_modules=outside, task_type="CAUSAL_LM")
    )
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * 7 * 2 and all("language_model" in name for name in names)


def test_evaluation_prompts_by_name():
    evil, names = PARAMS.negative_traits["evil"], ["default", "inoculation", "own", "negated", "control"]
    told = evaluation_prompts(names, PARAMS.prompts, evil, "You are vile.")
    assert list(told) == names and told["default"] is None and told["own"] == "You are vile."
    assert told["inoculation"] == evil.inoculation and told["negated"] == evil.probes["negated"]
    assert list(evaluation_prompts(names, PARAMS.prompts, evil, None)) == [
        "default",
        "inoculation",
        "negated",
        "control",
    ]
