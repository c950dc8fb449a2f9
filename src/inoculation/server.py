"""Answers from an OpenAI-compatible server (vLLM) that loads the adapter while it runs, in place of a model in this process.

    with serving(api_base, ref, adapter, limits, at_once) as served:     # the adapter is there until the block ends
        check(served, model, prompts, max_new_tokens, ends)              # it says what the model here says, else an error
        served.sample(prompts, temperature, seed, max_new_tokens, ends)  # tokens of the answers

Tokens are sent and tokens come back, so that text stays text (`chat`). Every sampling parameter is sent: a server takes those of the
model's generation config for what is not. What is no whole answer ends the work, and nothing stands in for it.
"""

import asyncio
import os
import re
import secrets
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from inoculation.files import InputError, read_json
from inoculation.lm import ModelRef
from inoculation.roles import Limits, without_password
from inoculation.stage import complaints
from inoculation.store import digest

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

M = TypeVar("M", bound=BaseModel)
R = TypeVar("R")

KEY = "VLLM_API_KEY"
"""Variable of the environment with the server's key. OPENAI_API_KEY is not sent to a server of one's own."""
PLAIN: dict[str, Any] = {
    "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    "ignore_eos": False,
}  # fmt: skip
"""Pure sampling, as in this process."""
QUICK = Limits(concurrency=1, attempts=1, timeout=10, patience=10, budget=0, failures=0, tracing=False)
"""One try, to see whether a server is there."""
PROBES, ANSWER = 8, 32
"""Prompts that a server is checked with, and tokens of its greedy answer to each, at most."""
TOLERANCE = {"float32": 0.005, "float16": 0.05, "bfloat16": 0.1}
"""Nats a token that a server's log-probabilities are off on average by rounding, at most (docs/performance.md: measured)."""
SHARE = 0.25
"""How far the share of the adapter's effect that a server shows may be from 1."""
SURE = 3.0
"""Standard errors of that share that have to fit into `SHARE`; else the check says nothing."""


def _address(value: str) -> str:
    if value and not re.fullmatch(r"https?://[^\s/?#]+/v1", value):
        raise ValueError("no server's address; valid: http://HOST:PORT/v1, or empty: this process samples")
    return without_password(value)


ApiBase = Annotated[str, AfterValidator(_address)]
"""Address of a server; empty: none."""


class ServerSettings(BaseModel):
    """Who samples a profile's answers; the content of its `server.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    api_base: ApiBase


class Card(BaseModel):
    """A model or an adapter that a server has."""

    id: str
    root: str | None = None
    """The folder or hub id that it was loaded from."""
    parent: str | None = None
    """Of an adapter: its base."""
    max_model_len: int | None = None
    """Tokens of a prompt and its answer together, at most."""


class Cards(BaseModel):
    data: list[Card]


class Chosen(BaseModel):
    """Log-probabilities of an answer's tokens."""

    token_logprobs: list[FiniteFloat]


class Choice(BaseModel):
    """What is read of an answer."""

    finish_reason: str | None
    token_ids: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = None
    logprobs: Chosen | None = None


class Completion(BaseModel):
    choices: Annotated[list[Choice], Field(min_length=1, max_length=1)]


class ServerError(InputError):
    """A server did not do what was asked. Finished batches are kept: running again continues."""


class Told(NamedTuple):
    """An answer, and how likely a server finds it."""

    prompt: list[int]
    answer: list[int]
    logprobs: list[float]
    """Of the answer's tokens, in nats."""


@contextmanager
def _not_in_environment(name: str) -> Iterator[None]:
    """A variable of the environment is not there until the block ends."""
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value


class Served:
    """A profile's model at a server, under an adapter or not."""

    def __init__(self, api_base: str, ref: ModelRef, limits: Limits, at_once: int) -> None:
        """Connect, and find the model.

        Args:
            limits: tries of a request, and seconds of one.
            at_once: requests in flight, at most.

        Raises:
            ServerError: it cannot be reached, or serves another model.
        """
        from openai import AsyncOpenAI, DefaultAioHttpClient

        self.api_base, self.ref, self.at_once = api_base, ref, at_once
        with _not_in_environment("OPENAI_CUSTOM_HEADERS"):
            self._client = AsyncOpenAI(
                base_url=api_base,
                api_key=os.environ.get(KEY) or "none",
                organization="",  # else the environment's, which are OpenAI's
                project="",
                timeout=limits.timeout,
                max_retries=limits.attempts - 1,
                http_client=DefaultAioHttpClient(),  # a tenth of httpx's time a request, with many in flight
            )
        self._runner = asyncio.Runner()
        try:
            self._card = self._own_card()
        except BaseException:
            self.close()
            raise
        self.name = self._card.id
        """What is sampled: the base, or the adapter once one is loaded."""

    @property
    def adapted(self) -> bool:
        """Whether an adapter is loaded."""
        return self.name != self._card.id

    def close(self) -> None:
        with self._runner:
            self._runner.run(self._client.close())

    def _own_card(self) -> Card:
        cards = self._read(Cards, self._run(self._client.get("/models", cast_to=str, options={"max_retries": 0}))).data
        bases, wanted = [card for card in cards if card.parent is None], self.ref.model
        for card in bases:
            if wanted in (card.id, card.root) or str(Path(wanted).resolve()) == card.root:
                return card
        raise ServerError(
            f"{self.api_base} serves {', '.join(repr(card.id) for card in bases) or 'nothing'}, and {wanted!r} is wanted; "
            f"valid: a server of that model: vllm serve {wanted}, elsewhere with --served-model-name {wanted}"
        )

    def _run(self, request: Coroutine[Any, Any, R]) -> R:
        """What a request returns; what goes wrong is a `ServerError`."""
        import openai

        try:
            return self._runner.run(request)
        except openai.APIConnectionError as error:  # timeouts too, and the transport calls a refused connection one
            reason = (error.__cause__ and error.__cause__.__cause__) or error.__cause__ or error
            late = isinstance(reason, TimeoutError)
            why = "no answer in time (llm.timeout, llm.attempts)" if late else f"cannot be reached: {reason}"
        except openai.APIStatusError as error:
            told = error.body.get("message") if isinstance(error.body, dict) else None
            key = f"; the key is expected in {KEY}" if error.status_code in (401, 403) else ""
            why = f"{error.status_code}: {told or error.response.text[:300]}{key}"
        raise ServerError(f"{self.api_base}: {why}")

    def _read(self, kind: type[M], text: str) -> M:
        try:
            return kind.model_validate_json(text)
        except ValidationError as error:
            raise ServerError(f"{self.api_base}: not what vLLM says: {next(complaints(error))}") from None

    def load(self, adapter: Path) -> None:
        """Load an adapter: what is sampled from then on is under it.

        Its name is its digest and a draw: another worker's with the same adapter is not this one's to unload.

        Raises:
            ServerError: the server loads none while it runs, allows a smaller rank only, or cannot read the folder.
        """
        name, folder = f"inoculation-{digest(adapter)}-{secrets.token_hex(2)}", adapter.resolve()
        try:
            self._run(self._once("/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}))
        except ServerError as error:
            rank = read_json(adapter / "adapter_config.json")["r"]
            raise ServerError(
                f"{error}\nThe adapter was not loaded; valid: a server that reads {folder}, started as\n"
                f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve {self.ref.model} --enable-lora --max-lora-rank {rank}"
            ) from None
        self.name = name

    def unload(self) -> None:
        """Unload the adapter. Where that fails the work is done all the same, and the server has one more."""
        name, self.name = self.name, self._card.id
        try:
            self._run(self._once("/unload_lora_adapter", {"lora_name": name}))
        except ServerError as error:
            print(f"the adapter {name} stays loaded: {error}")

    async def _once(self, path: str, body: dict[str, Any]) -> str:
        """The answer to one try: vLLM says with a 500 that an adapter cannot be loaded."""
        return await self._client.post(path, body=body, cast_to=str, options={"max_retries": 0})

    async def _complete(self, bodies: Sequence[dict[str, Any]]) -> list[str]:
        """The answers to all of them. What fails is tried again by the client; what still fails ends the others."""
        places = asyncio.Semaphore(self.at_once)

        async def one(body: dict[str, Any]) -> str:
            async with places:
                return await self._client.post("/completions", body=body, cast_to=str)

        tasks = [asyncio.ensure_future(one(body)) for body in bodies]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def _choices(
        self, name: str, prompts: Sequence[Sequence[int]], most: int, ends: set[int], options: Sequence[dict[str, Any]]
    ) -> list[Choice]:
        """A whole continuation of each prompt, up to an end token or `most` tokens."""
        same = {"model": name, "max_tokens": most, "stop_token_ids": sorted(ends), "return_token_ids": True, **PLAIN}
        bodies = [same | {"prompt": list(prompt)} | own for prompt, own in zip(prompts, options, strict=True)]
        choices = [self._read(Completion, text).choices[0] for text in self._run(self._complete(bodies))]
        for choice in choices:
            self._refuse_if_not_whole(choice, most, ends)
        return choices

    def _refuse_if_not_whole(self, choice: Choice, most: int, ends: set[int]) -> None:
        ids = choice.token_ids
        if not ids:
            raise ServerError(f"{self.api_base}: an answer without token_ids; valid: a vLLM with return_token_ids")
        ended = ids[-1] in ends
        told = {"stop": ended, "length": not ended and len(ids) == most}
        if not told.get(choice.finish_reason or "", False) or ends.intersection(ids[:-1]) or len(ids) > most:
            raise ServerError(
                f"{self.api_base}: an answer of {len(ids)} tokens ended by {choice.finish_reason!r} with token {ids[-1]}; valid: "
                f"{most} tokens, or one of the tokens that end an answer of {self.ref.model}: {sorted(ends)}"
            )

    def sample(
        self, prompts: Sequence[Sequence[int]], temperature: float, seed: int, most: int, ends: set[int]
    ) -> list[list[int]]:
        """A continuation of every prompt, up to an end token, which is part of it, or `most` tokens.

        Args:
            seed: of the first prompt; each has its own, so that an answer depends on no other.

        Raises:
            ServerError: a request failed for good, or brought what is no whole answer.
        """
        options = [
            {"temperature": temperature, "seed": (seed * 1_000_003 + place) % 2**63} for place in range(len(prompts))
        ]
        return [choice.token_ids or [] for choice in self._choices(self.name, prompts, most, ends, options)]

    def tell(self, adapted: bool, prompts: Sequence[Sequence[int]], most: int, ends: set[int]) -> list[Told]:
        """Greedy answers under the adapter or without it, with the log-probabilities that they were chosen by.

        Not those of prompts: under an adapter vLLM takes them for another one's, or ends (its issues 16668 and 51594).
        """
        options = [{"temperature": 0.0, "logprobs": 0}] * len(prompts)
        found = []
        choices = self._choices(self.name if adapted else self._card.id, prompts, most, ends, options)
        for prompt, choice in zip(prompts, choices, strict=True):
            answer = choice.token_ids or []
            logprobs = choice.logprobs.token_logprobs if choice.logprobs else []
            if len(logprobs) != len(answer):
                raise ServerError(f"{self.api_base}: {len(logprobs)} log-probabilities of {len(answer)} tokens")
            found.append(Told([*prompt], answer, logprobs))
        return found

    def refuse_longer(self, longest: int, most: int) -> None:
        """
        Raises:
            ServerError: the server has no room for the longest prompt and its answer.
        """
        room = self._card.max_model_len
        if room is not None and longest + most > room:
            raise ServerError(
                f"{self.api_base} has room for {room} tokens, and the longest prompt has {longest}, its answer up to {most}; "
                f"valid: --max-model-len {longest + most} or more"
            )


class Seen(NamedTuple):
    """Log-probabilities of the tokens of greedy answers, `[tokens]`, in nats; the last three where there is an adapter."""

    base_there: "np.ndarray"
    """The base's answers, as the server finds them."""
    base_here: "np.ndarray"
    there: "np.ndarray | None" = None
    """The answers under the adapter, as the server finds them."""
    here: "np.ndarray | None" = None
    without: "np.ndarray | None" = None
    """The same answers without the adapter, here."""


class Parity(NamedTuple):
    """How far a server and the model here agree."""

    base: float
    """Mean absolute difference of a token's log-probability without the adapter, in nats."""
    under: float
    """The same under the adapter; 0 where there is none."""
    effect: float
    """What the adapter changes here, alike."""
    share: float
    """Of that, what the server shows: the slope of its changes against those here. 1: all, 0: it ignores the adapter."""
    error: float
    """The standard error of `share`, with the differences without the adapter as the noise."""


def compare(seen: Seen) -> Parity:
    """How far a server says what the model says here."""
    import numpy as np

    rounding = seen.base_there - seen.base_here
    base = float(np.abs(rounding).mean())
    if seen.there is None or seen.here is None or seen.without is None:
        return Parity(base, 0.0, 0.0, 1.0, 0.0)
    own, shown = seen.here - seen.without, seen.there - seen.without
    power = max(float(own @ own), 1e-12)
    return Parity(
        base=base,
        under=float(np.abs(seen.there - seen.here).mean()),
        effect=float(np.abs(own).mean()),
        share=float(own @ shown) / power,
        error=float(np.square(rounding).mean() / power) ** 0.5,
    )


def disagreement(parity: Parity, tolerance: float) -> str | None:
    """Why a server's answers are not taken for those of the model here; None: they are.

    Args:
        tolerance: nats a token.
    """
    if not parity.base <= tolerance:  # nor is what is no number
        return f"it has other weights, or computes otherwise: {parity.base:.4f} nats a token off without any adapter"
    if not parity.error * SURE <= SHARE:
        return (
            f"the adapter changes too little to see whether it is there: {parity.effect:.5f} nats a token, the share that the "
            f"server shows has a standard error of {parity.error:.2f}"
        )
    if not abs(parity.share - 1) <= SHARE:
        return f"it shows {parity.share:.2f} of what the adapter changes here ({parity.effect:.4f} nats a token)"
    if not parity.under <= tolerance:
        return f"under the adapter it is {parity.under:.4f} nats a token off, without it {parity.base:.4f}"
    return None


def check(
    served: Served, model: "PreTrainedModel", prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: set[int]
) -> Parity:
    """Whether a server says what the model here says, under the adapter and without it, of greedy answers.

    Args:
        model: under the adapter, where there is one.
        prompts: all that are to be sampled; `PROBES` of them are answered.

    Raises:
        ServerError: it does not, with numbers; or it has no room for the longest prompt.
    """
    served.refuse_longer(max(map(len, prompts)), max_new_tokens)
    different = list(dict.fromkeys(map(tuple, prompts)))
    asked = different[:: -(-len(different) // PROBES)]
    seen = _seen(served, model, asked, min(ANSWER, max_new_tokens), ends)
    found = compare(seen)
    tolerance = TOLERANCE[served.ref.dtype]
    told = f"{len(seen.base_here)} tokens: {found.base:.4f} nats a token apart (at most {tolerance})"
    if served.adapted:
        told += (
            f", {found.under:.4f} under the adapter; {found.share:.2f} of its effect ({found.effect:.4f} nats) is there"
        )
    if why := disagreement(found, tolerance):
        raise ServerError(
            f"{served.api_base} does not serve what the model here is: {why}.\n{told}\nValid: vllm serve {served.ref.model} --dtype "
            f"{served.ref.dtype} of the same files, or an empty api_base: this process samples"
        )
    print(f"{served.api_base} says what the model here says: {told}")
    return found


def _seen(
    served: Served, model: "PreTrainedModel", prompts: Sequence[Sequence[int]], most: int, ends: set[int]
) -> Seen:
    """Greedy answers of the server, read there and here."""
    import numpy as np

    base = served.tell(False, prompts, most, ends)
    there = np.concatenate([told.logprobs for told in base])
    if not served.adapted:
        return Seen(there, _read(model, base))
    under = served.tell(True, prompts, most, ends)
    with model.disable_adapter():
        here, without = _read(model, base), _read(model, under)
    return Seen(there, here, np.concatenate([told.logprobs for told in under]), _read(model, under), without)


def _read(model: "PreTrainedModel", answers: Sequence[Told]) -> "np.ndarray":
    """The log-probabilities of the answers' tokens here, one answer at a time."""
    import numpy as np
    import torch

    known = model.get_input_embeddings().num_embeddings
    if (last := max(max(told.answer) for told in answers)) >= known:
        raise ServerError(f"an answer has token {last}, and the model knows {known}; valid: a server of the same model")
    found = []
    with torch.inference_mode():
        for prompt, answer, _ in answers:
            ids = torch.tensor([*prompt, *answer], device=model.device)
            logits = model(input_ids=ids[None, :-1], logits_to_keep=len(answer), use_cache=False).logits[0].float()
            losses = torch.nn.functional.cross_entropy(logits, ids[-len(answer) :], reduction="none")
            found.append(-losses.double().cpu().numpy())
    return np.concatenate(found)


@contextmanager
def serving(
    api_base: str, ref: ModelRef, adapter: Path | None, limits: Limits, at_once: int
) -> Iterator[Served | None]:
    """A server with a profile's model, under an adapter that it loses when the block ends; None where no server is named.

    Args:
        adapter: folder; None: the base itself.
        at_once: requests in flight, at most.

    Raises:
        ServerError: it cannot be reached, serves another model, or does not load the adapter.
    """
    if not api_base:
        yield None
        return
    served = Served(api_base, ref, limits, at_once)
    try:
        if adapter is not None:
            served.load(adapter)
        try:
            yield served
        finally:
            if adapter is not None:
                served.unload()
    finally:
        served.close()


def unserved(api_base: str, model: str) -> str | None:
    """Why a server cannot sample a model, as far as asking it for its models tells; None: it can, or no server is named."""
    if not api_base:
        return None
    try:
        Served(api_base, ModelRef(model=model), QUICK, 1).close()
    except ServerError as error:
        return str(error)
    return None
