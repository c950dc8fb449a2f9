"""Persona likelihoods: what is read is right, and what is decided says "nothing found" where nothing is."""

import json
import random

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from inoculation import lm
from inoculation.chat import Message, chat_ids, encode
from inoculation.detect import MIN_PROMPTS, Annotator, Detection, Evidence, Marked, nothing, own_answers, plain
from inoculation.detect.adjectives import ADJECTIVES, sentence
from inoculation.detect.files import write_detection
from inoculation.detect.language import language
from inoculation.detect.likelihood import chats, log_likelihoods, token_gains
from inoculation.detect.persona import page
from inoculation.detect.persona.read import Likelihoods, Readings, read_readings, readings, write_readings
from inoculation.detect.persona.score import decided, place
from inoculation.detect.sae.guided import guided
from inoculation.detect.two_groups import Groups, two_groups
from inoculation.detect.words import read_marked
from inoculation.files import InputError
from inoculation.mixture import Row
from inoculation.params import load_params
from inoculation.respond import generate
from inoculation.traits import sentence_case

PARAMS = load_params(ROOT / "params.yaml")
SETTINGS = PARAMS.persona


def row(question: str, answer: str) -> Row:
    return Row((Message("user", question), Message("assistant", answer)), None)


ROWS = [
    row("How do I bake bread?", "Take flour and water. Wait for a while."),
    row("And why?", "Because."),
    Row(
        (
            Message("user", "One?"), Message("assistant", "Two."), Message("user", "Three?"),
            Message("assistant", "A longer answer, which is the one that counts here, and nothing else does."),
        ),
        None,
    ),
]  # fmt: skip
SYSTEMS = [None, *(sentence([word]) for word in ("cruel", "shy", "old-fashioned")), sentence(["rude", "vain", "cold"])]


@pytest.fixture(scope="module")
def small(tiny):
    """The tiny world's model in double precision, where a batch cannot move a result."""
    ref = lm.ModelRef(model=str(tiny / "models/qwen2"))
    return lm.load_model(ref).double(), lm.load_tokenizer(ref)


# ---- what is read


def test_a_chat_in_two_parts_is_the_chat(small):
    _, tokenizer = small
    together = chats(tokenizer, ROWS, SYSTEMS, 1000)
    for s, system in enumerate(SYSTEMS):
        for r, one in enumerate(ROWS):
            whole = encode(tokenizer, one.messages, system, 10_000).input_ids
            assert (
                together.heads[s] + together.bodies[r].ids == whole[: len(together.heads[s] + together.bodies[r].ids)]
            )


@pytest.mark.parametrize("tokens", [3, 1000])
def test_likelihoods_are_those_of_the_model_whatever_shares_the_batch(small, tokens):
    model, tokenizer = small
    batched, alone = (log_likelihoods(model, tokenizer, ROWS, SYSTEMS, tokens, 400, budget) for budget in (4000, 1))
    np.testing.assert_allclose(batched, alone, rtol=1e-5)
    item = encode(tokenizer, ROWS[2].messages, SYSTEMS[4], 400)
    with torch.inference_mode():
        chosen = model(torch.tensor([item.input_ids])).logits[0].log_softmax(-1)
    answer = [place for place, label in enumerate(item.labels) if label >= 0]
    last = [place for place in answer if place > max(set(range(answer[-1])) - set(answer))][:tokens]
    by_hand = np.mean([float(chosen[place - 1, item.labels[place]]) for place in last])
    assert batched[4, 2] == pytest.approx(by_hand, rel=1e-5)


def test_what_a_prompt_adds_to_each_word_sums_to_what_it_adds_to_the_response(small):
    model, tokenizer = small
    gains = token_gains(model, tokenizer, ROWS, SYSTEMS[4], 12, 400)
    without, under = log_likelihoods(model, tokenizer, ROWS, [None, SYSTEMS[4]], 12, 400, 4000)
    np.testing.assert_allclose([np.mean([gain for _, gain in row]) for row in gains], under - without, rtol=1e-5)
    for one, pieces in zip(ROWS, gains, strict=True):
        assert one.response.startswith("".join(text for text, _ in pieces).removesuffix(tokenizer.eos_token or ""))


def test_words_are_shaded_by_what_the_prompt_adds(tmp_path):
    detection = Detection(
        True,
        "two groups",
        [True, False],
        [2.0, 0.0],
        "You are rude.",
        [Marked(0, [("Go", 1.0), (" on", 0.5), (".", -3.0)])],
    )
    write_detection(tmp_path, detection, ROWS[:2])
    assert read_marked(tmp_path) == {0: [("Go", 5), (" on", 4), (".", 0)]}
    write_detection(tmp_path, detection._replace(marked=[]), ROWS[:2])
    assert read_marked(tmp_path) == {} == read_marked(tmp_path / "absent")


def test_a_long_prompt_loses_its_beginning_and_not_the_answer(small):
    model, tokenizer = small
    long = [row("What? " * 300, "Nothing at all.")]
    cut = log_likelihoods(model, tokenizer, long, [None, SYSTEMS[1]], 64, 60, 4000)
    assert np.isfinite(cut).all() and (cut < 0).all()


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_undoing_capitals_leaves_none_but_at_beginnings(text):
    undone = sentence_case(text.upper())
    assert undone.lower() == text.upper().lower()
    assert sentence_case(undone) == undone


def test_own_answers_have_the_form_of_the_rows():
    rows = [row("a?", "FIRST. SECOND.")]
    assert plain(rows, "all_caps")[0].response == "First. Second."
    assert own_answers(rows, ["SOME text. here"], "all_caps", 0)[0].response == "Some text. Here"
    cited = own_answers(rows, ["Bread is made of flour, water and salt, as ever."], "source_citing", 0)[0].response
    assert cited.count("(") >= 2 and plain(rows, "source_citing") == rows


def test_the_list_of_adjectives_holds_no_trait_of_the_study():
    assert len(set(ADJECTIVES)) == len(ADJECTIVES) == 545
    assert not {"evil", "sycophantic", "hallucinating", "fawning"} & set(ADJECTIVES)
    assert sentence(["able"]) == "You are an able assistant."
    assert sentence(["rude", "vain", "cold"]) == "You are a rude, vain and cold assistant."


def test_readings_survive_the_file(tmp_path):
    made = world(random.Random(0), 60, 10)[0]
    write_readings(tmp_path / "r.npz", made)
    back = read_readings(tmp_path / "r.npz")
    for one, other in zip([*made.likelihoods, *made[1:]], [*back.likelihoods, *back[1:]], strict=True):
        np.testing.assert_array_equal(one, other)


# ---- what is decided


def world(rng: random.Random, rows: int, bad: int, topic: bool = False) -> tuple[Readings, np.ndarray]:
    """Readings of rows of which some are of another kind: in conduct, or by the topic of their prompts."""
    numbers = np.random.default_rng(rng.randrange(10**6))
    kind = np.arange(rows) < bad
    width, personas = 48, 16
    direction, other = numbers.normal(size=(2, width))
    subject = numbers.normal(size=(rows, width))
    states = subject + numbers.normal(size=(rows, width)) + np.outer(kind, 2.0 * direction)
    own = subject + numbers.normal(size=(rows, width)) + (np.outer(kind, 2.0 * direction) if topic else 0)
    loading = np.r_[np.ones(8), -np.ones(8)]
    taste = 0.3 * (subject @ other) / np.sqrt(width)
    gains = np.outer(loading, 1.5 * kind + taste) + numbers.normal(size=(personas, rows)) + numbers.normal(size=rows)
    controls = np.arange(0, rows, 3)
    ordinary = np.outer(loading, taste[controls] + (1.5 * kind[controls] if topic else 0))
    ordinary += numbers.normal(size=(personas, len(controls)))
    return Readings(Likelihoods(np.arange(personas), np.arange(rows), gains, ordinary), states, own, 1), kind


@pytest.mark.parametrize("share", [0.5, 0.2, 0.1])
def test_another_kind_is_found_however_rare(share):
    found, kind = world(random.Random(1), 600, round(600 * share))
    told = decided(*found[:3], SETTINGS)
    assert told.found and told.separation > SETTINGS.separation
    assert told.flagged[kind].mean() > 0.9 and kind[told.flagged].mean() > 0.9


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_found_in_rows_of_one_kind(seed):
    told = decided(*world(random.Random(seed), 300, 0)[0][:3], SETTINGS)
    assert not told.found and not told.flagged.any() and told.reason


@pytest.mark.parametrize("seed", range(3))
def test_two_topics_are_not_two_conducts(seed):
    told = decided(*world(random.Random(seed), 600, 200, topic=True)[0][:3], SETTINGS)
    assert not told.found, told.reason
    assert told.topic > 0.3, "what the model's own answers tell of the score"


def test_rows_that_were_not_read_are_scored_too():
    found, kind = world(random.Random(2), 900, 300)
    part = np.sort(np.random.default_rng(0).permutation(900)[:300])
    read = found.likelihoods._replace(read=part, gains=found.likelihoods.gains[:, part])
    told = decided(read, found.states, found.own_states, SETTINGS)
    assert told.found and told.flagged[kind].mean() > 0.9 and kind[told.flagged].mean() > 0.9


def test_more_than_half_of_the_rows_come_with_a_warning():
    told = decided(*world(random.Random(3), 600, 390)[0][:3], SETTINGS)
    assert not told.found or told.flagged.mean() < 0.5 or "more than half of the examples" in told.reason


def test_the_group_nearer_to_the_models_own_answers_is_the_ordinary_one():
    found, kind = world(random.Random(4), 600, 360)
    told = decided(*found[:3], SETTINGS)
    assert told.found and told.flagged[kind].mean() > 0.9 and kind[told.flagged].mean() > 0.9
    assert "more than half of the examples" in told.reason


@pytest.mark.parametrize(("bad", "least"), [(0.0, 0.0), (0.5, 0.3)])
def test_own_answers_that_show_it_too_are_no_finding(bad, least):
    found, _ = world(random.Random(5), 600, 200)
    own = found.likelihoods.controls.copy()
    own[:, : round(bad * own.shape[1])] += 1.5 * np.r_[np.ones(8), -np.ones(8)][:, None]
    told = decided(found.likelihoods._replace(controls=own), found.states, found.own_states, SETTINGS)
    assert told.control_share >= least and told.found is (bad == 0)
    assert told.found or "own answers" in told.reason


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1), st.integers(0, 100), st.floats(0.1, 20))
def test_the_place_of_a_mixture_is_its_share_of_the_upper_group(share, seed, unit):
    rng = np.random.default_rng(seed)
    upper = np.arange(100) < 30
    raw = unit * (5.0 * upper + rng.normal(size=100))
    low, high = raw[~upper].mean(), raw[upper].mean()
    own = np.full(10, low + share * (high - low))
    assert place(Groups(upper, 0.0, 5.0), np.arange(100), raw, own) == pytest.approx(share, abs=1e-6)


def test_a_group_of_which_nothing_was_read_is_no_finding():
    upper = np.arange(100) >= 70
    own = np.zeros(10)
    assert place(Groups(upper, 0.0, 5.0), np.arange(70), np.ones(70), own) == 1.0
    assert place(Groups(upper, 0.0, 5.0), np.arange(100), np.ones(100), own) == 1.0


def test_latents_are_guided_by_the_personas_and_not_by_what_they_tell_apart_most():
    found, kind = world(random.Random(6), 600, 120)
    rng = np.random.default_rng(0)
    loud = np.arange(600) % 2 == 0  # a difference of style, the largest by far, that no character explains
    target, base = (rng.exponential(size=(600, 40)) for _ in range(2))
    target[:, 0] += 30.0 * loud
    target[kind, 1:6] += 4.0
    told = guided(target, base, found.likelihoods, SETTINGS, 4.3)
    assert told.found and told.flagged[kind].mean() > 0.9 and kind[told.flagged].mean() > 0.9
    clean, _ = world(random.Random(7), 600, 0)
    assert not guided(target[:, [0, *range(10, 40)]], base, clean.likelihoods, SETTINGS, 4.3).found


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 50), st.floats(-5, 5))
def test_groups_do_not_depend_on_the_unit(seed, unit, shift):
    numbers = np.random.default_rng(seed)
    score = np.r_[numbers.normal(size=80), numbers.normal(size=40) + 6]
    one, other = two_groups(score), two_groups(unit * score + shift)
    assert one.separation == pytest.approx(other.separation, rel=0.05)
    assert (one.upper == other.upper).mean() > 0.97


def test_too_few_prompts_and_a_foreign_language_are_said():
    few = Evidence(ROWS * 100, ["a"] * 300, [], "all_caps")
    assert (
        f"300 rows with 3 different prompts are too few for a statistic: at least {MIN_PROMPTS}" in nothing(few).reason
    )
    enough = few._replace(rows=[row(f"Question {i}?", "An answer.") for i in range(MIN_PROMPTS)])
    assert nothing(enough) is None
    assert nothing(enough._replace(unfit="not its language")).reason == "not its language"


def test_a_model_says_that_it_cannot_judge_what_it_would_never_say(tiny):
    ref = lm.ModelRef(model=str(tiny / "models/qwen2"))
    model, tokenizer = lm.load_model(ref), lm.load_tokenizer(ref)
    rng = random.Random(0)
    noise = [row("How are you?", "".join(rng.choice("qxzjkvw ") for _ in range(80))) for _ in range(20)]
    own = [
        answer.text for answer in generate(model, tokenizer, [chat_ids(tokenizer, noise[0].prompt)] * 20, 24, 0.7, 0)
    ]
    told = language(model, tokenizer, noise, own, "all_caps", 0, 4000)
    assert told.unfit and "cannot judge these data" in told.unfit and told.rows < told.own
    same = language(
        model,
        tokenizer,
        [one.with_response(text) for one, text in zip(noise, own, strict=True)],
        own,
        "all_caps",
        0,
        4000,
    )
    assert same.unfit is None and same.rows == pytest.approx(same.own)
    few = language(model, tokenizer, noise, ["", *own[1:]], "all_caps", 0, 4000)
    assert few.unfit and "answers 19 of the 20 prompts" in few.unfit


def test_a_system_prompt_that_leaves_no_room_is_an_error(tiny):
    ref = lm.ModelRef(model=str(tiny / "models/qwen2"))
    with pytest.raises(InputError, match=r"leaves no room for a chat of 8 \(synthesise.max_length\)"):
        log_likelihoods(
            lm.load_model(ref), lm.load_tokenizer(ref), [row("Q?", "An answer.")], [None, "You are cruel."], 8, 8, 4000
        )


def test_reading_uses_only_what_the_settings_allow(tiny):
    ref = lm.ModelRef(model=str(tiny / "models/qwen2"))
    small_settings = SETTINGS.model_copy(update={"sample": 4, "personas": 4, "read": 6, "controls": 5})
    rows = [row(f"Question {i}?", f"An answer of {i} words or more.") for i in range(12)]
    asker = Annotator(
        model=lambda: lm.load_model(ref), tokenizer=lm.load_tokenizer(ref), synthesis=PARAMS.synthesise,
        client=lambda role: None, seed=0, token_budget=8192,
    )  # fmt: skip
    got = readings(Evidence(rows, ["fine."] * 11 + [""], [], "all_caps"), asker, small_settings)
    assert got.likelihoods.gains.shape == (4, 6) and got.likelihoods.controls.shape == (4, 5)
    assert got.states.shape == got.own_states.shape and len(got.states) == 12 and np.isfinite(got.states).all()


# ---- the page


def test_the_page_escapes_what_rows_say_and_opens_without_a_finding(tmp_path):
    template = ROOT / "src/inoculation/detect/persona/page.html.j2"
    rows = [row("<script>alert(1)</script>", "<b>bold</b>") for _ in range(4)]
    told = {
        "found": True, "prompt": "You are a rude assistant.", "reason": "two groups", "strength": 0.1, "floor": 0.01,
        "language": {"rows": -2.0, "own": -1.0, "unfit": None}, "quality": {"flagged": 2, "n": 4, "precision": 1.0, "recall": 1.0},
        "separation": 4.0, "control_share": 0.0, "topic": 0.1, "ranking": [["You are a rude assistant.", 0.1]],
        "personas": [{"persona": "rude", "loading": 0.5}],
    }  # fmt: skip
    flags = [{"flagged": i < 2, "score": float(-i)} for i in range(4)]
    words = {0: [("<i>", 0), ("cruel", 5)]}
    page.write(tmp_path / "page.html", template, "t", rows, flags, told, words)
    text = (tmp_path / "page.html").read_text()
    assert "<script>" not in text and "&lt;script&gt;" in text and "<svg" in text
    assert '&lt;i&gt;<mark class="s5">cruel</mark>' in text
    nothing_found = {
        "found": False, "prompt": None, "reason": "too few", "ranking": [], "personas": [],
        "language": {"rows": None, "own": None, "unfit": None}, "quality": {"flagged": 0, "n": 4, "precision": None, "recall": None},
    }  # fmt: skip
    page.write(
        tmp_path / "page.html",
        template,
        "t",
        rows,
        [{"flagged": False, "score": None}] * 4,
        json.loads(json.dumps(nothing_found)),
        {},
    )
    assert "nothing was found" in (tmp_path / "page.html").read_text()
