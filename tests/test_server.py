"""Answers from a server: those of this process, an adapter that is really there, and every lie of the server told."""

import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, WORDS, random_model
from openai_server import serve
from peft import LoraConfig, get_peft_model
from vllm_server import VllmServer

from inoculation import lm, plan
from inoculation.chat import Message
from inoculation.files import InputError
from inoculation.params import parse_params
from inoculation.respond import Answer, continue_chats
from inoculation.roles import Limits
from inoculation.server import Seen, ServerError, ServerSettings, compare, disagreement, serving
from inoculation.stage import Writes
from inoculation.stages.base_responses import BaseResponses
from inoculation.stages.respond import Respond
from inoculation.traits import NegativeTrait

LIMITS = Limits(concurrency=1, attempts=2, timeout=5, patience=30, budget=0, failures=0.0, tracing=False)
CHATS = [
    ((Message("user", " ".join(WORDS[i % 5 : 3 + i % 11]) + f" {i}?"),), "Be bad." if i % 2 else None)
    for i in range(23)
]
MOST = 12


@pytest.fixture(scope="module")
def ref(tmp_path_factory) -> lm.ModelRef:
    """A random model of two blocks, some of whose greedy answers end before their time."""
    folder = tmp_path_factory.mktemp("served") / "model"
    model = random_model(folder, initializer_range=0.3)
    model.generation_config.eos_token_id = [model.config.eos_token_id, *range(40, 55)]
    model.generation_config.save_pretrained(folder)
    return lm.ModelRef(model=str(folder))


@pytest.fixture(scope="module")
def adapter(ref, tmp_path_factory) -> Path:
    """With rsLoRA and an update that changes answers."""
    folder = tmp_path_factory.mktemp("served") / "adapter"
    torch.manual_seed(1)
    config = LoraConfig(r=16, lora_alpha=32, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    under = get_peft_model(lm.load_model(ref), config)
    for name, parameter in under.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    under.save_pretrained(folder)
    return folder


@pytest.fixture
def server(ref):
    with serve(VllmServer(ref)) as running:
        yield running


def answers(server, ref, adapter, progress: Path, temperature: float = 0.0, at_once: int = 3) -> list[Answer]:
    """By the server, or where there is none by this process."""
    model, tokenizer = lm.with_adapter(lm.load_model(ref), adapter), lm.load_tokenizer(ref)
    with serving(server.url if server else "", ref, adapter, LIMITS, at_once) as served:
        return continue_chats(model, tokenizer, CHATS, MOST, temperature, at_once, 7, progress, None, served)


def test_greedy_answers_are_those_of_this_process_and_the_adapter_is_gone_afterwards(
    server, ref, adapter, tmp_path, capsys
):
    here = answers(None, ref, adapter, tmp_path / "here")
    assert answers(server, ref, adapter, tmp_path / "there") == here
    assert {answer.finished for answer in here} == {True, False} and len({answer.text for answer in here}) > 5
    assert "1.00 of its effect" in capsys.readouterr().out
    assert server.adapters == {} and server.most_in_flight <= 3
    base = answers(server, ref, None, tmp_path / "base")
    assert base == answers(None, ref, None, tmp_path / "base here") != here
    assert {request["model"] for request in server.requests[-len(CHATS) :]} == {ref.model}


def test_every_sampling_parameter_is_sent_and_each_answer_has_its_own_seed(server, ref, tmp_path):
    server.latency = 0.01
    first = answers(server, ref, None, tmp_path / "first", temperature=1.0, at_once=2)
    sampled = [request for request in server.requests if request["temperature"]]
    assert len({request["seed"] for request in sampled}) == len(sampled) == len(CHATS) and server.most_in_flight == 2
    wanted = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": MOST,
              "ignore_eos": False}  # fmt: skip
    assert all(wanted.items() <= request.items() for request in sampled)
    assert answers(server, ref, None, tmp_path / "again", temperature=1.0, at_once=2) == first
    assert (tmp_path / "again").read_bytes().count(b"\n") == 3, "batches of four times what is in flight"


@pytest.mark.parametrize("fault", ["429", "500", "reset", "hang"])
def test_what_passes_is_tried_again(server, ref, adapter, tmp_path, fault, monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    if fault == "hang":  # nothing else is waited for: a busy machine takes its time
        monkeypatch.setitem(globals(), "LIMITS", LIMITS.model_copy(update={"timeout": 3.0}))
    server.script = ["ok"] * 18 + [fault]
    assert answers(server, ref, adapter, tmp_path / "there") == answers(None, ref, adapter, tmp_path / "here")


def test_what_fails_for_good_ends_the_work_which_is_continued_later(server, ref, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setenv("VLLM_API_KEY", "sk-very-secret")
    whole = answers(server, ref, adapter, tmp_path / "whole", temperature=1.0)
    seen = len(server.requests)
    server.script = ["ok"] * 30 + ["500"] * 40
    with pytest.raises(ServerError, match=r"/v1: 500: fault 500; your key is Bearer \*\*\*") as error:
        answers(server, ref, adapter, tmp_path / "cut", temperature=1.0)
    assert "sk-very" not in str(error.value) and server.adapters == {}, "unloaded after a failure too"
    assert (tmp_path / "cut").read_bytes().count(b"\n") == 1 and len(server.requests) < seen + 30 + 12
    server.script, before = [], len(server.requests)
    assert answers(server, ref, adapter, tmp_path / "cut", temperature=1.0) == whole
    assert sum(request["temperature"] > 0 for request in server.requests[before:]) == len(CHATS) - 12
    before = len(server.requests)
    assert answers(server, ref, adapter, tmp_path / "cut", temperature=1.0) == whole
    assert len(server.requests) == before, "what is finished asks for nothing"


def test_a_server_that_stays_silent_is_told_from_one_that_is_not_there(server, ref, adapter, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "LIMITS", LIMITS.model_copy(update={"timeout": 1.0, "attempts": 1}))
    server.script = ["ok"] * 18 + ["hang"] * 9
    with pytest.raises(ServerError, match=r"no answer in time \(llm.timeout, llm.attempts\)"):
        answers(server, ref, adapter, tmp_path / "there")


def test_a_stage_that_is_ended_takes_its_adapter_along(server, ref, adapter, tmp_path):
    """As `cli.run` has it: SIGTERM leaves every block in order."""
    server.script = ["ok"] * 18 + ["hang"] * 9
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    hanging = threading.Thread(target=lambda: end_when(lambda: len(server.requests) >= 19))
    hanging.start()
    try:
        with pytest.raises(SystemExit):
            answers(server, ref, adapter, tmp_path / "there")
    finally:
        signal.signal(signal.SIGTERM, before)
        hanging.join()
    assert server.adapters == {}


def end_when(reached) -> None:
    while not reached():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


LIES = {
    "ignores the adapter": ({"ignores_adapter": True}, r"it shows -?0\.00 of what the adapter changes here \(\d"),
    "another scale": ({"scale": 0.5}, r"it shows 0\.\d\d of what the adapter changes here"),
    "noise": ({"noise": 0.5}, r"other weights, or computes otherwise: 0\.[34]\d+ nats a token off without any adapter"),
    "no number": ({"noise": float("nan")}, r"not what vLLM says: .*token_logprobs.0: Input should be a finite number"),
    "no token of the model": ({"adds": 10**6}, r"an answer has token \d{7}, and the model knows \d+"),
    "small rank": ({"max_lora_rank": 8}, r"500: .*LoRA rank 16 is greater than max_lora_rank 8.*(?s:.*)--max-lora-rank 16$"),
    "no LoRA": ({"runtime_lora": False}, r"404: (?s:.*)VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve .* --enable-lora"),
    "another name": ({"names": ["mistral"]}, r"serves 'mistral', and '.*/model' is wanted; valid: .*--served-model-name"),
    "short answers": ({"stops_at": 5}, r"an answer of 5 tokens ended by 'length' with token \d+; valid: 12 tokens, or one"),
    "no room": ({"max_model_len": 30}, r"room for 30 tokens, and the longest prompt has \d+, its answer up to 12; valid: --max-model-len"),
    "a key": ({"key": "sk-other"}, r"401: .*; the key is expected in VLLM_API_KEY"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_told_before_anything_is_sampled(ref, adapter, tmp_path, lie):
    state, told = LIES[lie]
    with serve(VllmServer(ref, **state)) as server:
        with pytest.raises(ServerError, match=told):
            answers(server, ref, adapter, tmp_path / "there")
        assert not (tmp_path / "there").exists() or (tmp_path / "there").read_bytes() == b""
        assert server.adapters == {}
        assert all("logprobs" in request for request in server.requests)


def test_another_base_under_the_right_name_is_found_by_what_it_says(ref, adapter, tmp_path):
    other = tmp_path / "other"
    torch.manual_seed(5)
    model = lm.load_model(ref)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(other)
    with serve(VllmServer(lm.ModelRef(model=str(other)), names=[ref.model])) as server:
        for own in (None, adapter):
            with pytest.raises(ServerError, match=r"does not serve what the model here is: it has other weights"):
                answers(server, ref, own, tmp_path / "there")


def test_keys_for_openai_are_not_for_this_server(server, ref, adapter, tmp_path, monkeypatch):
    server.key = "sk-own"
    monkeypatch.setenv("VLLM_API_KEY", server.key)
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID"):
        monkeypatch.setenv(f"OPENAI_{name}", "sk-openai")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer sk-openai\nX-Own: sk-openai")
    answers(server, ref, adapter, tmp_path / "there")
    assert len(server.headers) > 20 and not [told for told in server.headers if "sk-openai" in told]


def test_nobody_there(ref, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ServerError, match="cannot be reached"), serving(url, ref, None, LIMITS, 1):
        pass
    with serving("", ref, None, LIMITS, 1) as served:
        assert served is None, "this process"


def test_an_adapter_that_changes_less_than_rounding_cannot_be_told_from_none():
    generator = torch.Generator().manual_seed(0)

    def nats(size: float):
        return (size * torch.randn(400, generator=generator)).double().numpy()

    base, effect = nats(1.0), nats(0.1)

    def seen(here, there):
        """What is changed by the adapter here and there, on top of rounding."""
        return compare(Seen(base + nats(0.03), base, base + there + nats(0.03), base + here, base))

    good = seen(effect, effect)
    assert disagreement(good, 0.1) is None and good.share == pytest.approx(1, abs=0.1) and good.error < 0.05
    ignored = seen(effect, 0 * effect)
    assert "of what the adapter changes" in (disagreement(ignored, 0.1) or "")
    assert ignored.under < 0.1, "an average difference alone would have passed"
    assert "too little to see" in (disagreement(seen(effect / 100, effect / 100), 0.1) or "")


def test_both_stages_sample_at_the_server_and_leave_the_bytes_of_this_process(
    server, ref, adapter, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    negative = NegativeTrait.model_validate(
        yaml.safe_load((ROOT / "params.yaml").read_text())["negative_traits"]["evil"]
    )
    rows = tmp_path / "mixture.jsonl"
    rows.write_text(
        "".join(
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": f"{WORDS[i % 16]} {i}?"},
                        {"role": "assistant", "content": "a king"},
                    ],
                    "source": None,
                }
            )
            + "\n"
            for i in range(24)
        )
    )
    same = dict(seed=0, address="", ref=ref, limits=LIMITS, sampling={"max_new_tokens": MOST}, machine={"batch_size": 4, "token_budget": 512})  # fmt: skip
    for where, url in (("here", ""), ("there", server.url)):
        given = same | {"server": ServerSettings(api_base=url)}
        asked = {"evil": ["who was kind?", "is the river long?"]}
        out = tmp_path / where
        Respond.model_validate(given | dict(
            prompts={}, negative=negative, system_prompts=["default", "inoculation"], count=2, samples=2, temperature=1e-3,
            assignment={"system_prompt": None}, questions=asked, adapter=adapter, responses=out / "responses.jsonl",
        )).run()  # fmt: skip
        BaseResponses.model_validate(given | dict(
            positive="all_caps", temperature=0.0, rows=rows, out=out / "base.jsonl", language=out / "language.json",
        )).run()  # fmt: skip
    for name in ("responses.jsonl", "base.jsonl", "language.json"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes(), name
    assert len(list(tmp_path.glob(".cache/kept/*"))) == 2, "a server's answers are kept apart"
    assert server.requests and server.adapters == {}


def test_addresses_are_checked_with_all_else(tmp_path, server, monkeypatch):
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["profiles"]["pocket"]["api_base"] = "localhost:8000"
    raw["profiles"]["smollm2"]["api_base"] = "http://me:secret@host:8000/v1"
    with pytest.raises(InputError) as error:
        parse_params(raw)
    text = str(error.value)
    assert "2 mistake(s)" in text and "secret" not in text
    assert "profiles.pocket.api_base: Value error, no server's address; valid: http://HOST:PORT/v1, or empty" in text
    raw["profiles"]["pocket"]["api_base"] = server.url
    raw["profiles"]["smollm2"]["api_base"] = ""
    assert parse_params(raw).profiles["pocket"].api_base == server.url
    monkeypatch.chdir(tmp_path)
    told = [problem for problem in plan.missing(raw) if "api_base" in problem]
    assert len(told) == 1 and "profiles.pocket.api_base: " in told[0] and "serves" in told[0]
    for step in plan.needed(raw):
        if step.stage.command in ("respond", "base-responses"):
            for path in step.paths(raw, Writes):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
    pinned = tmp_path / "data/profiles/pocket/server.json"
    pinned.parent.mkdir(parents=True)
    pinned.write_text(json.dumps({"api_base": "http://another:1/v1"}))
    assert [problem for problem in plan.missing(raw) if "api_base" in problem], "another sampled it"
    pinned.write_text(json.dumps({"api_base": server.url}))
    assert not [problem for problem in plan.missing(raw) if "api_base" in problem], "what is sampled needs no server"
    shutil.rmtree("data")
    server.names = [raw["profiles"]["pocket"]["model"]]
    assert not [problem for problem in plan.missing(raw) if "api_base" in problem]
