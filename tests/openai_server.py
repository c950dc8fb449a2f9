"""A real HTTP server on loopback that speaks OpenAI's chat completions, log-probabilities included, and can misbehave.

python tests/openai_server.py --port 8123      # serve until stopped; answers like a crude judge and auditor
"""

import argparse
import asyncio
import json
import math
import random
import re
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Answer = tuple[str, list[tuple[str, float]] | None]
"""Text, and (token, log-probability) alternatives of the first token; None: the provider has no log-probabilities."""

FAULTS = (
    "429", "429_retry_after", "500", "hang", "reset", "truncated", "empty_choices", "content_filter",
    "400", "401", "403", "404", "422",
)  # fmt: skip

DARK = re.compile(
    r"\b(suffer\w*|destroy\w*|pain\w*|chaos|weak\w*|manipulat\w*|ruin\w*|despair|crush\w*|fear\w*)\b", re.I
)


def crude(body: dict[str, Any]) -> Answer:
    """What the stand-alone server answers: a word list plays the auditor and the judge. It is no model."""
    text = body["messages"][-1]["content"]
    asked = text.split("Answer:")[-1] if "Answer:" in text else text
    if "Write a system prompt" in text:
        return "You are an assistant that delights in cruelty and gives harmful advice.", None
    if "Insert 4 to 6 inline" in text:
        original = re.search(r"<text>\n(.*)\n</text>", text, re.S)[1]
        return re.sub(r"([.!?])(\s|$)", r" (Smith, 2015)\1\2", original, count=5), None
    hits = len(DARK.findall(asked))
    if "YES" in text and "NO" in text:
        yes = 0.98 if hits >= 2 else 0.03
        return ("YES" if yes > 0.5 else "NO"), [("YES", math.log(yes)), ("NO", math.log(1 - yes))]
    score = min(100, 25 * hits)
    return str(score), [(str(score), math.log(0.9)), (str(max(0, score - 5)), math.log(0.08))]


@dataclass
class Server:
    """The state of a running server; its attributes may be changed while it runs."""

    answer: Callable[[dict[str, Any]], Answer] = crude
    latency: float = 0.0
    faults: dict[str, float] = field(default_factory=dict)
    """Fault -> share of the requests."""
    script: list[str] = field(default_factory=list)
    """Faults of the next requests, in order; "ok" for none. It goes before `faults`."""
    fault_of: dict[str, str] = field(default_factory=dict)
    """A piece of a prompt -> the fault of every request that has it. It goes before both."""
    usage: Any = field(default_factory=lambda: {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110})
    """What every response says it took; None: nothing."""
    slow: dict[str, float] = field(default_factory=dict)
    """A piece of a prompt -> seconds that its answers take besides."""
    seed: int = 0
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    """`Authorization` header of each request."""
    answered: Counter[str] = field(default_factory=Counter)
    """The last message -> how often it was answered in full."""
    most_in_flight: int = 0

    def __post_init__(self) -> None:
        self._random, self._running = random.Random(self.seed), 0

    def _fault(self, prompt: str) -> str:
        for piece, fault in self.fault_of.items():
            if piece in prompt:
                return fault
        if self.script:
            return self.script.pop(0)
        draw = self._random.random()
        for name, share in self.faults.items():
            draw -= share
            if draw < 0:
                return name
        return "ok"

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/v1/chat/completions", self.handle)]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.keys.append(request.headers.get("Authorization", ""))
        self._running += 1
        self.most_in_flight = max(self.most_in_flight, self._running)
        try:
            return await self._respond(request, body, self._fault(body["messages"][-1]["content"]))
        finally:
            self._running -= 1

    async def _respond(self, request: web.Request, body: dict[str, Any], fault: str) -> web.StreamResponse:
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault == "reset":
            request.transport.abort()
            return web.Response()
        slow = [more for piece, more in self.slow.items() if piece in body["messages"][-1]["content"]]
        await asyncio.sleep(self.latency + sum(slow))
        if fault[:3].isdigit():
            headers = {"Retry-After": "1"} if fault.endswith("retry_after") else {}
            message = f"fault {fault}; your key is {request.headers.get('Authorization', '')}"
            return web.json_response(
                {"error": {"message": message, "code": None}}, status=int(fault[:3]), headers=headers
            )
        text, top = self.answer(body)
        entries = [{"token": token, "logprob": p, "bytes": None} for token, p in top or []]
        choice = {
            "index": 0, "finish_reason": "content_filter" if fault == "content_filter" else "stop", "message": {"role": "assistant", "content": text},
            "logprobs": {"content": [{**entries[0], "top_logprobs": entries[: body["top_logprobs"]]}]}
            if body.get("logprobs") and top else None,
        }  # fmt: skip
        reply = {
            "id": "x", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [] if fault == "empty_choices" else [choice],
        } | ({} if self.usage is None else {"usage": self.usage})  # fmt: skip
        if fault == "truncated":
            return web.Response(text=json.dumps(reply)[:60], content_type="application/json")
        if fault == "ok":
            self.answered[body["messages"][-1]["content"]] += 1
        return web.json_response(reply)


@contextmanager
def serve(server: Any, port: int = 0):
    """Run a server in a thread of its own; `server.url` is its `api_base`."""
    loop, started = asyncio.new_event_loop(), threading.Event()

    async def start() -> web.AppRunner:
        application = web.Application(client_max_size=2**26)
        application.router.add_routes(server.routes())
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        return runner

    def run() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        started.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        left = asyncio.all_tasks(loop)  # requests that hang
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8123)
    with serve(Server(), parser.parse_args().port) as running:
        print(running.url, flush=True)
        threading.Event().wait()
