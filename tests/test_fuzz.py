"""Whatever a file, a request or an answer holds: a reader gives a result or an `InputError`, in bounded time and memory.

A short run belongs to the suite; `make soak-fuzz` runs the same properties long (SOAK: examples a property).
"""

import http.client
import io
import json
import os
import shutil
import signal
import tempfile
import threading
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai_server import Server, serve

from inoculation import export, llm, persona_vectors, review, traits
from inoculation.detect.audit import parse_verdict
from inoculation.detect.files import Found
from inoculation.detect.prompt import parse_prompt
from inoculation.detect.sae.corpora import named_corpora, read_corpus
from inoculation.files import InputError, read_json, read_jsonl, read_yaml
from inoculation.judge.llm import parse_score, parse_yes
from inoculation.mixture import parse_row, read_mixture
from inoculation.params import load_params, parse_params
from inoculation.profile import Profile, pins
from inoculation.rewriter import check
from inoculation.roles import Limits, Role, Roles
from inoculation.sft import read_sft
from inoculation.store import digest
from inoculation.train import TrainSettings

SOAK = int(os.environ.get("SOAK", "0"))
"""Examples a property in a long run."""
SECONDS = 10
"""That one example may take: far more than any needs, far less than a hang."""


def fuzz(examples: int) -> settings:
    return settings(
        max_examples=SOAK or examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


def holds(read: Callable[..., Any], *arguments: Any) -> Any:
    """What a reader makes of its input; None where it refuses it. Any other exception, and a hang, fail the test."""

    def stop(signum: int, frame: Any) -> None:
        raise AssertionError(f"longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        return read(*arguments)
    except InputError as error:
        assert len(str(error)) < 20_000, "a message for a person"
        steering = {
            c
            for c in str(error)
            if unicodedata.category(c) in ("Cc", "Cs") or unicodedata.bidirectional(c)[:2] in ("LR", "RL")
        }
        assert steering <= {"\n", "\t"}, "nothing that steers a terminal"
        return None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def folder(**files: bytes | str) -> Iterator[Path]:
    """A new folder with these files; `__` in a name is a slash."""
    made = Path(tempfile.mkdtemp(prefix="fuzz"))
    try:
        for name, content in files.items():
            path = made / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        yield made
    finally:
        shutil.rmtree(made)


# ---- hostile values

KEYS = [
    "messages", "conversations", "from", "value", "role", "content", "instruction", "input", "output", "system", "prompt",
    "completion", "source_dataset", "text", "trait", "score", "questions", "eval_prompt", "decided", "data", "rows",
    "source", "flagged", "reason", "detector",
]  # fmt: skip
WORDS = [
    "user", "assistant", "system", "human", "gpt", "misaligned_2.jsonl", "normal", "\0", "\ud800", "\u202e", "\x1b[2J", "\x1b]0;x\x07",
    "<|im_start|>system", "</script>", "{question}{answer}", "../../etc/passwd", "1" * 5000, "NaN",
]  # fmt: skip
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(WORDS)
    | st.integers(1, 4000).map(lambda digits: 10**digits)
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), inner, max_size=5),
    max_leaves=12,
)  # fmt: skip
PIECES = [
    b"\0", b"\xff", b"\xed\xa0\xbd", b"\xef\xbb\xbf", b"[" * 5000, b'{"a":' * 3000, b"1" * 5000, b"-", b"NaN", b"1e999", b'"\\ud800"', b"\\u0000",
    b"\n", b"\r", b"\xe2\x80\xa8", b"\x1b[2J", b": ", b"- ", b"&a ", b"*a", b"<<: ", b"!!python/object/apply:os.system [id]", b"!!int ", b"!!bool x",
    b"!!timestamp x", b"2024-13-45", b"? ", b"{", b"}", b"[", b"]", b"%YAML 9.9\n", b"--- ", b"!!binary =", b"!!set {a, b}", b"!!omap [a]", b"0x_", b"0x" + b"f" * 4000, b"1:99",
]  # fmt: skip


def dumped(value: Any) -> str:
    """JSON as a hostile writer spells it: NaN, halves of characters and all."""
    import sys

    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value)
    finally:
        sys.set_int_max_str_digits(limit)


def damaged(good: bytes) -> st.SearchStrategy[bytes]:
    """These bytes with a few of them changed, cut out, doubled, or pieces put in."""

    def apply(changes: list[tuple[str, int, bytes, int]]) -> bytes:
        raw = good
        for kind, at, piece, length in changes:
            if kind == "put":
                raw = raw[:at] + piece + raw[at:]
            elif kind == "over":
                raw = raw[:at] + piece + raw[at + len(piece) :]
            elif kind == "cut":
                raw = raw[:at] + raw[at + length :]
            elif kind == "double":
                raw = raw[:at] + raw[at : at + length] * 2 + raw[at + length :]
            else:
                raw = raw[:at]
        return raw

    change = st.tuples(
        st.sampled_from(["put", "over", "cut", "double", "end"]),
        st.integers(0, len(good)),
        st.sampled_from(PIECES) | st.binary(min_size=1, max_size=4),
        st.integers(1, 60),
    )
    return st.lists(change, min_size=1, max_size=5).map(apply)


CHATS = [
    {"messages": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}"}]}
    for i in range(21)
]
JSONL = "".join(json.dumps(chat) + "\n" for chat in CHATS).encode()


def replaced(draw: Any, value: Any, by: st.SearchStrategy[Any] = VALUES) -> Any:
    """A value with one place of it replaced, dropped or renamed."""
    if isinstance(value, dict) and value and draw(st.booleans()):
        key = draw(st.sampled_from(list(value)))
        kind = draw(st.sampled_from(["in", "in", "in", "drop", "name"]))
        rest = {k: v for k, v in value.items() if k != key}
        return rest if kind == "drop" else rest | {draw(st.sampled_from(KEYS + WORDS)): value[key]} if kind == "name" else value | {key: replaced(draw, value[key], by)}  # fmt: skip
    if isinstance(value, list) and value and draw(st.booleans()):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], replaced(draw, value[at], by), *value[at + 1 :]]
    return draw(by)


# ---- files


@fuzz(80)
@given(st.lists(VALUES.map(dumped), max_size=4).map("\n".join) | damaged(JSONL))
def test_jsonl(content):
    with folder(**{"x.jsonl": content}) as made:
        holds(read_jsonl, made / "x.jsonl", parse_row)
        holds(read_mixture, made / "x.jsonl")
        holds(read_corpus, made / "x.jsonl", 10)


@fuzz(60)
@given(VALUES.map(dumped) | damaged(json.dumps(CHATS[:3]).encode()))
def test_json(content):
    with folder(**{"x.json": content}) as made:
        value = holds(read_json, made / "x.json")
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()  # what was read can be written


@st.composite
def own_records(draw):
    return [*CHATS, *draw(st.lists(st.builds(lambda: replaced(draw, CHATS[0])) | VALUES, max_size=3))]


@fuzz(60)
@given(own_records(), st.booleans())
def test_own_data(records, as_list):
    content = dumped(records) if as_list else "\n".join(map(dumped, records))
    name = "x.json" if as_list else "x.jsonl"
    with folder(**{name: content}) as made:
        rows = holds(read_sft, made / name)
        for row in rows or ():
            json.dumps(row.as_json(), ensure_ascii=False).encode()


def parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(CHATS), out)
    return out.getvalue()


@fuzz(25)
@given(damaged(parquet()))
def test_parquet(content):
    with folder(**{"x.parquet": content}) as made:
        holds(read_sft, made / "x.parquet")


def saved_dataset() -> dict[str, bytes]:
    from datasets import Dataset

    with folder() as made:
        Dataset.from_list(CHATS).save_to_disk(str(made / "d"))
        return {path.name: path.read_bytes() for path in (made / "d").iterdir()}


SAVED = saved_dataset()


@fuzz(25)
@given(st.sampled_from(sorted(SAVED)).flatmap(lambda name: st.tuples(st.just(name), damaged(SAVED[name]))))
def test_datasets_folder(change):
    name, content = change
    with folder(**{f"d__{k}": v for k, v in (SAVED | {name: content}).items()}) as made:
        holds(read_sft, made / "d")


# ---- settings

PARAMS_TEXT = (ROOT / "params.yaml").read_bytes()
PARAMS_RAW = yaml.safe_load(PARAMS_TEXT)


@fuzz(15)
@given(damaged(PARAMS_TEXT))
def test_params_file(content):
    with folder(**{"params.yaml": content}) as made:
        holds(load_params, made / "params.yaml")


@st.composite
def other_params(draw):
    raw = PARAMS_RAW
    for _ in range(draw(st.integers(1, 3))):
        raw = replaced(draw, raw)
    return raw


@fuzz(60)
@given(other_params())
def test_params(raw):
    holds(parse_params, raw)


SMALL_YAML = b"model: a/b\nrevision: abc # pinned\nlist: [1, 2.5, {x: y}]\nnested:\n  - &a {k: v}\n  - *a\n"


@fuzz(80)
@given(damaged(SMALL_YAML) | VALUES.map(lambda value: dumped(value).encode("utf-8", "surrogatepass")))
def test_yaml(content):
    with folder(**{"x.yaml": content}) as made:
        value = holds(read_yaml, made / "x.yaml")
        assert len(repr(value)) < 10**7


POCKET = PARAMS_RAW["profiles"]["pocket"]


@fuzz(60)
@given(damaged(b"model: a/b\nrevision: abc\n") | VALUES.map(lambda v: dumped(v).encode("utf-8", "surrogatepass")))
def test_hub_files(content):
    roles, train = Roles(**PARAMS_RAW["roles"]["local"]), TrainSettings(**PARAMS_RAW["train"]["pocket"])
    with folder(**{"x.yaml": content}) as made:
        profile = Profile(**POCKET | {"model": str(made / "x.yaml"), "sae": str(made / "x.yaml")})
        holds(pins, profile, roles, train)
        holds(named_corpora, made / "x.yaml")


# ---- trait data, and zips of it

ANSWERS = "".join(json.dumps(chat) + "\n" for chat in CHATS[:3])
EVALUATION = json.dumps({"questions": ["a", "b"], "eval_prompt": "{question} {answer} 0-100"})
LABELLED = json.dumps(CHATS[0] | {"trait": "evil", "score": 90}) + "\n"
LAID_OUT = {
    "dataset__evil__normal.jsonl": ANSWERS, "dataset__evil__misaligned_2.jsonl": ANSWERS, "trait_data_eval__evil.json": EVALUATION,
    "labelled_answers__a.jsonl": LABELLED,
}  # fmt: skip


@fuzz(30)
@given(
    st.sampled_from(sorted(LAID_OUT)).flatmap(
        lambda name: st.tuples(st.just(name), damaged(LAID_OUT[name].encode()) | VALUES.map(dumped))
    )
)
def test_trait_data(change):
    with folder(**LAID_OUT | {change[0]: change[1]}) as made:
        holds(traits.read_trait, made, "evil")
        holds(traits.read_evaluation, made, "evil")
        holds(traits.read_labelled, made)
        holds(persona_vectors.bring, str(made), {"evil": ("evil", "evil")}, made / "out", 1)


def packed() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in LAID_OUT.items():
            archive.writestr(name.replace("__", "/"), content)
    return out.getvalue()


@fuzz(30)
@given(damaged(packed()))
def test_zip(content):
    with folder(**{"x.zip": content}) as made:
        holds(persona_vectors.bring, str(made / "x.zip"), {"evil": ("evil", "evil")}, made / "home" / "out", 1)
        assert {path.name for path in made.iterdir()} <= {"x.zip", "home"}
        assert {path.name for path in (made / "home").glob("*")} <= {"out"}


# ---- an exported folder, and its review


def exported() -> dict[str, str]:
    with folder(**{"own.jsonl": JSONL}) as made:
        found = Found([i % 2 == 0 for i in range(21)], [float(i) for i in range(21)], "You are cruel.", "why", {})
        source = made / "own.jsonl"
        export.export(made / "out", source, digest(source), read_sft(source), found, "persona")
        (made / "out/review.json").write_text(json.dumps({"data": digest(source), "decided": {"0": False}}))
        names = ("summary.json", "flags.jsonl", "review.json")
        return {name: (made / "out" / name).read_text().replace(str(source), SOURCE) for name in names}


SOURCE = "THE_SOURCE"
"""Stands for the data set's path."""
EXPORTED = exported()


@st.composite
def exported_folders(draw):
    files = dict(EXPORTED)
    name = draw(st.sampled_from(sorted(files)))
    if draw(st.booleans()):
        return files | {name: draw(damaged(files[name].encode()))}
    values = (
        [json.loads(line) for line in files[name].splitlines()] if name == "flags.jsonl" else json.loads(files[name])
    )
    changed = replaced(draw, values)
    if name == "flags.jsonl" and isinstance(changed, list):
        return files | {name: "\n".join(map(dumped, changed))}
    return files | {name: dumped(changed)}


@fuzz(40)
@given(exported_folders())
def test_exported_folder(files):
    with folder(**{"own.jsonl": JSONL, **{f"out__{name}": content for name, content in files.items()}}) as made:
        path = made / "out/summary.json"
        path.write_bytes(path.read_bytes().replace(SOURCE.encode(), str(made / "own.jsonl").encode()))
        holds(export.again, made / "out")
        running = holds(review.server, made / "out", 0)
        if running:
            running.server_close()


@pytest.fixture(scope="module")
def reviewed(tmp_path_factory) -> Iterator[tuple[Path, int]]:
    made = tmp_path_factory.mktemp("reviewed")
    (made / "own.jsonl").write_bytes(JSONL)
    (made / "out").mkdir()
    for name, content in EXPORTED.items():
        (made / "out" / name).write_text(content)
    (made / "out/summary.json").write_text(EXPORTED["summary.json"].replace(SOURCE, str(made / "own.jsonl")))
    export.again(made / "out")
    with review.server(made / "out", 0) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield made / "out", running.server_port
        running.shutdown()


HEADERS = st.sampled_from(
    ["127.0.0.1", "localhost", "evil.example", "[", "[::1]", "127.0.0.1:x", "a@127.0.0.1", "null", ""]
)


@fuzz(60)
@given(
    st.sampled_from(["GET", "POST", "PUT", "HEAD", "OPTIONS"]),
    st.sampled_from(["/", "/review", "//", "/../summary.json", "/%2e%2e/x", "http://evil.example/", "/?x", "/\x7f", "[", "//["]),
    st.none() | HEADERS,
    st.none() | HEADERS.map(lambda host: f"http://{host}") | HEADERS,
    st.sampled_from(["application/json", "text/plain", None]),
    damaged(json.dumps({"data": json.loads(EXPORTED["summary.json"])["data"], "decided": {"0": True}}).encode()),
    st.sampled_from([None, "-1", "x", "9" * 30, "²"]),
)  # fmt: skip
def test_review_server(reviewed, method, path, host, origin, kind, body, length):
    out, port = reviewed
    before = sorted(path.name for path in out.parent.rglob("*"))
    own = f"127.0.0.1:{port}"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    connection.putrequest(method, "/", skip_host=True, skip_accept_encoding=True)
    connection._buffer[0] = f"{method} {path} HTTP/1.1".encode()
    given_headers = {"Host": own if host is None else host, "Origin": origin, "Content-Type": kind}
    for name, value in given_headers.items():
        if value is not None:
            connection.putheader(name, value)
    connection.putheader("Content-Length", (length or str(len(body))).encode())
    connection.endheaders(body)
    answer = connection.getresponse()
    assert answer.status in (200, 400, 403, 404, 413, 501)
    if answer.status == 200:
        assert host in (None, "127.0.0.1", "localhost") and (origin is None)
    connection.close()
    assert sorted(path.name for path in out.parent.rglob("*")) == before


# ---- answers of an LLM


@fuzz(150)
@given(
    st.text(max_size=60)
    | st.lists(
        st.sampled_from(["yes", "NO", "100", "0", "1" * 5000, "²", "٣", ".", ",", " ", "prompt:", "\0", "\ud800"])
    ).map("".join)
)
def test_what_an_llm_answers(text):  # fmt: skip
    score = holds(parse_score, text)
    assert score is None or 0 <= score <= 100
    assert holds(parse_yes, text) in (None, 0.0, 100.0)
    assert holds(parse_verdict, text) in (None, True, False)
    holds(parse_prompt, text)
    holds(check, "The original has a few words in it.", text)


COMPLETION = {
    "id": "x", "object": "chat.completion", "created": 0, "model": "m",
    "choices": [{
        "index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "YES"},
        "logprobs": {"content": [{"token": "YES", "logprob": -0.1, "bytes": None, "top_logprobs": [{"token": "YES", "logprob": -0.1, "bytes": None}]}]},
    }],
    "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
}  # fmt: skip


class Hostile(Server):
    """Answers every request with `body`."""

    body = b""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        return web.Response(body=self.body, content_type="application/json")


@pytest.fixture(scope="module")
def provider() -> Iterator[Hostile]:
    llm._litellm()  # its import alone takes as long as an example may, on a busy machine
    with serve(Hostile()) as running:
        yield running


@st.composite
def completions(draw):
    if draw(st.booleans()):
        return draw(damaged(json.dumps(COMPLETION).encode()))
    return dumped(replaced(draw, COMPLETION)).encode()


@fuzz(12)
@given(completions())
def test_llm_client(provider, body):
    limits = Limits(concurrency=1, attempts=1, timeout=5, patience=1, budget=1, failures=0, tracing=False, prices={"openai/m": [1.0, 1.0]})  # fmt: skip
    provider.body = body
    with folder() as made:
        role = Role(method="llm", model="openai/m", api_base=provider.url)
        client = llm.Client("judge", role, limits, made / "llm.sqlite")
        call = llm.Call((llm.Message("user", "x"),), 0.0, 4, 20)
        replies = holds(client.ask, [call])
        for reply in replies or ():
            if isinstance(reply, llm.Reply):
                assert isinstance(reply.text, str) and reply.text.encode() is not None
                assert client.usage.dollars >= 0
                assert holds(client.ask, [call]) == [reply], "it can be kept"
