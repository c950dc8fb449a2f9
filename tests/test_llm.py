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
from inoculation.clients import Clients
from inoculation.files import InputError
from inoculation.llm import (
    HOPELESS,
    TRIES,
    Cache,
    Call,
    Client,
    Failure,
    LLMError,
    Reply,
    SetAside,
    ask_until,
    cache_key,
    scrub,
    set_aside,
)
from inoculation.roles import Limits, Role

LIMITS = Limits(concurrency=8, attempts=4, timeout=5, patience=30, budget=20, failures=0.02, tracing=False)


@pytest.fixture
def server():
    with serve(Server(answer=lambda body: (f"re: {body['messages'][-1]['content']}", None))) as running:
        yield running


def client(server: Server, tmp_path: Path, price=(1.0, 2.0), model: str = "openai/tiny", **limits) -> Client:
    role = Role(method="llm", model=model, api_base=server.url)
    prices = {} if price is None else {model: price}
    return Client("judge", role, LIMITS.model_copy(update={"prices": prices, **limits}), tmp_path / "llm.sqlite")


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


@pytest.mark.parametrize("fault", ["401", "403", "404"])
def test_a_failure_of_every_call_dooms_at_once(server, tmp_path, fault):
    server.script = ["ok", fault]
    with pytest.raises(LLMError, match=f"role judge: openai/tiny: (?s:.*)fault {fault}(?s:.*)run again to continue"):
        client(server, tmp_path, concurrency=1).ask(calls(*map(str, range(50))))
    assert len(server.requests) <= 4, "what was in flight, no more"
    client(server, tmp_path).ask(calls(*map(str, range(50))))
    # Others may be asked twice: where the machine stands still for as long as slow answers are waited for.
    assert len(server.answered) == 50 and server.answered["0"] == 1, "the answer that arrived is kept"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("400", "fault 400"), ("422", "fault 422"), ("content_filter", "withheld by the provider's content filter")],
)
def test_one_calls_failure_is_a_value_with_its_reason_and_not_tried_again(server, tmp_path, fault, reason):
    server.script = [fault]
    [failure, *replies] = client(server, tmp_path, concurrency=1).ask(calls("a", "b", "a"))
    assert isinstance(failure, Failure) and reason in failure.reason
    assert [getattr(reply, "text", failure) for reply in replies] == ["re: b", failure]
    assert len(server.requests) == 2


def test_tries_are_bounded_and_what_arrived_is_kept(server, tmp_path):
    server.answer = lambda body: ("fine", None)
    asking = client(server, tmp_path, concurrency=1)
    server.fault_of = {"b": "500"}
    [reply, failure] = asking.ask(calls("a", "b"))
    assert reply.text == "fine" and failure.reason.endswith("(4 tries)")
    assert (len(server.requests), asking.usage.retries, asking.usage.failures) == (5, 3, 1)
    server.fault_of = {}
    assert [reply.text for reply in asking.ask(calls("a", "b"))] == ["fine", "fine"]
    assert server.answered == {"a": 1, "b": 1}


QUESTIONS = [f"q{i:03}" for i in range(200)]


def yes_or_no(asking: Client, texts: list[str] = QUESTIONS) -> list[bool | Failure]:
    prompts = [(Message("user", text),) for text in texts]
    return ask_until(asking, prompts, {"YES": True, "NO": False}.get, 0.0, 4, "YES or NO")


@pytest.mark.parametrize("fault", ["400", "content_filter", "500", "unreadable"])
def test_a_rerun_asks_anew_for_what_failed_and_only_that(server, tmp_path, fault, capsys):
    bad = "q007"
    server.answer = lambda body: ("maybe" if server.fault_of and bad in str(body) else "YES", None)
    server.fault_of = {bad: "ok" if fault == "unreadable" else fault}
    for _ in range(2):
        before = len(server.requests)
        asking = client(server, tmp_path)
        results = yes_or_no(asking)
        [aside] = set_aside(results, "auditor", 0.02)
        assert aside.index == 7 and aside.reason and results.count(True) == 199 and asking.usage.failures == 1
        assert "role auditor: 1 of 200 failed (0.5%) and are set aside:\n  - 1 x " in capsys.readouterr().out
        asked = [request["messages"][-1]["content"] for request in server.requests[before:]]
    assert set(asked) == {bad} and len(asked) == {"500": 4, "unreadable": TRIES}.get(fault, 1)
    server.fault_of, before = {}, len(server.requests)
    assert yes_or_no(client(server, tmp_path)) == [True] * 200
    assert len(server.requests) == before + 1
    assert yes_or_no(client(server, tmp_path)) == [True] * 200
    assert len(server.requests) == before + 1


def test_an_answer_of_a_later_try_is_the_answer_of_every_rerun(server, tmp_path):
    answers = iter(["maybe", "NO"])
    server.answer = lambda body: (next(answers, "YES"), None)
    assert yes_or_no(client(server, tmp_path), ["q"]) == [False]
    assert yes_or_no(client(server, tmp_path), ["q"]) == [False] and len(server.requests) == 2


def test_replicates_stay_different_draws(server, tmp_path):
    draws = iter("abcdef")
    server.answer = lambda body: (next(draws), None)
    asking = client(server, tmp_path)
    assert asking.ask(calls("q", replicate=1))[0].text == "a"
    assert [reply.text for reply in asking.ask(calls("q") + calls("q", replicate=1))] == ["b", "a"]


def test_a_rerun_of_many_failures_under_the_share_is_not_given_up(server, tmp_path):
    server.answer = lambda body: ("YES", None)
    server.fault_of = {f"q{i:03}": "400" for i in range(HOPELESS + 5)}
    for _ in range(2):  # the second time, nothing but failures in a row
        results = yes_or_no(client(server, tmp_path, failures=0.2))
        assert len(set_aside(results, "auditor", 0.2)) == HOPELESS + 5


@pytest.mark.parametrize("fault", ["400", "500"])
def test_a_mistake_in_every_call_is_given_up_early(server, tmp_path, fault):
    server.faults = {fault: 1.0}
    with pytest.raises(LLMError, match=rf"{HOPELESS} calls failed in a row:\n  - {HOPELESS} x .*fault {fault}"):
        yes_or_no(client(server, tmp_path, attempts=1))
    assert len(server.requests) <= HOPELESS + 2 * LIMITS.concurrency


def test_a_greater_share_of_failures_is_an_error_that_lists_the_reasons():
    results = [True] * 95 + [Failure("too long")] * 3 + [Failure("filtered")] * 2
    assert set_aside(results, "auditor", 0.05)[0] == SetAside(95, "too long")
    with pytest.raises(
        LLMError,
        match=r"role auditor: 5 of 100 failed \(5.0%\), and at most 4.0% may .*\n  - 3 x too long\n  - 2 x filt",
    ):
        set_aside(results, "auditor", 0.04)
    with pytest.raises(LLMError, match=r"1 of 1 failed \(100.0%\), and at most 2.0% may, of 1 none \(llm.failures\)"):
        set_aside([Failure("filtered")], "synthesiser", 0.02)


@given(st.lists(st.sampled_from([True, None, 0.0, Failure("a"), Failure("b")])), st.floats(0, 0.99))
def test_what_is_set_aside_is_every_failure_or_an_error(results, share):
    failed = [SetAside(i, r.reason) for i, r in enumerate(results) if isinstance(r, Failure)]
    if len(failed) > share * len(results) + 1e-9:
        with pytest.raises(LLMError):
            set_aside(results, "judge", share)
    elif len(failed) < share * len(results) - 1e-9 or not failed:
        assert set_aside(results, "judge", share) == failed


def test_patience_bounds_the_time(server, tmp_path):
    server.faults = {"429_retry_after": 1.0}
    started = time.monotonic()
    [failure] = client(server, tmp_path, patience=2.5, attempts=100).ask(calls("q"))
    assert "fault 429" in failure.reason
    assert time.monotonic() - started < 10


def test_fewer_requests_in_flight_while_the_provider_limits_the_rate(server, tmp_path):
    server.latency = 0.05  # long beside what a slow machine needs between two requests
    running: list[int] = []

    def answer(body):
        running.append(server._running)
        return "x", None

    server.answer = answer
    server.script = ["429"] * 8
    asking = client(server, tmp_path, concurrency=8, attempts=8)
    assert len(asking.ask(calls(*map(str, range(120))))) == 120
    assert running[0] <= 4 and max(running[-10:]) > 4, "halved by the burst, then grown again"


def test_the_budget_stops_before_it_is_exceeded(server, tmp_path):
    # A call of 300 bytes may cost $0.326 by what it could be, and costs $0.11 by the server's usage.
    asking = client(server, tmp_path, price=(1000, 1000), budget=0.6, concurrency=1)
    with pytest.raises(LLMError, match=r"the budget of \$0\.6 would be exceeded: \$0\.3300 are spent"):
        asking.ask(calls(*(f"{i:300}" for i in range(9))))
    assert asking.usage.dollars <= 0.6 and len(server.requests) == 3


def test_the_roles_of_a_stage_share_its_budget(server, tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    limits = LIMITS.model_copy(update={"prices": {"openai/tiny": (0, 11_000)}, "budget": 0.25})
    clients = Clients(limits, lambda name, model: lambda usage, aside: None)
    role = Role(method="llm", model="openai/tiny", api_base=server.url)
    auditor, writer = clients.require("auditor", role), clients.require("synthesiser", role)
    auditor.ask(calls("a", "b"))
    with pytest.raises(LLMError, match="the stage's other roles took"):
        writer.ask(calls("c"))
    assert len(server.requests) == 2


def test_concurrent_calls_reserve_what_they_may_cost(server, tmp_path):
    server.latency = 0.2
    asking = client(server, tmp_path, price=(0, 11_000), budget=0.25, concurrency=8)
    with pytest.raises(LLMError, match="are in flight"):
        asking.ask(calls(*(f"q{i}" for i in range(8))))
    assert len(server.requests) == 2, "two may cost $0.11 each, a third would exceed the budget"


@pytest.mark.parametrize(
    "usage",
    [None, {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
     {"prompt_tokens": -9000, "completion_tokens": -9000, "total_tokens": -18000},
     {"prompt_tokens": 10**400, "completion_tokens": 10**400, "total_tokens": 10**400}],
    ids=["absent", "zero", "negative", "too large to be dollars"],
)  # fmt: skip
def test_a_provider_that_lies_about_usage_does_not_empty_the_purse(server, tmp_path, usage):
    """What no call can have taken counts as the most that it may have: 316 prompt tokens of $1 in a thousand."""
    server.usage = usage
    asking = client(server, tmp_path, price=(1000, 0), budget=1.0, concurrency=1)
    with pytest.raises(LLMError, match=r"the budget of \$1 would be exceeded"):
        asking.ask(calls(*(f"{i:300}" for i in range(20))))
    assert len(server.requests) <= 10 and 0 < asking.usage.dollars <= 1.0


def test_a_late_answer_is_not_the_next_questions(server, tmp_path):
    """Answers that come after their try was given up, on connections that others use: each prompt gets its own or fails."""
    texts = [f"q{i}" for i in range(80)]
    server.slow = {f"q{i}": 1.3 for i in range(40, 60)}  # longer than a deadline of a second
    replies = client(server, tmp_path, attempts=2, patience=3).ask(calls(*texts))
    answered = {text: reply.text for text, reply in zip(texts, replies, strict=True) if isinstance(reply, Reply)}
    assert len(answered) >= 60 and answered == {text: f"re: {text}" for text in answered}


def test_no_key_reaches_errors_or_the_cache(server, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_API_KEY", "sk-very-secret-1234")
    server.script = ["400"]
    [failure] = client(server, tmp_path).ask(calls("q"))
    assert server.keys == ["Bearer sk-very-secret-1234"]
    assert "your key is Bearer ***" in failure.reason and "secret" not in failure.reason
    server.script = ["401"]
    with pytest.raises(LLMError, match=r"your key is Bearer \*\*\*"):
        client(server, tmp_path).ask(calls("q"))
    client(server, tmp_path).ask(calls("q"))
    assert all(b"sk-very" not in path.read_bytes() for path in tmp_path.iterdir())
    assert scrub("x sk-very-secret-1234") == "x ***"


def test_a_missing_key_or_price_is_said_before_anything_is_sent(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match="role judge: gpt-4.1-mini needs OPENAI_API_KEY in the environment"):
        Client("judge", Role(method="llm", model="gpt-4.1-mini"), LIMITS, tmp_path / "c")
    with pytest.raises(InputError, match="price of 'openai/mine' is unknown"):
        Client("judge", Role(method="llm", model="openai/mine", api_base="http://x"), LIMITS, tmp_path / "c")


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
    assert yes_or_no(asking, ["?"]) == [True]
    assert [request["temperature"] for request in server.requests] == [0.0, 1.0], "a greedy answer would be the same"
    assert yes_or_no(asking, ["!"]) == [Failure("not YES or NO, 3 times: 'perhaps'")]


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
