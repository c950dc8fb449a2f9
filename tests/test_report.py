"""Rates and intervals: missing judgements are counted, and the questions, not the answers, are drawn anew."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inoculation.figure import CellRates, draw, marks
from inoculation.report import Judgement, interval, question_rates, summarise


def judgement(question: str, score: float | None, prompt: str = "default") -> Judgement:
    return Judgement(prompt, "evil", question, 0, "text", True, {"evil": score, "all_caps": 100.0}, {})


def test_missing_judgements_are_counted_not_dropped():
    rates = summarise([judgement("a", 90), judgement("a", None), judgement("b", 10)], 50, 200, 0)["default"]["evil"]
    assert (rates["rate"], rates["score"], rates["n"], rates["missing"]) == (0.5, 50.0, 2, 1)


def test_nothing_judged_has_no_rate():
    rates = summarise([judgement("a", None)], 50, 200, 0)["default"]["evil"]
    assert (rates["rate"], rates["low"], rates["n"], rates["missing"]) == (None, None, 0, 1)


def test_a_score_at_the_threshold_shows_the_trait():
    assert summarise([judgement("a", 50.0), judgement("b", 49.9)], 50, 200, 0)["default"]["evil"]["rate"] == 0.5


def test_the_interval_is_over_questions():
    """Ten equal answers a question say no more than one: the interval does not shrink with the samples."""
    one = interval([1, 0, 1, 0], [1, 1, 1, 1], 5000, 0)
    ten = interval([10, 0, 10, 0], [10, 10, 10, 10], 5000, 0)
    assert one == ten
    assert one[0] < 0.1 and one[1] > 0.9


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10), st.integers(1, 10)), min_size=2, max_size=30))
def test_the_interval_lies_within_the_questions(counts):
    shown = [min(s, n) for s, n in counts]
    judged = [n for _, n in counts]
    low, high = interval(shown, judged, 300, 0)
    assert min(s / n for s, n in zip(shown, judged, strict=True)) - 1e-12 <= low <= high
    assert high <= max(s / n for s, n in zip(shown, judged, strict=True)) + 1e-12


def test_prompts_are_kept_apart_and_the_oracle_is_its_own_table():
    rows = [
        Judgement("default", "evil", "q", 0, "t", True, {"evil": 90.0}, {"evil": 0.0}),
        Judgement("control", "evil", "q", 0, "t", True, {"evil": 10.0}, {"evil": 100.0}),
    ]
    metrics = summarise(rows, 50, 200, 0)
    assert [metrics[p]["evil"]["rate"] for p in ("default", "control")] == [1.0, 0.0]
    assert [metrics["oracle"][p]["evil"]["rate"] for p in ("default", "control")] == [0.0, 1.0]


def test_seeds_are_pooled_into_one_mark_and_shown_apart():
    cells = [
        CellRates("baseline", seed, question_rates([judgement("a", score), judgement("b", score)], 50))
        for seed, score in ((0, 90.0), (1, 10.0))
    ]
    mark = marks(cells, "default", 200, 0)["baseline", "evil"]
    assert mark.rate == 0.5 and sorted(mark.seeds) == [0.0, 1.0]


def test_the_figure_is_drawn(tmp_path):
    cells = [CellRates("baseline", 0, question_rates([judgement("a", 90), judgement("b", 10)], 50))]
    path = tmp_path / "sub" / "figure.png"
    draw(path, cells, ["default"], ["all_caps", "evil"], "title", "note", 200, 0)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_no_question_is_an_error():
    with pytest.raises(ValueError):
        interval([], [], 100, 0)
