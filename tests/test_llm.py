"""The LLM client against a real HTTP server that misbehaves: every answer once, failures sorted, nothing paid twice."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai_server import Server, serve

from inoculation.chat import Message
from inoculation.files import InputError
from inoculation.llm import Cache, Call, Client, LLMError, Reply, ask_until, cache_key, scrub
from inoculation.params import Limits, Role

LIMITS = Limits(concurrency=8, attempts=4, timeout=5, patience=30, budget=20, tracing=False)


@pytest.fixture
def server():
    with serve(Server(answer=lambda body: (f"re: {body['messages'][-1]['content']}", None))) as running:
        yield running


def client(server: Server, tmp_path: Path, price=(1.0, 2.0), model: str = "openai/tiny", **limits) -> Client:
    role = Role(method="llm", model=model, api_base=server.url, price=list(price))
    return Client("judge", role, LIMITS.model_copy(update=limits), tmp_path / "llm.sqlite")


def calls(*texts: str, **options) -> list[Call]:
    return [Call((Message("user", text),), 1.0, 10, **options) for text in texts]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Back-off of the same form, shorter."""
    monkeypatch.setattr("inoculation.llm.FIRST_WAIT", 0.01)


def test_answers_come_in_order_and_again_from_the_cache(server, tmp_path):
    texts = [f"q{i}" for i in range(30)] + ["q0"]
    first = client(server, tmp_path)
    assert [reply.text for reply in first.ask(calls(*texts))] == [f"re: {text}" for text in texts]
    assert max(server.answered.values()) == 1, "the same call twice is sent once"
    assert (first.usage.calls, first.usage.cache_hits) == (30, 0)
    assert first.usage.dollars == pytest.approx(30 * (100 * 1e-6 + 10 * 2e-6))
    again = client(server, tmp_path)
    assert [reply.text for reply in again.ask(calls(*texts))] == [f"re: {text}" for text in texts]
    assert len(server.requests) == 30 and again.usage.dollars == 0 and again.usage.cache_hits == 30
    assert [reply.text for reply in first.ask(calls("new"))] == ["re: new"], "a client asks more than once"
    assert server.most_in_flight <= LIMITS.concurrency


@pytest.mark.parametrize("fault", ["429", "429_retry_after", "500", "hang", "reset", "truncated", "empty_choices"])
def test_what_passes_is_tried_again(server, tmp_path, fault):
    server.script = [fault]
    asking = client(server, tmp_path, timeout=1)
    assert [reply.text for reply in asking.ask(calls("q"))] == ["re: q"]
    assert (len(server.requests), asking.usage.retries) == (2, 1)


@pytest.mark.parametrize("fault", ["400", "401", "403", "404"])
def test_what_stays_is_not_tried_again(server, tmp_path, fault):
    server.script = [fault] * 5
    with pytest.raises(LLMError, match=f"role judge: 1 of 1 calls to openai/tiny have no answer(?s:.*)fault {fault}"):
        client(server, tmp_path).ask(calls("q"))
    assert len(server.requests) == 1


def test_tries_are_bounded_and_what_arrived_is_kept(server, tmp_path):
    server.answer = lambda body: ("fine", None)
    asking = client(server, tmp_path, concurrency=1)
    server.script = ["ok"] + ["500"] * 4
    with pytest.raises(LLMError, match=r"1 of 2 calls(?s:.*)4 tries(?s:.*)run again to continue"):
        asking.ask(calls("a", "b"))
    assert len(server.requests) == 5
    assert [reply.text for reply in asking.ask(calls("a", "b"))] == ["fine", "fine"]
    assert server.answered == {"a": 1, "b": 1}


def test_patience_bounds_the_time(server, tmp_path):
    server.faults = {"429_retry_after": 1.0}
    started = time.monotonic()
    with pytest.raises(LLMError, match="fault 429"):
        client(server, tmp_path, patience=2.5, attempts=100).ask(calls("q"))
    assert time.monotonic() - started < 10


def test_fewer_requests_in_flight_while_the_provider_limits_the_rate(server, tmp_path):
    server.latency = 0.02
    running: list[int] = []

    def answer(body):
        running.append(server._running)
        return "x", None

    server.answer = answer
    server.script = ["429"] * 8
    asking = client(server, tmp_path, concurrency=8, attempts=8)
    assert len(asking.ask(calls(*map(str, range(60))))) == 60
    assert running[0] <= 4 and max(running[-10:]) > 4, "halved by the burst, then grown again"


def test_the_budget_stops_before_it_is_exceeded(server, tmp_path):
    # A call of 300 bytes may cost $0.326 by what it could be, and costs $0.11 by the server's usage.
    asking = client(server, tmp_path, price=(1000, 1000), budget=0.6, concurrency=1)
    with pytest.raises(LLMError, match=r"the budget of \$0\.6 would be exceeded: \$0\.3300 are spent"):
        asking.ask(calls(*(f"{i:300}" for i in range(9))))
    assert asking.usage.dollars <= 0.6 and len(server.requests) == 3


def test_concurrent_calls_reserve_what_they_may_cost(server, tmp_path):
    server.latency = 0.2
    asking = client(server, tmp_path, price=(0, 11_000), budget=0.25, concurrency=8)
    with pytest.raises(LLMError, match="are in flight"):
        asking.ask(calls(*(f"q{i}" for i in range(8))))
    assert len(server.requests) == 2, "two may cost $0.11 each, a third would exceed the budget"


def test_no_key_reaches_errors_or_the_cache(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-1234")
    server.script = ["400"]
    with pytest.raises(LLMError) as caught:
        client(server, tmp_path).ask(calls("q"))
    assert server.keys == ["Bearer sk-very-secret-1234"]
    assert "your key is Bearer ***" in str(caught.value) and "secret" not in str(caught.value)
    client(server, tmp_path).ask(calls("q"))
    assert all(b"sk-very" not in path.read_bytes() for path in tmp_path.iterdir())
    assert scrub("x sk-very-secret-1234") == "x ***"


def test_a_missing_key_or_price_is_said_before_anything_is_sent(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match="role judge: gpt-4.1-mini needs OPENAI_API_KEY in the environment"):
        Client("judge", Role(method="llm", model="gpt-4.1-mini", api_base=None, price=None), LIMITS, tmp_path / "c")
    with pytest.raises(InputError, match="price of 'openai/mine' is unknown"):
        Client(
            "judge", Role(method="llm", model="openai/mine", api_base="http://x", price=None), LIMITS, tmp_path / "c"
        )


texts = st.text(max_size=20)
some_calls = st.builds(
    Call,
    st.lists(st.builds(Message, st.sampled_from(["system", "user"]), texts), min_size=1, max_size=3).map(tuple),
    st.sampled_from([0.0, 1.0]),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(0, 2),
)


@given(st.sampled_from(["a", "b"]), some_calls, st.sampled_from(["a", "b"]), some_calls)
def test_two_calls_share_a_key_only_when_all_is_the_same(model, call, other_model, other):
    assert (cache_key(model, call) == cache_key(other_model, other)) == ((model, call) == (other_model, other))


@given(texts, texts, st.none() | st.lists(st.tuples(texts, st.floats(-50, 0)), min_size=1, max_size=3).map(tuple))
def test_the_cache_gives_back_what_it_was_given(tmp_path_factory, text, reason, top):
    cache = Cache(tmp_path_factory.getbasetemp() / "roundtrip.sqlite")
    reply, key = Reply(text, reason, top), cache_key("m", Call((Message("user", repr((text, reason, top))),), 1.0, 1))
    with cache.writer() as keep:
        keep(key, reply)
    assert cache.get([key, "absent"]) == {key: reply}


def test_unreadable_answers_are_asked_for_again_and_then_shown(server, tmp_path):
    given_back = iter(["maybe", "YES"])
    server.answer = lambda body: (next(given_back, "perhaps"), None)
    asking = client(server, tmp_path)

    def parse(text: str) -> bool | None:
        return {"YES": True, "NO": False}.get(text)

    question = (Message("user", "?"),)
    assert ask_until(asking, [question], parse, 0.0, 4, "YES or NO") == [True]
    assert [request["temperature"] for request in server.requests] == [0.0, 1.0], "a greedy answer would be the same"
    with pytest.raises(LLMError, match=r"1 of 1 answers are not YES or NO:\n  - 1 x 'perhaps'"):
        ask_until(asking, [(Message("user", "!"),)], parse, 0.0, 4, "YES or NO")


def test_a_killed_process_pays_again_only_for_what_was_in_flight(server, tmp_path):
    server.latency = 0.02
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from types import SimpleNamespace
from pathlib import Path
from test_llm import calls, client
client(SimpleNamespace(url={server.url!r}), Path({str(tmp_path)!r})).ask(calls(*map(str, range(400))))
"""
    process = subprocess.Popen([sys.executable, "-c", script], env=os.environ, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(server.requests) < 150 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    client(server, tmp_path).ask(calls(*map(str, range(400))))
    assert len(server.answered) == 400
    repeated = sum(count - 1 for count in server.answered.values())
    assert len(server.requests) >= 150 and repeated <= LIMITS.concurrency
