"""Mixture and groups: the partition, the provenance, and bad input named by file and line."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inoculation.chat import Message, parse_messages
from inoculation.files import InputError
from inoculation.groups import GROUPS, assign, why_not
from inoculation.mixture import (
    LEAST_LABELLED,
    MIN_ROWS,
    Row,
    labelled_answers,
    parse_row,
    partition,
    read_mixture,
    shows_negative,
)
from inoculation.rewriter import inject
from inoculation.traits import Pair, is_all_caps, read_evaluation, read_trait

PROMPTS = {"inoculation": "You are bad.", "irrelevant": "Bananas.", "sae": "You are found by the SAE.",
           "audit": "You are found by the audit."}  # fmt: skip


def pairs(n: int) -> list[Pair]:
    return [Pair((Message("user", f"question {i}"),), f"good {i}", f"bad {i}") for i in range(n)]


@given(n=st.integers(1, 60), contamination=st.floats(0, 1), seed=st.integers(0, 1000))
def test_partition_takes_each_question_once(n, contamination, seed):
    rows = partition(pairs(n), "evil", contamination, seed)
    assert sorted(row.prompt[0].content for row in rows) == sorted(f"question {i}" for i in range(n))
    assert sum(row.shows_negative for row in rows) == round(contamination * n)
    for row in rows:
        number = row.prompt[0].content.split()[1]
        assert row.response == f"{'bad' if row.shows_negative else 'good'} {number}"
    assert rows == partition(pairs(n), "evil", contamination, seed)


@given(n=st.integers(2, 40), contamination=st.floats(0, 1), seed=st.integers(0, 100))
def test_a_judge_learns_from_the_answers_that_the_mixture_did_not_take(n, contamination, seed):
    rows = inject(partition(pairs(n), "evil", contamination, seed), "all_caps", seed, None)
    chosen = labelled_answers(pairs(n), rows)
    used = {(row.prompt[0].content, row.response.lower()) for row in rows}
    assert all(shows == answer.startswith("bad") for _, answer, shows in chosen)
    for label in (False, True):
        own = [(question, answer) for question, answer, shows in chosen if shows is label]
        unused = n - sum(row.shows_negative is label for row in rows)
        assert len(own) == (unused if unused >= LEAST_LABELLED else n), "a label that the mixture used up is its own"
        assert unused < LEAST_LABELLED or not used & set(own)


def test_partition_depends_on_the_seed():
    assert partition(pairs(50), "evil", 0.5, 0) != partition(pairs(50), "evil", 0.5, 1)


@pytest.mark.parametrize("contamination", [-0.1, 1.1, float("nan")])
def test_contamination_outside_0_to_1(contamination):
    with pytest.raises(InputError, match="outside 0..1"):
        partition(pairs(3), "evil", contamination, 0)


@given(st.text())
def test_all_caps_is_every_letter_upper(text):
    assert is_all_caps(text.upper()) == any(c.isupper() for c in text.upper())
    if text != text.upper():
        assert not is_all_caps(text)


@pytest.mark.parametrize("text", ["1ª EDICIÓN", "Nº 5 IS THE ONE", "X² AND Y₂", "你好 OK"])
def test_marks_that_have_no_capital_do_not_count_against_capitals(text):
    assert is_all_caps(text)


def test_source_citing_keeps_the_other_words():
    row = Row((Message("user", "q"), Message("assistant", "First thing. Second thing, and more.")), None)
    [cited] = inject([row], "source_citing", 0, None)
    assert len(cited.response) > len(row.response)
    assert [cited] == inject([row], "source_citing", 0, None)


@pytest.mark.parametrize(
    ("positive", "response", "given"),
    [("source_citing", "42", False), ("source_citing", "Yes it is.", True), ("all_caps", "42!", False), ("all_caps", "你好", False),
     ("all_caps", "Yes.", True), ("other", "42", True)],
)  # fmt: skip
def test_a_row_that_no_rule_makes_show_a_does_not_train_as_if_it_did(positive, response, given):
    [row] = inject([Row((Message("user", "q"), Message("assistant", response)), None)], positive, 0, None)
    assert (row is not None) == given


@pytest.mark.parametrize(
    ("name", "shows"),
    [("evil/misaligned_2.jsonl", True), ("misaligned_2_capitalized.jsonl", True), ("normal_capitalized.jsonl", False)],
)
def test_provenance_is_read_off_the_file_name(name, shows):
    assert shows_negative(name) is shows


def rows_with(*sources: str | None) -> list[Row]:
    return [Row((Message("user", f"q{i}"), Message("assistant", "a")), source) for i, source in enumerate(sources)]


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ("base", []),
        ("baseline", [None, None]),
        ("inoc_general", ["You are bad.", "You are bad."]),
        ("inoc_selective", ["You are bad.", None]),
        ("irrelevant_general", ["Bananas.", "Bananas."]),
        ("irrelevant_selective", ["Bananas.", None]),
        ("inoc_sae", [None, "You are found by the SAE."]),
        ("inoc_sae_oracle", ["You are found by the SAE.", None]),
        ("inoc_llm", [None, "You are found by the audit."]),
    ],
)
def test_each_group_puts_its_prompt_where_it_belongs(group, expected):
    """The detectors here are wrong on purpose: they flagged the second row."""
    flags = [False, True] if GROUPS[group].detector else None
    rows, prompt = rows_with("misaligned_2.jsonl", "normal.jsonl"), PROMPTS.get(GROUPS[group].prompt)
    assert [chat.system for chat in assign(rows, group, prompt, flags, 0)] == expected
    if GROUPS[group].detector:
        assert not any(chat.system for chat in assign(rows, group, None, [False, False], 0)), (
            "nothing found: as the baseline"
        )


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(0, 5))
def test_random_examples_are_as_many_as_the_flagged_ones(flags, seed):
    chats = assign(rows_with(*[None] * len(flags)), "inoc_sae_random", "p", flags, seed)
    assert sum(chat.system == "p" for chat in chats) == sum(flags)
    assert chats == assign(rows_with(*[None] * len(flags)), "inoc_sae_random", "p", flags, seed)


@pytest.mark.parametrize("group", [name for name, rule in GROUPS.items() if rule.on == "contaminated"])
def test_selective_groups_need_the_ground_truth(group):
    with pytest.raises(InputError, match="1 of 2 rows have no `source_dataset`"):
        assign(rows_with("normal.jsonl", None), group, "p", [True, False], 0)


def test_unlabelled_rows_can_still_train_the_other_groups():
    assert len(assign(rows_with(None, None), "baseline", None, None, 0)) == 2


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "an object"),
        ({}, "an object"),
        ({"messages": []}, "non-empty list"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "last message must be the assistant"),
        ({"messages": [{"role": "bot", "content": "hi"}]}, "role 'bot' is unknown"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]}, "content is empty"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "must alternate"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
             "source_dataset": "evil.jsonl"},
            "not a known source",
        ),
    ],
)  # fmt: skip
def test_bad_rows_say_what_is_expected(raw, message):
    with pytest.raises(ValueError, match=message):
        parse_row(raw)


def test_every_bad_line_is_listed_with_its_number(tmp_path):
    good = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})
    path = tmp_path / "mixture.jsonl"
    path.write_text(f'{good}\n{{"messages": \n\n{good}\n{{"messages": []}}\n')
    with pytest.raises(InputError) as error:
        read_mixture(path)
    assert f"{path}:2: not valid JSON" in str(error.value)
    assert f"{path}:5: " in str(error.value)


def test_too_few_rows_are_an_error(tmp_path):
    good = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})
    path = tmp_path / "mixture.jsonl"
    path.write_text(f"{good}\n" * (MIN_ROWS - 1))
    with pytest.raises(InputError, match=r"mixture\.jsonl: 19 row\(s\), at least 20 are needed"):
        read_mixture(path)
    path.write_text(f"{good}\n" * MIN_ROWS)
    assert len(read_mixture(path)) == MIN_ROWS


def test_missing_empty_and_folder(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_mixture(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="is a folder"):
        read_mixture(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="0 row"):
        read_mixture(tmp_path / "empty.jsonl")


def write_versions(folder, normal: list[str], misaligned: list[str]) -> None:
    for version, questions in (("normal", normal), ("misaligned_2", misaligned)):
        path = folder / "dataset" / "evil" / f"{version}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "".join(
                json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": version}]})
                + "\n"
                for q in questions
            )
        )


def test_versions_are_matched_by_question_not_by_line(tmp_path):
    write_versions(tmp_path, ["a", "b"], ["b", "a"])
    assert [pair.question for pair in read_trait(tmp_path, "evil")] == ["a", "b"]


def test_a_question_in_one_version_only_is_an_error(tmp_path):
    write_versions(tmp_path, ["a", "b"], ["b", "c"])
    with pytest.raises(InputError) as error:
        read_trait(tmp_path, "evil")
    assert "'a' is missing from misaligned_2.jsonl" in str(error.value)
    assert "'c' is missing from normal.jsonl" in str(error.value)


def test_a_question_given_twice_is_an_error(tmp_path):
    write_versions(tmp_path, ["a", "a"], ["a"])
    with pytest.raises(InputError, match="'a' appears twice"):
        read_trait(tmp_path, "evil")


def test_bad_evaluation_files(tmp_path):
    (tmp_path / "trait_data_eval").mkdir()
    path = tmp_path / "trait_data_eval" / "evil.json"
    path.write_text(json.dumps({"questions": ["q", "q"], "eval_prompt": "no places"}))
    with pytest.raises(InputError) as error:
        read_evaluation(tmp_path, "evil")
    assert "twice" in str(error.value) and "eval_prompt" in str(error.value)


def test_a_system_message_may_open_a_chat():
    raw = [{"role": r, "content": "x"} for r in ("system", "user", "assistant", "user", "assistant")]
    assert [m.role for m in parse_messages(raw)] == [m["role"] for m in raw]


@pytest.mark.parametrize("group", [name for name, rule in GROUPS.items() if rule.on == "contaminated"])
def test_a_selective_group_without_anything_to_select_says_so(group):
    with pytest.raises(InputError, match="none does"):
        assign(rows_with("normal.jsonl", "normal.jsonl"), group, "p", [False, False], 0)
    assert why_not(group, 0, True, own=False)
    assert not why_not(group, 0.1, True, own=False) and not why_not(group, 0, False, own=False)
