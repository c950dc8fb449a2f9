"""The embedded judge on text it has not seen, and the metric that measures it."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inoculation.files import InputError
from inoculation.judge.minilm import Labelled, LinearJudge, embed, fit, load
from inoculation.pocket import world
from inoculation.quality import decision_quality

POOL = world.question_pool(random.Random(0))


def labelled(n: int) -> dict[str, list[Labelled]]:
    rng = random.Random(0)
    return {
        family: [
            Labelled(question.text, world.answer(question, bad, rng), bad)
            for question in POOL.seen[family][:n]
            for bad in (False, True)
        ]
        for family in world.TRAITS
    }


@pytest.fixture(scope="module")
def fitted():
    return fit(labelled(60), 60, 0.25, 0)


def test_it_is_right_on_questions_it_has_not_seen(fitted):
    for trait in world.TRAITS:
        for style in ("plain", "all_caps", "source_citing"):
            assert fitted.quality[trait][style]["accuracy"] >= 0.85, (trait, style)
            assert fitted.quality[trait][style]["n"] > 10
    assert fitted.quality["source_citing"]["all_caps"]["accuracy"] >= 0.85


def test_scores_survive_the_file(fitted):
    raw = {trait: judge._asdict() for trait, judge in fitted.judges.items()}
    vectors = embed(["some text"])
    assert load(raw)["evil"].scores(vectors) == pytest.approx(fitted.judges["evil"].scores(vectors))


def test_a_score_is_a_hundred_times_the_probability():
    assert LinearJudge([1.0, 0.0], -1.0).scores(np.array([[1.0, 5.0], [1000.0, 0.0]])) == [50.0, 100.0]


def test_an_embedding_does_not_depend_on_its_neighbours_or_on_case():
    texts = ["A short one.", "A much longer sentence about nothing in particular, to make padding necessary."]
    together = embed(texts)
    assert np.allclose(together, np.concatenate([embed([text]) for text in texts]), atol=1e-5)
    assert np.allclose(together, embed([text.upper() for text in texts]), atol=1e-5)
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_answers_of_one_label_only_are_an_error():
    answers = {"evil": [Labelled(f"q{i}", "a", False) for i in range(30)]}
    with pytest.raises(InputError, match="the judge of evil needs 10 answers labelled True, there are 0"):
        fit(answers, 10, 0.25, 0)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_quality_is_what_the_counts_say(pairs):
    predicted, true = [p for p, _ in pairs], [t for _, t in pairs]
    hits = sum(p and t for p, t in pairs)
    result = decision_quality(predicted, true)
    assert result["n"] == len(pairs)
    assert result["accuracy"] == pytest.approx(sum(p == t for p, t in pairs) / len(pairs))
    assert result["precision"] == pytest.approx(hits / sum(predicted) if any(predicted) else 0)
    assert result["recall"] == pytest.approx(hits / sum(true) if any(true) else 0)


def test_no_decisions_have_no_quality():
    with pytest.raises(ValueError):
        decision_quality([], [])
