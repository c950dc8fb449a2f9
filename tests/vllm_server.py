"""A real HTTP server on loopback that speaks vLLM's protocol (0.32), computes with a real model and PEFT adapters, and can lie.

What it says of a request that fails are vLLM's own words and codes.
"""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from inoculation import lm


@dataclass
class VllmServer:
    """The state of a running server; its attributes may be changed while it runs."""

    ref: lm.ModelRef
    max_lora_rank: int = 16
    runtime_lora: bool = True
    """False: VLLM_ALLOW_RUNTIME_LORA_UPDATING was not set."""
    ignores_adapter: bool = False
    scale: float = 1.0
    """Of every adapter; not 1: it computes another update than PEFT."""
    noise: float = 0.0
    """Nats that every log-probability is off, at random."""
    adds: int = 0
    """To every token that it says it generated."""
    stops_at: int | None = None
    """Tokens after which every answer ends, whatever was asked."""
    max_model_len: int = 256
    key: str = ""
    latency: float = 0.0
    script: list[str] = field(default_factory=list)
    """What becomes of the next completions, in order: "ok", a status, "hang", "reset"; then "ok"."""
    url: str = ""
    names: list[str] = field(default_factory=list)
    """Of the base."""
    adapters: dict[str, str] = field(default_factory=dict)
    """Name -> folder."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    most_in_flight: int = 0

    def __post_init__(self) -> None:
        self.names = self.names or [self.ref.model]
        self.model: Any = lm.load_model(self.ref)
        self._running = 0

    def routes(self) -> list[web.RouteDef]:
        routes = [web.get("/v1/models", self.models), web.post("/v1/completions", self.completions)]
        if self.runtime_lora:
            routes += [web.post("/v1/load_lora_adapter", self.load), web.post("/v1/unload_lora_adapter", self.unload)]
        return routes

    def _unlike(self, request: web.Request) -> web.Response | None:
        self.headers.append(str(request.headers))
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return None

    async def models(self, request: web.Request) -> web.Response:
        base = [
            {"id": name, "root": name, "parent": None, "max_model_len": self.max_model_len, "object": "model"}
            for name in self.names
        ]
        own = [{"id": name, "root": path, "parent": self.names[0]} for name, path in self.adapters.items()]
        return self._unlike(request) or web.json_response({"object": "list", "data": base + own})

    async def load(self, request: web.Request) -> web.Response:
        if refused := self._unlike(request):
            return refused
        body = await request.json()
        name, path = body["lora_name"], Path(body["lora_path"])
        if not (path / "adapter_config.json").is_file():
            return failure(404, f"Loading lora {name} failed: No adapter found for {path}")
        under = PeftModel.from_pretrained(lm.load_model(self.ref), path)
        rank = under.peft_config["default"].r
        if rank > self.max_lora_rank:
            return failure(
                500,
                "Call to add_lora method failed: Worker failed with error 'LoRA rank "
                f"{rank} is greater than max_lora_rank {self.max_lora_rank}.', please check the stack trace above for the root cause",
            )
        self.adapters[name] = str(path)
        for module in under.modules():
            if isinstance(module, LoraLayer):
                module.scaling = {key: value * self.scale for key, value in module.scaling.items()}
        self.under = under.eval()
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: web.Request) -> web.Response:
        if refused := self._unlike(request):
            return refused
        name = (await request.json())["lora_name"]
        if self.adapters.pop(name, None) is None:
            return failure(404, f"The lora adapter '{name}' cannot be found.")
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self._running += 1
        self.most_in_flight = max(self.most_in_flight, self._running)
        try:
            fault = self.script.pop(0) if self.script else "ok"
            if fault == "hang":
                await asyncio.sleep(3600)
            if fault == "reset":
                request.transport.abort()
            await asyncio.sleep(self.latency)
            if fault.isdigit():
                return failure(int(fault), f"fault {fault}; your key is {request.headers['Authorization']}")
            return self._unlike(request) or self._complete(body)
        finally:
            self._running -= 1

    def _complete(self, body: dict[str, Any]) -> web.Response:
        if body["model"] not in (*self.names, *self.adapters):
            return failure(404, f"The model `{body['model']}` does not exist. Valid aliases: {', '.join(self.names)}.")
        if len(body["prompt"]) + body["max_tokens"] > self.max_model_len:
            return failure(400, f"max_tokens={body['max_tokens']} and the prompt are more than {self.max_model_len}")
        adapted = body["model"] in self.adapters and not self.ignores_adapter
        ids, chosen = self._continue(self.under if adapted else self.model, body)
        answer = ids[len(body["prompt"]) :]
        ended = answer[-1] in body["stop_token_ids"]
        answer = [token if token in body["stop_token_ids"] else token + self.adds for token in answer]
        choice = {
            "index": 0, "text": "not what is read", "finish_reason": "stop" if ended else "length", "token_ids": answer,
            "logprobs": {"token_logprobs": [p for _, p in chosen[len(body["prompt"]) - 1 :]]} if "logprobs" in body else None,
        }  # fmt: skip
        return web.json_response({"id": "x", "object": "text_completion", "model": body["model"], "choices": [choice]})

    def _continue(self, model: Any, body: dict[str, Any]) -> tuple[list[int], list[tuple[int, float]]]:
        """The prompt with its answer, and (token, log-probability) of all but the first."""
        ids, generator = list(body["prompt"]), torch.Generator().manual_seed(body.get("seed", 0))
        most = min(body["max_tokens"], self.stops_at or body["max_tokens"])
        with torch.inference_mode():
            for _ in range(most):
                logits = model(input_ids=torch.tensor([ids])).logits[0].float()
                last = logits[-1]
                scaled = (last / (body["temperature"] or 1)).softmax(-1)
                token = last.argmax() if not body["temperature"] else torch.multinomial(scaled, 1, generator=generator)
                ids.append(int(token))
                if ids[-1] in body["stop_token_ids"]:
                    break
            told = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        told = told + self.noise * torch.randn(told.shape, generator=generator)
        return ids, list(zip(ids[1:], told.tolist(), strict=True))


def failure(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "type": "x", "param": None, "code": status}}, status=status)
