"""One LLM client over LiteLLM for every role (judge, rewriter, auditor, explainer, classifier, synthesiser).

Answers are kept on disk as they arrive, so that a killed stage pays again only for what was in flight. What a call costs
is reserved before it is sent, so that a budget is never exceeded. LiteLLM is imported when something must be sent.
"""

import asyncio
import hashlib
import json
import os
import random
import re
import sqlite3
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from inoculation.chat import Message
from inoculation.files import InputError

if TYPE_CHECKING:
    from tqdm import tqdm

    from inoculation.params import Limits, Role

T = TypeVar("T")

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds of back-off before the second try, doubled for each further one, and at most."""
KNOWN_LATENCIES = 20
"""Answers after which their latencies set the deadline of a try."""
SLOW = 5.0
"""A try is given up after this many times the 95th percentile of the latencies, doubled with each try."""
SHORTEST_DEADLINE = 1.0
GROWTH = 0.1
"""Slots more for each answer: a tenth of the slots a round trip, so that a limit is tested gently."""
LISTED_FAILURES = 5


class Call(NamedTuple):
    messages: tuple[Message, ...]
    temperature: float
    max_tokens: int
    top_logprobs: int = 0
    """Alternatives of the first generated token to ask for; 0: none."""
    replicate: int = 0
    """Calls that differ in this alone are different draws."""


class Reply(NamedTuple):
    text: str
    finish_reason: str
    top_logprobs: tuple[tuple[str, float], ...] | None
    """(token, log-probability) alternatives of the first generated token; None: the provider gave none."""


@dataclass
class Usage:
    """What a client has used. Dollars and tokens are those of calls that were sent."""

    calls: int = 0
    cache_hits: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    dollars: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.calls} calls, {self.cache_hits} answers from the cache, {self.retries} retries, "
            f"{self.prompt_tokens:,} + {self.completion_tokens:,} tokens, ${self.dollars:.4f}"
        )


class LLMError(InputError):
    """Calls failed for good, or the budget is spent. What arrived is kept: running again continues."""


class _Permanent(Exception):
    """A failure that trying again cannot mend; its text is for the user."""


class _Transient(Exception):
    """A failure worth another try."""

    def __init__(self, reason: str, retry_after: float | None = None, limited: bool = False) -> None:
        super().__init__(reason)
        self.retry_after, self.limited = retry_after, limited


def cache_key(model: str, call: Call) -> str:
    """What makes two calls the same: model, messages, sampling and replicate, and nothing else."""
    parts = [
        model, [list(message) for message in call.messages],
        {"temperature": call.temperature, "max_tokens": call.max_tokens, "top_logprobs": call.top_logprobs}, call.replicate,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


class Cache:
    """Replies on disk, one SQLite file for all roles and processes."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL)")
            yield connection
        finally:
            connection.close()

    def get(self, keys: Sequence[str]) -> dict[str, Reply]:
        found = {}
        with self._open() as connection:
            for start in range(0, len(keys), 500):
                part = keys[start : start + 500]
                marks = ",".join("?" * len(part))
                query = f"SELECT key, reply FROM replies WHERE key IN ({marks})"
                for key, text in connection.execute(query, part):
                    reply, reason, top = json.loads(text)
                    found[key] = Reply(reply, reason, None if top is None else tuple((t, p) for t, p in top))
        return found

    @contextmanager
    def writer(self) -> Iterator[Callable[[str, Reply], None]]:
        """A function that keeps one reply; it is on disk when the function returns."""
        with self._open() as connection:
            yield lambda key, reply: connection.execute(
                "INSERT OR IGNORE INTO replies VALUES (?, ?)", (key, json.dumps(reply, ensure_ascii=False))
            )  # type: ignore[func-returns-value]


def scrub(text: str) -> str:
    """Text without any secret of the environment: keys must not reach logs, MLflow or error messages."""
    for name, value in os.environ.items():
        if re.search(r"(KEY|TOKEN|SECRET|PASSWORD)$", name) and len(value) >= 6:
            text = text.replace(value, "***")
    return text


def _litellm() -> Any:
    """LiteLLM, quiet and without telemetry; its price table is the package's (see `inoculation/__init__.py`)."""
    os.environ.setdefault("LITELLM_LOG", "ERROR")
    import litellm

    litellm.suppress_debug_info = True
    litellm.telemetry = False
    return litellm


class _Pace:
    """How many requests may be in flight: cut by the share that the provider turns away, grown again while it does not.

    A few refusals among many answers are noise and cost a few slots; a burst of them halves the slots, once a round trip.
    """

    def __init__(self, most: int) -> None:
        self.most, self.allowed, self.running = most, float(most), 0
        self.changed = asyncio.Condition()
        self.refused: deque[bool] = deque(maxlen=most)
        self.cut_at = self.not_before = 0.0

    async def acquire(self) -> None:
        async with self.changed:
            await self.changed.wait_for(lambda: self.running < int(self.allowed))
            self.running += 1
        if (wait := self.not_before - time.monotonic()) > 0:
            await asyncio.sleep(wait)

    async def release(self) -> None:
        async with self.changed:
            self.running -= 1
            self.changed.notify_all()

    def limited(self, latency: float, retry_after: float | None) -> None:
        """Slow down, once a round trip: the calls in flight would all say the same."""
        now = time.monotonic()
        self.refused.append(True)
        if now - self.cut_at > latency:
            kept = max(0.5, 1 - sum(self.refused) / len(self.refused))
            self.cut_at, self.allowed = now, max(1.0, self.allowed * kept)
        if retry_after:
            self.not_before = max(self.not_before, now + min(retry_after, LONGEST_WAIT))

    def succeeded(self) -> None:
        self.refused.append(False)
        self.allowed = min(float(self.most), self.allowed + GROWTH)


class Client:
    """Asks one role's model. `usage` counts over all calls of `ask`."""

    def __init__(
        self,
        name: str,
        role: "Role",
        limits: "Limits",
        cache: Path,
        record: Callable[[Usage], None] = lambda usage: None,
    ) -> None:
        """Check that the role can be played, without sending anything.

        Args:
            name: of the role, for messages and progress bars.
            role: model, api_base and price (dollars per million prompt and completion tokens).
            limits: how calls are made.
            cache: file of the replies on disk.
            record: called with `usage` after every `ask`, also after one that fails.

        Raises:
            InputError: the key is missing from the environment, or the price is unknown.
        """
        self.name, self.role, self.limits = name, role, limits
        self.model = str(role.model)
        self.cache = Cache(cache)
        self.record = record
        self.usage = Usage()
        self._latencies: list[float] = []
        self._reserved = 0.0
        self._prices = self._known_price()
        self._check_key()

    def _known_price(self) -> tuple[float, float]:
        """Dollars a prompt token and a completion token."""
        if self.role.price is not None:
            prompt, completion = self.role.price
            return prompt / 1e6, completion / 1e6
        try:
            known = _litellm().get_model_info(self.model)
            return float(known["input_cost_per_token"]), float(known["output_cost_per_token"])
        except Exception:
            raise InputError(
                f"role {self.name}: the price of {self.model!r} is unknown; set `price` of the role to dollars per million "
                "prompt and completion tokens, [0, 0] for a model of your own"
            ) from None

    def _check_key(self) -> None:
        if self.role.api_base is not None:
            return
        missing = _litellm().validate_environment(self.model)["missing_keys"]
        if missing:
            raise InputError(f"role {self.name}: {self.model} needs {' and '.join(missing)} in the environment")

    def ask(self, calls: Sequence[Call]) -> list[Reply]:
        """Replies in the order of the calls; identical calls are sent once.

        Raises:
            LLMError: a call failed for good, or the budget would be exceeded; finished replies are kept.
        """
        from tqdm import tqdm

        if not calls:
            return []
        keys = [cache_key(self.model, call) for call in calls]
        wanted = dict(zip(keys, calls, strict=True))
        replies = self.cache.get(list(wanted))
        self.usage.cache_hits += len(replies)
        missing = {key: call for key, call in wanted.items() if key not in replies}
        try:
            if missing:
                with (
                    tqdm(total=len(wanted), initial=len(replies), desc=self.name, unit="call") as bar,
                    self.cache.writer() as keep,
                ):
                    replies |= asyncio.run(self._send_all(missing, keep, bar))
        finally:
            self.record(self.usage)
        return [replies[key] for key in keys]

    async def _send_all(
        self, missing: dict[str, Call], keep: Callable[[str, Reply], None], bar: "tqdm[Any]"
    ) -> dict[str, Reply]:
        litellm = _litellm()
        pace = _Pace(self.limits.concurrency)
        replies: dict[str, Reply] = {}
        failures: list[str] = []
        fatal: list[str] = []
        queue = iter(missing.items())

        async def work() -> None:
            for key, call in queue:
                if fatal:
                    return
                try:
                    replies[key] = await self._send(litellm, call, pace)
                except _Permanent as error:
                    fatal.append(str(error))
                    return
                except _Transient as error:
                    failures.append(str(error))
                    continue
                keep(key, replies[key])
                bar.set_postfix_str(f"${self.usage.dollars:.2f}", refresh=False)
                bar.update()

        # Twice as many as may be in flight, because some wait between two tries.
        await asyncio.gather(*(work() for _ in range(min(2 * self.limits.concurrency, len(missing)))))
        if fatal or failures:
            reasons = list(dict.fromkeys([*fatal, *failures]))[:LISTED_FAILURES]
            listed = "\n".join(f"  - {reason}" for reason in reasons)
            raise LLMError(
                f"role {self.name}: {len(missing) - len(replies)} of {len(missing)} calls to {self.model} have no answer:\n"
                f"{listed}\nAnswers that arrived are kept; run again to continue."
            )
        return replies

    def _reserve(self, call: Call) -> float:
        """Set aside the most the call may cost, in dollars. UTF-8 bytes bound the tokens of its texts from above."""
        prompt = sum(len(message.content.encode()) + 16 for message in call.messages)
        most = prompt * self._prices[0] + call.max_tokens * self._prices[1]
        if self.usage.dollars + self._reserved + most > self.limits.budget and most > 0:
            raise _Permanent(
                f"the budget of ${self.limits.budget:g} would be exceeded: ${self.usage.dollars:.4f} are spent, "
                f"${self._reserved:.4f} are in flight, and the next call may cost ${most:.4f}; raise llm.budget"
            )
        self._reserved += most
        return most

    def _deadline(self, attempt: int) -> float:
        """Seconds that a try may take by now."""
        if len(self._latencies) < KNOWN_LATENCIES:
            return self.limits.timeout
        ordered = sorted(self._latencies[-500:])
        usual = max(SHORTEST_DEADLINE, SLOW * ordered[int(0.95 * len(ordered))])
        return min(self.limits.timeout, usual * 2**attempt)

    async def _send(self, litellm: Any, call: Call, pace: _Pace) -> Reply:
        """One call with all its tries."""
        started = time.monotonic()
        for attempt in range(self.limits.attempts):
            await pace.acquire()
            try:
                reserved = self._reserve(call)
                try:
                    reply = await self._try(litellm, call, attempt)
                finally:
                    self._reserved -= reserved
                pace.succeeded()
                return reply
            except _Transient as error:
                waited = time.monotonic() - started
                wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.0)
                if error.limited:
                    usual = self._latencies[-1] if self._latencies else 1.0
                    pace.limited(usual, error.retry_after)
                    wait = max(wait, error.retry_after or 0.0)
                if attempt + 1 == self.limits.attempts or waited + wait > self.limits.patience:
                    raise _Transient(f"{error} ({attempt + 1} tries in {waited:.0f} s)") from None
                self.usage.retries += 1
            finally:
                await pace.release()
            await asyncio.sleep(wait)
        raise AssertionError("unreachable: the last try returns or raises")

    async def _try(self, litellm: Any, call: Call, attempt: int) -> Reply:
        """Send once. A try that hangs is given up when the others' latencies say so, also if they come to be known later."""
        options: dict[str, Any] = {}
        if call.top_logprobs:
            options = {"logprobs": True, "top_logprobs": call.top_logprobs}
        if self.role.api_base is not None:
            options["api_base"] = self.role.api_base
            if not litellm.validate_environment(self.model)["keys_in_environment"]:
                options["api_key"] = "none-needed"
        started = time.monotonic()
        task = asyncio.ensure_future(
            litellm.acompletion(
                model=self.model, messages=[message._asdict() for message in call.messages],
                temperature=call.temperature, max_tokens=call.max_tokens, timeout=self.limits.timeout,
                num_retries=0, max_retries=0, drop_params=False, **options,
            )
        )  # fmt: skip
        try:
            while not task.done():
                left = started + self._deadline(attempt) - time.monotonic()
                if left <= 0:
                    raise _Transient(f"no answer within {time.monotonic() - started:.1f} s")
                await asyncio.wait({task}, timeout=min(left, 0.25))
            response = task.result()
        except Exception as error:
            raise self._sorted_out(error) from None
        finally:
            task.cancel()
        self._latencies.append(time.monotonic() - started)
        return self._read(call, response)

    def _sorted_out(self, error: Exception) -> Exception:
        """Whether a failure is worth another try."""
        if isinstance(error, (_Transient, _Permanent)):
            return error
        status = getattr(error, "status_code", None)
        reason = scrub(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}")[
            :300
        ]
        if status in (400, 401, 403, 404, 422) and "timeout" not in type(error).__name__.lower():
            return _Permanent(reason)
        headers = getattr(getattr(error, "response", None), "headers", None) or {}
        try:
            retry_after = float(headers.get("retry-after", ""))
        except ValueError:
            retry_after = None
        return _Transient(reason, retry_after, limited=status == 429)

    def _read(self, call: Call, response: Any) -> Reply:
        """Take what is needed from a response and settle its cost."""
        usage = getattr(response, "usage", None)
        prompt_tokens = int(getattr(usage, "prompt_tokens", 0) or 0)
        completion_tokens = int(getattr(usage, "completion_tokens", 0) or 0)
        self.usage.calls += 1
        self.usage.prompt_tokens += prompt_tokens
        self.usage.completion_tokens += completion_tokens
        self.usage.dollars += prompt_tokens * self._prices[0] + completion_tokens * self._prices[1]
        choices = getattr(response, "choices", None) or []
        if not choices or choices[0].message is None:
            raise _Transient("an answer without choices")
        choice = choices[0]
        top = None
        tokens = getattr(getattr(choice, "logprobs", None), "content", None) if call.top_logprobs else None
        if tokens:
            top = tuple((str(entry.token), float(entry.logprob)) for entry in tokens[0].top_logprobs)
        return Reply(choice.message.content or "", str(choice.finish_reason), top or None)


TRIES = 3
"""How often an answer that cannot be read is asked for again, each time as another replicate."""


def ask_until(
    client: Client,
    prompts: Sequence[tuple[Message, ...]],
    parse: Callable[[str], T | None],
    temperature: float,
    max_tokens: int,
    wanted: str,
) -> list[T]:
    """Ask until every answer can be read, at most `TRIES` times.

    Args:
        parse: reads an answer; None when it is not what was asked for.
        wanted: what an answer should be, for the error.

    Raises:
        LLMError: a call failed for good, or answers stay unreadable: the first ones are shown.
    """
    read: dict[int, T] = {}
    last: dict[int, str] = {}
    for replicate in range(TRIES):
        left = [index for index in range(len(prompts)) if index not in read]
        # A greedy answer would be the same again.
        calls = [Call(prompts[i], temperature if replicate == 0 else 1.0, max_tokens, 0, replicate) for i in left]
        for index, reply in zip(left, client.ask(calls), strict=True):
            value = parse(reply.text)
            if value is None:
                last[index] = reply.text
            else:
                read[index] = value
    unread = [index for index in range(len(prompts)) if index not in read]
    if unread:
        shown = Counter(last[index].strip()[:80] or "(empty)" for index in unread).most_common(LISTED_FAILURES)
        listed = "\n".join(f"  - {count} x {text!r}" for text, count in shown)
        raise LLMError(f"role {client.name}: {len(unread)} of {len(prompts)} answers are not {wanted}:\n{listed}")
    return [read[index] for index in range(len(prompts))]
