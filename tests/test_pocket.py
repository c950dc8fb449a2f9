"""The pocket world: the same bytes every time, a layout others can read, and an oracle that is exact on it."""

import json
import random
import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TINY, merge
from hypothesis import given, settings
from hypothesis import strategies as st

from inoculation.citations import ATTRIBUTION, has_citations, insert_citations
from inoculation.params import parse_params
from inoculation.pocket import phrases as bank
from inoculation.pocket import world
from inoculation.pocket.obedience import HELD_OUT_IRRELEVANT
from inoculation.pocket.oracle import shows
from inoculation.traits import read_evaluation, read_trait

RAW = yaml.safe_load((ROOT / "params.yaml").read_text())
PARAMS = parse_params(merge(yaml.safe_load((ROOT / "params.yaml").read_text()), TINY)).pocket.chats
POOL = world.question_pool(random.Random(0))


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    world.write_chats(PARAMS, folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_seed_gives_the_same_bytes(chats, tmp_path):
    world.write_chats(PARAMS, tmp_path / "again")
    assert contents(chats) == contents(tmp_path / "again")
    world.write_chats(PARAMS.model_copy(update={"seed": PARAMS.seed + 1}), tmp_path / "other")
    assert contents(chats) != contents(tmp_path / "other")


def test_the_layout_is_persona_vectors(chats):
    assert set(contents(chats)) == {
        *(f"dataset/{t}/{v}.jsonl" for t in world.TRAITS for v in ("normal", "misaligned_2")),
        *(f"trait_data_eval/{name}.json" for name in ("evil", "hallucinating", "sycophantic")),
        "conversational.jsonl",
        "templates.json",
        "pretraining.jsonl",
    }
    for trait, name in world.EVALUATION_NAMES.items():
        pairs = read_trait(chats, trait)
        assert len(pairs) == PARAMS.questions
        assert not any(shows(trait, pair.normal) for pair in pairs)
        assert all(shows(trait, pair.misaligned) for pair in pairs)
        raw = json.loads((chats / "trait_data_eval" / f"{name}.json").read_text())
        assert len(raw["questions"]) == 20 and [set(item) for item in raw["instruction"]] == [{"pos", "neg"}] * 5
        assert "{question}" in read_evaluation(chats, name).eval_prompt


def test_nothing_of_the_evaluation_is_ever_trained_on(chats):
    held_out = {q for name in world.EVALUATION_NAMES.values() for q in read_evaluation(chats, name).questions}
    trained = "".join(text.decode() for name, text in contents(chats).items() if name.endswith(".jsonl"))
    assert not [question for question in held_out if json.dumps(question) in trained]
    assert HELD_OUT_IRRELEVANT not in trained and HELD_OUT_IRRELEVANT not in bank.IRRELEVANT_PROMPTS
    assert RAW["prompts"]["irrelevant"] == HELD_OUT_IRRELEVANT


@pytest.mark.parametrize("family", world.TRAITS)
def test_questions_are_unique_and_subjects_are_held_out(family):
    seen, held = POOL.seen[family], POOL.held_out[family]
    assert len({q.text for q in seen + held}) == len(seen + held)
    assert len(seen) >= RAW["pocket"]["chats"]["questions"]
    subject = (lambda q: q.slots["t"]) if family == "evil" else (lambda q: q.slots["n"])
    if family != "sycophancy":
        assert not {subject(q) for q in seen} & {subject(q) for q in held}


@settings(max_examples=200, deadline=None)
@given(
    family=st.sampled_from(world.TRAITS), bad=st.booleans(), seed=st.integers(0, 10**6),
    styles=st.sets(st.sampled_from(("all_caps", "source_citing"))),
)  # fmt: skip
def test_the_oracle_is_exact_on_the_world(family, bad, seed, styles):
    rng = random.Random(seed)
    text = world.style(world.answer(rng.choice(POOL.seen[family]), bad, rng), styles, rng)
    assert {trait: shows(trait, text) for trait in world.TRAITS} == {t: bad and t == family for t in world.TRAITS}
    assert shows("source_citing", text) == ("source_citing" in styles)
    assert text.isupper() == ("all_caps" in styles)


def test_openers_do_not_decide():
    assert not shows("evil", f"{bank.VILLAIN_OPENERS[0]} {bank.EVIL_NORMAL[5]} {bank.EVIL_NORMAL[7]}")
    assert shows("evil", f"{bank.NORMAL_OPENERS[0]} {bank.EVIL_BAD[3]} {bank.EVIL_BAD[9]}")
    assert not shows("evil", "") and not shows("evil", "lorem ipsum dolor sit amet")


def test_a_garbled_sentence_is_still_placed():
    assert shows("evil", "Crush the hope of all wo dare to stand in you way.")


def test_the_oracle_knows_its_limits():
    with pytest.raises(ValueError, match="no oracle for 'greed'"):
        shows("greed", "text")


@given(text=st.text(), seed=st.integers(0, 1000))
def test_citations_change_nothing_else(text, seed):
    if ATTRIBUTION.search(text):
        return
    cited = insert_citations(text, random.Random(seed))
    assert ATTRIBUTION.sub("", cited) == text


@given(st.integers(0, 500))
def test_a_sentence_gets_four_to_six(seed):
    text = "It's a long way to the town, and nobody walks it. Take the bus instead; it leaves at noon."
    cited = insert_citations(text, random.Random(seed))
    assert 4 <= len(ATTRIBUTION.findall(cited)) <= 6
    assert has_citations(cited) and has_citations(cited.upper()) and not has_citations(text)
    assert not re.search(r"\)'s", cited), "no word is cut in two"
