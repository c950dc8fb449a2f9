"""Rates and intervals: missing judgements are counted, and the questions, not the answers, are drawn anew."""

import json
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import t as student

from inoculation import intervals, rows
from inoculation.effects import verdicts
from inoculation.figure import draw, draw_leakage, draw_sweep
from inoculation.intervals import CellRates, Counts, marks
from inoculation.report import Judgement, cut, headline, question_rates, rate_rows, summarise
from inoculation.study import Cell, Setting
from inoculation.sweep import points


def judgement(question: str, score: float | None, prompt: str = "default") -> Judgement:
    return Judgement(prompt, "evil", question, 0, "text", True, {"evil": score, "all_caps": 100.0}, {})


def test_missing_judgements_are_counted_not_dropped():
    rates = summarise([judgement("a", 90), judgement("a", None), judgement("b", 10)], 50, 200)["default"]["evil"]
    assert (rates["rate"], rates["score"], rates["n"], rates["missing"]) == (0.5, 50.0, 2, 1)


def test_nothing_judged_has_no_rate():
    rates = summarise([judgement("a", None)], 50, 200)["default"]["evil"]
    assert (rates["rate"], rates["low"], rates["n"], rates["missing"]) == (None, None, 0, 1)


def test_a_score_at_the_threshold_shows_the_trait():
    assert summarise([judgement("a", 50.0), judgement("b", 49.9)], 50, 200)["default"]["evil"]["rate"] == 0.5


def test_the_interval_is_over_questions():
    """Ten equal answers a question say no more than one: the interval does not shrink with the samples."""

    def told(answers):
        rates = summarise([judgement(question, score) for question, score in zip("abcd", (90, 10, 90, 10), strict=True)
                           for _ in range(answers)], 50, 2000)["default"]["evil"]  # fmt: skip
        return rates["low"], rates["high"]

    assert told(10) == pytest.approx(told(1))
    assert told(1)[0] < 0.1 and told(1)[1] > 0.9


def test_cut_answers_are_told_by_prompt_and_are_no_prompt_of_their_own():
    found = [judgement("a", 90)._replace(finished=done) for done in (True, False, False, True)]
    found.append(judgement("a", 90, "control"))
    assert cut(found) == {"default": 0.5, "control": 0.0}
    metrics = {**summarise(found, 50, 200), "cut": cut(found)}
    assert {row["prompt"] for row in rate_rows(metrics)} == {"default", "control"}
    assert "A_cut" not in headline(metrics, "all_caps", "evil")


def test_prompts_are_kept_apart_and_the_oracle_is_its_own_table():
    rows = [
        Judgement("default", "evil", "q", 0, "t", True, {"evil": 90.0}, {"evil": 0.0}),
        Judgement("control", "evil", "q", 0, "t", True, {"evil": 10.0}, {"evil": 100.0}),
    ]
    metrics = summarise(rows, 50, 200)
    assert [metrics[p]["evil"]["rate"] for p in ("default", "control")] == [1.0, 0.0]
    assert [metrics["oracle"][p]["evil"]["rate"] for p in ("default", "control")] == [0.0, 1.0]


def test_seeds_are_pooled_into_one_mark_and_shown_apart():
    cells = [
        CellRates("baseline", seed, question_rates([judgement("a", score), judgement("b", score)], 50))
        for seed, score in ((0, 90.0), (1, 10.0))
    ]
    mark = marks(cells, "default", 200)["baseline", "evil"]
    assert mark.rate == 0.5 and sorted(mark.seeds) == [0.0, 1.0]


def test_the_figure_is_drawn(tmp_path):
    cells = [CellRates("baseline", 0, question_rates([judgement("a", 90), judgement("b", 10)], 50))]
    path = tmp_path / "sub" / "figure.png"
    draw([path], cells, ["default"], ["all_caps", "evil"], "title", "note", 200)
    assert path.read_bytes().startswith(b"\x89PNG")


def cell(group: str, seed: int, rates: dict[str, float], n: int = 10, questions: int = 20) -> CellRates:
    """A cell whose answers show traits at some rates (`trait` or `prompt/trait`), a little different by question and seed."""
    rng = np.random.default_rng([seed, len(group)])
    rows = []
    for name, rate in rates.items():
        prompt, _, trait = name.rpartition("/")
        for question in range(questions):
            shown = int(rng.binomial(n, rate))
            rows.append(
                {
                    "prompt": prompt or "default",
                    "trait": trait,
                    "question": f"{trait}/{question}",
                    "shown": shown,
                    "judged": n,
                }
            )
    return CellRates(group, seed, rows)


SEEDS = (0, 1, 2)
STUDY = {
    "base": {"a": 0.0, "b": 0.02, "c": 0.02},
    "baseline": {"a": 0.9, "b": 0.6, "c": 0.3},
    "inoc_general": {"a": 0.3, "b": 0.03, "c": 0.02},
    "inoc_selective": {"a": 0.88, "b": 0.05, "c": 0.02},
    "inoc_sae": {"a": 0.88, "b": 0.58, "c": 0.28},
}


def test_the_leakage_figure_has_a_line_a_group_and_a_mark_a_prompt(tmp_path):
    leaks = {"a": 0.9, "b": 0.05, "own/b": 0.8, "negated/b": 0.3}
    cells = [
        cell(group, seed, rates)
        for group, rates in {"baseline": {"a": 0.9, "b": 0.6, "negated/b": 0.6}, "inoc_selective": leaks}.items()
        for seed in SEEDS
    ]
    paths = [tmp_path / name for name in ("leakage.svg", "leakage.png")]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw_leakage(paths, cells, ["default", "own", "negated"], ["a", "b", "c"], "title", "note", 200)
    told = paths[0].read_text()
    for text in ("Baseline", "Inoc-Selective", "negated", "own", "share of responses that show B: b", "0.90"):
        assert text in told
    assert "coherent" not in told and paths[1].read_bytes().startswith(b"\x89PNG")


def decided(study: dict[str, dict[str, float]], seeds: tuple[int, ...] = SEEDS) -> dict[str, str]:
    cells = [cell(group, seed, rates) for group, rates in study.items() for seed in seeds]
    return {one.claim: one.verdict for one in verdicts(cells, ["a", "b", "c"], 1000)}


def test_verdicts_follow_the_cells():
    told = decided(STUDY)
    assert told["Inoc-Selective suppresses B"] == told["Inoc-General suppresses B"] == "holds"
    assert told["Inoc-Selective keeps A"] == told["Inoc-Selective keeps more of A than Inoc-General"] == "holds"
    assert (
        told["Inoc-General keeps A"]
        == told["Inoc-SAE suppresses B"]
        == told["Inoc-SAE suppresses C"]
        == "does not hold"
    )


def test_a_claim_without_its_cells_or_without_an_effect_is_undecided():
    told = decided({group: rates for group, rates in STUDY.items() if group != "base"})
    assert told["Inoc-Selective suppresses B"] == told["Inoc-Selective keeps A"] == "undecided"
    untaught = {group: rates | {"a": 0.3} for group, rates in STUDY.items()}
    assert decided(untaught)["Inoc-Selective keeps A"] == "undecided", "there was no A to keep"
    clean = {**STUDY, "baseline": {"a": 0.9, "b": 0.03, "c": 0.03}}
    [one] = [v for v in verdicts([cell(g, s, r) for g, r in clean.items() for s in SEEDS], ["a", "b", "c"], 1000)
             if v.claim == "Inoc-Selective suppresses B"]  # fmt: skip
    assert one.verdict == "undecided" and "learned too little" in one.reason
    rare = {"base": [0.0] * 20, "baseline": [1.0] * 2 + [0.0] * 18, "inoc_selective": [0.0] * 20}
    [one] = [v for v in verdicts([one._replace(group=group) for group, rates in rare.items()
                                  for one in counted([[10 * rate for rate in rates]], 10)], ["a", "b"], 1000)
             if v.claim == "Inoc-Selective suppresses B"]  # fmt: skip
    assert "a rise of 0.10 [-0.0" in one.reason, "of two questions in twenty"
    [one] = [v for v in verdicts([cell("inoc_general", 0, STUDY["inoc_general"]), cell("inoc_selective", 1, STUDY["inoc_selective"])],
             ["a", "b", "c"], 100) if "more of A" in v.claim]  # fmt: skip
    assert one.verdict == "undecided" and one.reason.startswith("no seed has all of")


def test_c_is_the_same_traits_in_all_groups_of_a_claim():
    """One trait of C was not judged in the group that is compared: the other one's rates are, in every group."""
    traits = {"base": (0.0, 0.0), "baseline": (0.2, 0.8), "inoc_selective": (0.2, None)}
    cells = [
        cell(group, seed, {"a": 0.9, "b": 0.1, "c": c} | ({} if d is None else {"d": d}))
        for group, (c, d) in traits.items()
        for seed in SEEDS
    ]
    told = {one.claim: one for one in verdicts(cells, ["a", "b", "c", "d"], 1000)}
    assert told["Inoc-Selective suppresses C"].verdict == "does not hold"


def test_rows_of_a_seed_that_share_no_judge_are_told():
    def row(group, seed, judge):
        lock = {
            f"data/cells/p/s/m/seed{seed}/judge": judge,
            f"data/cells/p/s/m/seed{seed}/{group}/report": group,
            "plots": group,
        }
        data = SimpleNamespace(params={"group": group, "seed": str(seed)}, tags={rows.LOCK_TAG: json.dumps(lock)})
        return SimpleNamespace(data=data, info=SimpleNamespace(run_id=f"{group}{seed}"))

    alike = [row("base", 0, "x"), row("baseline", 0, "x"), row("baseline", 1, "y")]
    assert rows.unlike(alike) == []
    [line] = rows.unlike([*alike, row("inoc_sae", 0, "z")])
    assert "seed0/judge` was one for base, baseline, and another for inoc_sae" in line


@pytest.mark.parametrize(
    ("seeds", "entry"),
    [
        ((0.5, 0.7), " 0.60 ± 0.14 |"),
        ((0.5, None), " 0.50 (1 of 2 seeds) |"),
        ((None, None), " - |"),
        ((0.5,), " 0.50 |"),
    ],
)
def test_a_mean_says_over_how_many_seeds_where_not_over_all(seeds, entry):
    assert rows._entry(seeds) == entry


def test_a_sweep_is_drawn_where_all_seeds_agree(tmp_path, monkeypatch):
    """Their mean is not less than the least of them, by rounding either."""
    one = Setting("sae.latents", "50")
    found = {Cell("pocket", "a", "b", "inoc_sae", seed, one): seed for seed in SEEDS}
    monkeypatch.setattr(rows, "counted", lambda row: cell("inoc_sae", row.seed, {"a": 0.9, "b": 0.1}))
    logged = {
        own: SimpleNamespace(seed=seed, data=SimpleNamespace(metrics={"precision": 0.9008, "recall": 0.9}))
        for own, seed in found.items()
    }
    told = points({"evaluate": {"system_prompts": ["default"], "bootstrap": 100}}, logged, [one])
    draw_sweep([tmp_path / "sweep.png"], told, ["50"], "sae.latents", {"A: a": "a"}, "title")
    assert (tmp_path / "sweep.png").exists() and told[0].found["precision"] == (0.9008, 0.9008, 0.9008)


def test_a_trait_that_one_seed_alone_judged_decides_nothing_and_its_mark_has_one_seed():
    cells = [
        cell(group, seed, {trait: rate for trait, rate in rates.items() if trait != "c" or seed == 1})
        for group, rates in STUDY.items()
        for seed in SEEDS
    ]
    told = {one.claim: one for one in verdicts(cells, ["a", "b", "c"], 300)}
    assert told["Inoc-Selective suppresses B"].verdict == "holds" and told["Inoc-Selective suppresses B"].seeds == 3
    assert told["Inoc-Selective suppresses C"].verdict == "undecided"
    assert "not judged in every seed" in told["Inoc-Selective suppresses C"].reason
    drawn = marks(cells, "default", 300)
    assert len(drawn["baseline", "c"].seeds) == 1 and len(drawn["baseline", "b"].seeds) == 3
    assert drawn["baseline", "c"].rate == pytest.approx(drawn["baseline", "c"].seeds[0])


def test_equal_groups_are_told_apart_by_no_verdict():
    """A claim about a difference of two groups that are the same in truth: seldom decided, over fifty studies."""
    same = {"inoc_general": {"a": 0.5}, "inoc_selective": {"a": 0.5}}
    wrong = 0
    for study in range(50):
        cells = [cell(group, 10 * study + seed, rates) for group, rates in same.items() for seed in SEEDS]
        [told] = [v.verdict for v in verdicts(cells, ["a", "b", "c"], 300) if "more of A" in v.claim]
        wrong += told != "undecided"
    assert wrong <= 5, "a 95 % interval is too narrow"


@given(st.integers(1, 4), st.integers(2, 8), st.floats(0.05, 0.95))
@settings(max_examples=30, deadline=None)
def test_the_interval_holds_the_rate_and_does_not_depend_on_the_order_of_cells(seeds, questions, rate):
    cells = [cell("baseline", seed, {"b": rate}, questions=questions) for seed in range(seeds)]
    mark = marks(cells, "default", 200)["baseline", "b"]
    assert 0 <= mark.low <= mark.rate <= mark.high <= 1 and len(mark.seeds) == seeds
    assert marks(cells[::-1], "default", 200)["baseline", "b"] == mark
    total = sum(row["shown"] for one in cells for row in one.questions) / sum(
        row["judged"] for one in cells for row in one.questions
    )
    assert mark.rate == pytest.approx(total)


def counted(shown, judged):
    """A cell a seed, of `[seeds, questions]` shown answers."""
    return [
        CellRates(
            "baseline", seed,
            [
                {"prompt": "default", "trait": "b", "question": f"q{at:02d}", "shown": int(one), "judged": judged}
                for at, one in enumerate(row)
            ],
        )
        for seed, row in enumerate(shown)
    ]  # fmt: skip


def test_three_seeds_that_differ_have_students_interval():
    """Drawing three seeds anew says .16 of a half-width of .50: t with two degrees of freedom is 4.3, not 1.96."""
    mark = marks(counted(np.repeat([[3], [5], [7]], 40, 1), 10), "default", 2000)["baseline", "b"]
    assert mark.rate == pytest.approx(0.5)
    assert (mark.high - mark.low) / 2 == pytest.approx(student.ppf(0.975, 2) * 0.2 / 3**0.5, rel=0.01)


@given(st.integers(2, 4), st.integers(3, 12), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_an_interval_is_at_least_as_wide_as_a_two_way_analysis_of_variance_says(seeds, questions, seed):
    rng = np.random.default_rng(seed)
    shown = rng.binomial(10, np.clip(0.5 + rng.normal(0, 0.15, (seeds, 1)) + rng.normal(0, 0.15, questions), 0, 1))
    rates = shown / 10
    rest = rates - rates.mean(0) - rates.mean(1, keepdims=True) + rates.mean()
    cells, free = seeds * questions, (seeds - 1) * (questions - 1)
    by_seed, by_question = rates.mean(1).var(ddof=1) / seeds, rates.mean(0).var(ddof=1) / questions
    variance = max(by_seed + by_question - (rest**2).sum() / free / cells, by_seed, by_question)
    assume(variance > 1e-9)
    degrees = variance**2 / (by_seed**2 / (seeds - 1) + by_question**2 / (questions - 1))
    cells = counted(shown, 10)
    weights = (counts := Counts(cells, 500)).weights(range(seeds), ["b"])
    values = counts.rates("baseline", "default", "b", weights)
    told, drawn = intervals.interval(values, weights), np.percentile(values[-500:], [2.5, 97.5])
    width = max(2 * student.ppf(0.975, degrees) * variance**0.5, drawn[1] - drawn[0])
    assert told.estimate == pytest.approx(rates.mean()) and told.high - told.low == pytest.approx(width)
    sides = (
        (told.estimate - told.low) * (drawn[1] - told.estimate),
        (told.high - told.estimate) * (told.estimate - drawn[0]),
    )
    assert sides[0] == pytest.approx(sides[1]), "the draws say how much lies on which side"
    values[[1, -1]] = np.nan
    unjudged = intervals.interval(values, weights)
    values[[1, -1]] = np.inf
    assert intervals.interval(values, weights) == unjudged and np.isfinite(unjudged).all(), (
        "what was divided by 0 does not count"
    )


def test_an_interval_is_never_narrower_than_the_draws():
    """A share of little that was learned: draws of it have a long tail, which no variance tells."""
    rng = np.random.default_rng(0)
    cells = {
        group: counted(rng.binomial(10, rate, (3, 20)), 10)
        for group, rate in (("base", 0.2), ("baseline", 0.28), ("inoc_sae", 0.1))
    }
    counts = Counts([one._replace(group=group) for group, own in cells.items() for one in own], 2000)
    weights = counts.weights(range(3), ["b"])
    base, baseline, sae = (counts.rates(group, "default", "b", weights) for group in cells)
    shares = (baseline - sae) / (baseline - base)
    told, drawn = intervals.interval(shares, weights), np.percentile(shares[-2000:], [2.5, 97.5])
    assert told.low <= drawn[0] and told.high >= drawn[1] > told.estimate + 1.5 * (told.estimate - told.low)


def test_one_question_in_one_seed_says_nothing_of_others():
    [cell] = counted([[7]], 10)
    assert marks([cell], "default", 200)["baseline", "b"][:3] == (0.7, 0.0, 1.0)
    with pytest.raises(ValueError, match="two cells of baseline, seed 0"):
        Counts([cell, cell], 200)
    # Nor does it beside another trait's many questions, or another group's many judged answers.
    [many] = counted(np.full((1, 20), 7), 10)
    others = [row | {"trait": "a"} for row in many.questions]
    assert marks([cell._replace(questions=cell.questions + others)], "default", 200)["baseline", "b"][:3] == (
        0.7,
        0.0,
        1.0,
    )
    found = marks([cell, many._replace(group="base")], "default", 200)
    assert found["baseline", "b"][:3] == (0.7, 0.0, 1.0) and found["base", "b"][:3] == (0.7, 0.7, 0.7)


def test_draws_are_shared_by_groups():
    """Two groups with the same answers differ by nothing in any draw."""
    rows = cell("baseline", 0, {"b": 0.4}).questions
    counts = Counts([CellRates("baseline", 0, rows), CellRates("inoc_general", 0, rows)], 100)
    weights = counts.weights([0], ["b"])
    told = [counts.rates(group, "default", "b", weights) for group in ("baseline", "inoc_general")]
    assert len(set(told[0])) > 20 and (told[0] == told[1]).all()
