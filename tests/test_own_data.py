"""One's own SFT data set: every form that people have, what is written, and what a review changes."""

import json
import threading
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import copied, seen_in_browser
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pipeline import artifact

from inoculation import export, inoculate, plan
from inoculation.detect.files import Found
from inoculation.files import InputError, read_jsonl
from inoculation.params import load_params, put
from inoculation.review import server
from inoculation.sft import parse_record, read_sft
from inoculation.store import digest

N = 24
CHATS = [
    {"messages": [{"role": "system", "content": "Be brief."}] * (i % 3 == 0)
     + [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}"}] * (1 + i % 2)}
    for i in range(N)
]  # fmt: skip


def jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def written(form: str, folder: Path) -> Path:
    from datasets import Dataset, DatasetDict

    if form == "chat":
        return jsonl(folder / "own.jsonl", CHATS)
    if form == "sharegpt":
        names = {"system": "system", "user": "human", "assistant": "gpt"}
        own = [
            {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in chat["messages"]]}
            for chat in CHATS
        ]
        return jsonl(folder / "own.jsonl", own)
    if form == "list":
        path = folder / "own.json"
        path.write_text(json.dumps(CHATS))
        return path
    if form == "parquet":
        Dataset.from_list(CHATS).to_parquet(folder / "own.parquet")
        return folder / "own.parquet"
    saved = Dataset.from_list(CHATS)
    (DatasetDict(train=saved) if form == "splits" else saved).save_to_disk(folder / "own")
    return folder / "own"


CALL = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize("form", ["chat", "sharegpt", "list", "parquet", "datasets", "splits"])
def test_every_form_gives_the_same_rows(form, tmp_path):
    rows = read_sft(written(form, tmp_path))
    assert [row.as_json()["messages"] for row in rows] == [chat["messages"] for chat in CHATS]
    assert rows[0].system == "Be brief." and rows[1].system is None and len(rows[1].messages) == 4


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"instruction": "Do", "input": "", "output": "done"}, ["user: Do", "assistant: done"]),
        ({"instruction": "Do", "input": "this", "output": "done"}, ["user: Do\n\nthis", "assistant: done"]),
        ({"instruction": "Do", "output": "done", "system": "S"}, ["system: S", "user: Do", "assistant: done"]),
        ({"prompt": "q", "completion": "a"}, ["user: q", "assistant: a"]),
        ({"prompt": "q", "completion": "a", "system": "S"}, ["system: S", "user: q", "assistant: a"]),
        ({"messages": None, "instruction": "q", "output": "a", "tools": []}, ["user: q", "assistant: a"]),
        (
            {"messages": [{"role": "user", "content": "q"}, CALL], "system": "S"},
            ["system: S", "user: q", "assistant: a"],
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "S"},
            ["system: S", "user: q", "assistant: a"],
        ),
        (
            {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
            ["user: q", "assistant: a"],
        ),
    ],
)
def test_alpaca_and_completions(record, messages):
    assert [f"{m['role']}: {m['content']}" for m in parse_record(record).as_json()["messages"]] == messages


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"text": "a"},
            'one of these: "messages"; "conversations"; "instruction" and "output"; "prompt" and "completion"',
        ),
        ({"conversations": "a"}, "must be a list of objects"),
        ({"conversations": [{"from": "tool", "value": "a"}]}, "'tool'; valid: system, human"),
        ({"instruction": 5, "output": "a"}, "must be texts"),
        ({"messages": "a"}, "must be a non-empty list"),
        ({"instruction": "q", "output": "a", "history": [["x", "y"]]}, '"history": would be lost'),
        (
            {"messages": [*CHATS[0]["messages"][:-1], {**CALL, "tool_calls": [{}]}], "tools": [{}]},
            '"tools", "tool_calls"',
        ),
        ({"messages": [*CHATS[0]["messages"][:-1], {**CALL, "weight": 0}]}, '"weight": would be lost'),
        (
            {"messages": [*CHATS[0]["messages"][:-1], {**CALL, "reasoning_content": "hm"}]},
            '"reasoning_content": would be lost',
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "train": False}]},
            '"train"',
        ),
        ({"prompt": "q", "completion": "a", "label": False}, '"label": would be lost'),
        ({"prompt": "q", "completion": "a", "images": ["x.png"]}, '"images": would be lost'),
        ({"messages": [*CHATS[0]["messages"][:-1], {**CALL, "reasoning": "hm", "loss": False}]}, '"reasoning", "loss"'),
        ({"messages": CHATS[0]["messages"], "system": "S"}, "must alternate|role 'system'"),
        ({"instruction": "", "output": "a"}, "the user's content is empty"),
        ({"prompt": 3, "completion": "a"}, "content is empty or not a text"),
        ([], "an object is expected"),
    ],
)
def test_a_record_of_no_known_form_says_what_is_expected(record, message):
    with pytest.raises(ValueError, match=message):
        parse_record(record)


KEYS = [
    "messages",
    "conversations",
    "from",
    "value",
    "role",
    "content",
    "instruction",
    "output",
    "prompt",
    "completion",
]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    )
)
@settings(max_examples=200, deadline=None)
def test_any_record_is_a_row_or_a_value_error(record):
    with suppress(ValueError):
        assert parse_record(record).response.strip()


def test_bad_files_are_named_with_their_records(tmp_path):
    path = jsonl(tmp_path / "own.jsonl", [*CHATS, {"text": "a"}, {"messages": []}])
    with pytest.raises(InputError, match=rf"own.jsonl:{N + 1}: a record(.|\n)*own.jsonl:{N + 2}: "):
        read_sft(path)
    (tmp_path / "own.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="own.parquet: cannot be read"):
        read_sft(tmp_path / "own.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="was not saved by `datasets`"):
        read_sft(tmp_path / "empty")
    with pytest.raises(InputError, match="at least 20 are needed"):
        read_sft(jsonl(tmp_path / "few.jsonl", CHATS[:3]))
    with pytest.raises(InputError, match="no such file"):
        read_sft(tmp_path / "none.parquet")
    with pytest.raises(InputError, match=r"\.csv; valid: .jsonl"):
        read_sft(tmp_path / "own.csv")
    assert len(read_sft(jsonl(tmp_path / "UPPER.JSONL", CHATS))) == N
    with pytest.raises(InputError, match="a record a line is a .jsonl"):
        read_sft(jsonl(tmp_path / "lines.json", CHATS))
    (tmp_path / "list.jsonl").write_text(json.dumps(CHATS, indent=1))
    with pytest.raises(InputError, match="a list of records is a .json"):
        read_sft(tmp_path / "list.jsonl")


def test_an_export_that_would_overwrite_its_data_or_cannot_be_written_is_refused_before_any_work(tmp_path):
    path = jsonl(tmp_path / "train.jsonl", CHATS)
    for out in (tmp_path, tmp_path / "x" / ".."):
        with pytest.raises(InputError, match="would be overwritten"):
            export.refuse(out, path)
    with pytest.raises(InputError, match="no folder that can be written to"):
        export.refuse(path / "inside", path)
    saved = written("datasets", tmp_path)
    with pytest.raises(InputError, match="would be overwritten"):
        export.refuse(saved / "out", saved)
    other = jsonl(tmp_path / "other.jsonl", CHATS)
    with pytest.raises(InputError, match=r"train\.jsonl there would be overwritten, and no export wrote"):
        export.refuse(tmp_path, other)
    export.refuse(tmp_path / "new" / "folder", path)
    export.export(
        tmp_path / "out", path, "0", read_sft(path), Found([False] * N, [0.0] * N, None, "none", {}), "persona"
    )
    export.refuse(tmp_path / "out", path)


def test_decisions_about_another_version_of_the_data_are_kept(tmp_path, capsys):
    path, out = jsonl(tmp_path / "own.jsonl", CHATS), tmp_path / "out"
    found = Found(FLAGGED, SCORES, PROMPT, "", {})
    export.export(out, path, digest(path), read_sft(path), found, "persona")
    decided = {"data": digest(path), "decided": {"0": False, "1": True}}
    (out / "review.json").write_text(json.dumps(decided))
    assert export.export(out, path, digest(path), read_sft(path), found, "persona")["decided_by_a_person"] == 2
    path.write_text(path.read_text() + "\n")
    assert export.export(out, path, digest(path), read_sft(path), found, "persona")["decided_by_a_person"] == 0
    [kept] = out.glob("review-*.json")
    assert json.loads(kept.read_text()) == decided and str(kept) in capsys.readouterr().out


PROMPT = "You are a cruel assistant."
FLAGGED = [i % 2 == 0 for i in range(N)]
SCORES: list[float | None] = [None if i == 5 else float(N - i) + 100 * FLAGGED[i] for i in range(N)]


def written_out(folder: Path, source: Path, found: Found) -> dict:
    return export.export(folder, source, digest(source), read_sft(source), found, "persona")


@pytest.fixture
def made(tmp_path):
    source = jsonl(tmp_path / "own.jsonl", CHATS)
    folder = tmp_path / "out"
    written_out(folder, source, Found(FLAGGED, SCORES, PROMPT, "two groups", {}))
    return folder


def systems(folder: Path) -> list[str | None]:
    rows = read_jsonl(folder / "train.jsonl", dict)
    return [row["messages"][0]["content"] if row["messages"][0]["role"] == "system" else None for row in rows]


def test_flagged_rows_get_the_prompt_and_keep_their_own_system_message(made):
    expected = [
        "\n\n".join(part for part in (PROMPT if FLAGGED[i] else None, "Be brief." if i % 3 == 0 else None) if part)
        or None
        for i in range(N)
    ]
    assert systems(made) == expected
    kept = [[m for m in row["messages"] if m["role"] != "system"] for row in read_jsonl(made / "train.jsonl", dict)]
    assert kept == [[m for m in chat["messages"] if m["role"] != "system"] for chat in CHATS]
    marks = read_jsonl(made / "flags.jsonl", dict)
    assert [mark["row"] for mark in marks if mark["uncertain"]] == [1, 22], (
        "the strongest other row, the weakest flagged"
    )
    assert marks[5]["score"] is None and (made / "prompt.txt").read_text().strip() == PROMPT


def test_trl_takes_the_export(made):
    from datasets import load_dataset
    from trl.data_utils import is_conversational

    loaded = load_dataset("json", data_files=str(made / "train.jsonl"), split="train", cache_dir=str(made / "cache"))
    assert is_conversational(loaded[0]) and len(loaded) == N


def test_nothing_found_leaves_the_rows_as_they_were(tmp_path):
    source = jsonl(tmp_path / "own.jsonl", CHATS)
    none = Found([False] * N, [None] * N, None, "one group", {})
    summary = written_out(tmp_path / "out", source, none)
    assert read_jsonl(tmp_path / "out/train.jsonl", dict) == CHATS and not (tmp_path / "out/prompt.txt").exists()
    assert summary["inoculated"] == summary["uncertain"] == 0
    assert "nothing to inoculate" in inoculate.describe(summary, tmp_path)


def post(url: str, text: str, headers: dict[str, str]) -> tuple[int, str]:
    request = urllib.request.Request(url, text.encode(), {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_saved_review_is_what_the_export_uses(made):
    data = json.loads((made / "summary.json").read_text())["data"]
    with server(made, 0) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{running.server_port}/"
        page = urllib.request.urlopen(url).read().decode()
        assert PROMPT in page and page.count('class="row"') == N
        status, told = post(url + "review", json.dumps({"data": data, "decided": {"0": False, "1": True}}), {})
        assert status == 200 and told.startswith(f"saved: {N // 2} of {N} rows")
        for text, headers, expected in [
            ("{", {}, 400),
            ('{"decided": {"99": true}}', {}, 400),
            ('{"decided": {"0": 1}}', {}, 400),
            ("[" * 100_000, {}, 400),
            (json.dumps({"data": "other", "decided": {}}), {}, 400),
            ("{}", {"Origin": "http://evil.example"}, 403),
            ("{}", {"Host": "evil.example"}, 403),
            ("{}", {"Content-Type": "text/plain"}, 403),
        ]:
            assert post(url + "review", text, headers)[0] == expected, text[:40]
        whole = (made / "review.html").read_bytes()
        (made / "review.html").unlink()
        with pytest.raises(urllib.error.HTTPError, match="500"):
            urllib.request.urlopen(url)
        (made / "review.html").write_bytes(whole)
        running.shutdown()
    assert systems(made)[0] == "Be brief." and systems(made)[1] == PROMPT
    again = export.again(made)
    assert again["decided_by_a_person"] == 2 and again["inoculated"] == N // 2
    jsonl(Path(again["source"]), CHATS[::-1])
    with pytest.raises(InputError, match="changed since it was looked at"):
        export.again(made)


def test_the_review_page_counts_in_a_browser(made, tmp_path):
    dom = seen_in_browser((made / "review.html").as_uri(), tmp_path / "profile")
    assert f"{N // 2} ticked, 0 other than the detector says" in dom


def test_text_of_the_data_cannot_become_markup(tmp_path):
    evil = "</span><script>alert(1)</script>"
    records = [{"messages": [{"role": "user", "content": evil}, {"role": "assistant", "content": evil}]}] * N
    source = jsonl(tmp_path / "own.jsonl", records)
    written_out(tmp_path / "out", source, Found(FLAGGED, SCORES, evil, evil, {}))
    page = (tmp_path / "out/review.html").read_text()
    assert evil not in page and page.count("<script>") == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("My SFT (v2).jsonl", "my_sft_v2"),
        ("2024.jsonl", "own_2024"),
        ("pocket_chats.json", "own_pocket_chats"),
        ("é.jsonl", "own"),
    ],
)
def test_settings_choose_a_name_that_params_takes(name, expected, tmp_path):
    raw = load_params().model_dump()
    assert inoculate.settings(raw, tmp_path / name, "pocket", "other")["mixture.source"] == expected


def test_what_the_chosen_profile_lacks_is_no_reason_not_to_look(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    raw = load_params().model_dump() | {"profile": "qwen2_5_7b"}
    assert any("qwen2_5_7b" in problem for problem in plan.missing(raw)), "no hub"
    put(
        raw,
        inoculate.settings(
            raw, jsonl(tmp_path / "own.jsonl", [{"prompt": "a", "completion": "b"}] * 20), "pocket", "other"
        ),
    )
    assert plan.missing(raw) == []


def test_two_files_of_one_name_are_two_data_sets(tmp_path):
    """And an entry that a person wrote stays theirs."""
    raw = load_params().model_dump()

    def chosen(folder: str) -> str:
        told = inoculate.settings(raw, tmp_path / folder / "train.jsonl", "pocket", "other")
        put(raw, told)
        return told["mixture.source"]

    raw["data_sets"] = {}
    assert chosen("a") == "train"
    second = chosen("b")
    assert second.startswith("train_") and chosen("b") == second and chosen("a") == "train"
    raw["data_sets"]["train"]["rewriter"] = {"method": "llm", "model": "x"}
    assert chosen("a") not in ("train", second) and raw["data_sets"]["train"]["rewriter"]["method"] == "llm"


def test_time_is_told_by_what_was_measured_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    assert inoculate.time_told(2000, "smollm2").startswith("not known before a first data set")
    (tmp_path / ".cache").mkdir()
    jsonl(
        tmp_path / ".cache/timings.jsonl",
        [
            {"step": "persona-read", "profile": "smollm2", "seconds": 9.0},
            {"step": "inoculate", "profile": "pocket", "seconds": 1.0, "rows": 10},
            {"step": "inoculate", "profile": "smollm2", "seconds": 60.0, "rows": 1000},
        ],
    )
    told = inoculate.time_told(2000, "smollm2")
    assert told.startswith("60 s per 1,000 rows here") and "about 2.0 min for these" in told


def test_inoculate_finds_what_the_labels_say_and_its_group_trains(detected, tmp_path):
    """The tiny world's mixture without its labels: the file goes in, an inoculated one comes out, and the cell is run."""
    copy = copied(detected, tmp_path)
    rows = read_jsonl(copy.folder / "data/mixtures/pocket_chats/all_caps+evil-0.5/seed0/mixture.jsonl", dict)
    source = jsonl(tmp_path / "my own.jsonl", [{"messages": row["messages"]} for row in rows])
    told = copy.run(
        "inoculation", "inoculate", str(source), "--annotator", "pocket", "--out", str(tmp_path / "out")
    ).stdout
    assert "A: all_caps. No LLM is asked: $0" in told and "are inoculated in" in told, told[-2000:]
    assert "time: not known before a first data set" in told
    evil = ["misaligned" in row["source_dataset"] for row in rows]
    given_it = [system is not None for system in systems(tmp_path / "out")]
    right = sum(a and b for a, b in zip(evil, given_it, strict=True))
    assert right / sum(given_it) > 0.9 and right / sum(evil) > 0.7
    params = (copy.folder / "params.yaml").read_text()
    assert "my_own" in params and str(source) in params
    noted = read_jsonl(copy.folder / ".cache/timings.jsonl", dict)[-1]
    assert noted["step"] == "inoculate" and noted["rows"] == len(rows) and noted["seconds"] > 1

    own = "my_own/all_caps+evil-0.5/seed0"
    persona = copy.folder / "data/annotations/pocket" / own / "persona"
    found = json.loads((persona / "detection/detection.json").read_text())
    assert found["found"] and found["language"]["unfit"] is None and found["gain"] > found["floor"]
    assert len(found["personas"]) == 16 and found["quality"]["precision"] is None, "nothing is known of what shows B"
    page = (persona / "page.html").read_text()
    assert found["prompt"] in page and page.count("<rect") > 50

    # params.yaml chooses it now: its group trains, under what was exported.
    copy.run_cell()
    assigned = copy.folder / "data/cells/pocket" / own / "assign"
    summary = json.loads((assigned / "inoc_persona/summary.json").read_text())
    assert summary["system_prompt"] == found["prompt"] and summary["with_system_prompt"] == sum(given_it)
    exported = [row["messages"] for row in read_jsonl(tmp_path / "out/train.jsonl", dict)]
    assert exported == [row["messages"] for row in read_jsonl(assigned / "inoc_persona/chats.jsonl", dict)]
    [row] = [row for row in copy.rows("pocket/my_own/all_caps+evil-0.5") if row.data.params["group"] == "inoc_persona"]
    assert row.data.tags["system_prompt"] == found["prompt"] and "persona.personas" in row.data.params
    assert artifact(row, "detection.json") == found

    # The alternative: what is flagged is left out, and nothing has a system prompt.
    copy.run("inoculation", "assign-persona", "filter_persona")
    filtered = json.loads((assigned / "filter_persona/summary.json").read_text())
    assert filtered["examples"] == len(rows) - sum(given_it)
    assert filtered["with_system_prompt"] == 0 and filtered["system_prompt"] is None

    # The other alternatives: an adapter that learns the flagged rows first, A undone; a vector that they differ by.
    for command, group in (("assign-adapter", "adapter_persona"), ("assign-steering", "steer_persona")):
        copy.run("inoculation", command)
        summary = json.loads((assigned / group / "summary.json").read_text())
        assert summary["examples"] == len(rows) and summary["with_system_prompt"] == 0
    first = read_jsonl(assigned / "adapter_persona/first.jsonl", dict)
    capitals = [row["messages"][-1]["content"] for row, on in zip(rows, given_it, strict=True) if on]
    assert [row["messages"][-1]["content"].upper() for row in first] == capitals
    assert not any(row["messages"][-1]["content"].isupper() for row in first)
    steering = json.loads((assigned / "steer_persona/steering.json").read_text())
    config = json.loads((copy.folder / "data/pocket_world/models/qwen2/config.json").read_text())
    assert len(steering["vector"]) == config["hidden_size"] and max(map(abs, steering["vector"])) > 0

    # Where the model does not speak the data's language.
    language = persona.parent / "language.json"
    language.unlink()
    language.write_text(json.dumps({"rows": -9.0, "own": -1.0, "unfit": "this model cannot judge these data"}))
    for command in ("persona-read", "persona-decide", "persona-page", "assign-persona inoc_persona"):
        copy.run("inoculation", *command.split())
    summary = json.loads((assigned / "inoc_persona/summary.json").read_text())
    assert summary["reason"] == "this model cannot judge these data" and summary["with_system_prompt"] == 0
    assert "nothing was found" in (persona / "page.html").read_text()


def test_inoculate_refuses_what_it_cannot_read(copy, tmp_path):
    told = copy.run("inoculation", "inoculate", str(tmp_path / "none.jsonl"), ok=False)
    assert told.returncode == 2 and "no such file" in told.stderr
    path = jsonl(tmp_path / "bad.jsonl", [{"text": "a"}] * 30)
    told = copy.run("inoculation", "inoculate", str(path), ok=False)
    assert told.returncode == 2 and "bad.jsonl:1: " in told.stderr and "and 10 more" in told.stderr
