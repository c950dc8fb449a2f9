"""One LLM client over LiteLLM for every role (judge, rewriter, auditor, explainer, classifier, synthesiser).

    results = client.read(calls, parse)                      # T | Failure a call; usable answers are on disk
    aside = set_aside(results, "auditor", limits.failures)   # what failed, with its reason; too many: LLMError

What fails comes in two kinds. A wrong key, an unknown model or a spent budget dooms every call: `LLMError` at once. A call
that fails alone (a content filter, tries used up, an answer that stays unreadable) is a `Failure`, a value, and
`set_aside` decides what the stage makes of them. Only usable answers are kept on disk, as they arrive: running again sends
what failed and what was in flight, nothing else. What a call costs is reserved before it is sent, so that a budget is never
exceeded. LiteLLM is imported when something must be sent.
"""

import asyncio
import hashlib
import json
import os
import random
import sqlite3
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from inoculation.chat import Message
from inoculation.files import InputError, printable, scrub

if TYPE_CHECKING:
    from tqdm import tqdm

    from inoculation.roles import Limits, Role

T = TypeVar("T")

KEY = "LLM_API_KEY"
"""Variable of the environment with the key of servers that roles name by `api_base`; the providers' own keys are not sent there."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds of back-off before the second try, doubled for each further one, and at most."""
KNOWN_LATENCIES = 20
"""Answers after which their latencies set the deadline of a try."""
SLOW = 5.0
"""A try is given up after this many times the 95th percentile of the latencies, doubled with each try."""
SHORTEST_DEADLINE = 1.0
GROWTH = 0.1
"""Slots more for each answer: a tenth of the slots a round trip, so that a limit is tested gently."""
TRIES = 3
"""Answers asked of one call until one is usable, each as another replicate."""
HOPELESS = 20
"""Calls that fail one after the other before a client gives up, once more of them failed than may be set aside."""
LISTED_REASONS = 5


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


@dataclass(frozen=True)
class Failure:
    """A call without a usable answer, and why. Never data: `set_aside` says what becomes of it."""

    reason: str


class SetAside(NamedTuple):
    """A row that a role could not do."""

    index: int
    reason: str


@dataclass
class Usage:
    """What a client has used. Dollars and tokens are those of calls that were sent."""

    calls: int = 0
    cache_hits: int = 0
    retries: int = 0
    failures: int = 0
    """Calls without a usable answer."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    dollars: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.calls} calls, {self.cache_hits} answers from the cache, {self.retries} retries, "
            f"{self.failures} failures, {self.prompt_tokens:,} + {self.completion_tokens:,} tokens, ${self.dollars:.4f}"
        )


class LLMError(InputError):
    """No call can succeed, or too many failed. Usable answers are kept: running again continues."""


class Unusable(Exception):
    """An answer is not what was asked for; the text says why. Raised by a `parse` of `Client.read`."""


class _Rejected(Exception):
    """One call's failure that trying again cannot mend."""


class _Transient(Exception):
    """A failure worth another try."""

    def __init__(self, reason: str, retry_after: float | None = None, limited: bool = False) -> None:
        super().__init__(reason)
        self.retry_after, self.limited = retry_after, limited


def set_aside(results: Sequence[object], role: str, share: float) -> list[SetAside]:
    """The failures among a role's results, counted and printed in one line; silent when there are none.

    Args:
        results: one a row; what is no `Failure` is a result.
        role: for messages.
        share: of the rows, 0..1 (`llm.failures`). Of fewer than 1 / share rows, none may fail.

    Raises:
        LLMError: a greater share failed; the most common reasons are listed.
    """
    aside = [SetAside(index, result.reason) for index, result in enumerate(results) if isinstance(result, Failure)]
    if not aside:
        return []
    counted = f"role {role}: {len(aside)} of {len(results)} failed ({len(aside) / len(results):.1%})"
    if len(aside) / len(results) > share:
        few = f", of {len(results)} none" if share * len(results) < 1 else ""
        raise LLMError(
            f"{counted}, and at most {share:.1%} may{few} (llm.failures):\n{_listed(row.reason for row in aside)}\n"
            "Usable answers are kept; running again asks for the others only."
        )
    print(f"{counted} and are set aside:\n{_listed(row.reason for row in aside)}")
    return aside


def _listed(reasons: Iterable[str]) -> str:
    """The most common reasons with their counts, one a line."""
    counts = Counter(reasons)
    lines = [f"  - {count} x {reason}" for reason, count in counts.most_common(LISTED_REASONS)]
    if len(counts) > len(lines):
        lines.append(f"  - and {len(counts) - len(lines)} other reasons")
    return "\n".join(lines)


def cache_key(model: str, call: Call) -> str:
    """What makes two calls the same: model, messages, sampling and replicate, and nothing else."""
    parts = [
        model, [list(message) for message in call.messages],
        {"temperature": call.temperature, "max_tokens": call.max_tokens, "top_logprobs": call.top_logprobs}, call.replicate,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


class Cache:
    """Usable replies on disk, one SQLite file for all roles and processes."""

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
                "INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, json.dumps(reply, ensure_ascii=False))
            )  # type: ignore[func-returns-value]


def _litellm() -> Any:
    """LiteLLM, quiet and without telemetry; its price table is the package's (see `inoculation/__init__.py`)."""
    os.environ.setdefault("LITELLM_LOG", "ERROR")
    import litellm

    litellm.suppress_debug_info = True
    litellm.telemetry = False
    return litellm


IMPOSSIBLE = 10**9
"""Tokens of a call: none has so many, and a number of hundreds of digits cannot be made dollars."""


def _most_prompt_tokens(call: Call) -> int:
    """UTF-8 bytes bound the tokens of texts from above."""
    return sum(len(message.content.encode()) + 16 for message in call.messages)


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
    """Asks one role's model. `usage` counts over all that was asked."""

    def __init__(
        self,
        name: str,
        role: "Role",
        limits: "Limits",
        cache: Path,
        record: Callable[[Usage, list[SetAside]], None] = lambda usage, aside: None,
        elsewhere: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """Check that the role can be played, without sending anything.

        Args:
            name: of the role, for messages and progress bars.
            role: model and api_base.
            limits: how calls are made, and prices that LiteLLM does not know.
            cache: file of the replies on disk.
            record: called with `usage` and what was set aside so far after every `ask`, `read` and `set_aside`, also after
                one that fails.
            elsewhere: dollars of the same budget that others have spent or reserved by now.

        Raises:
            InputError: the role names no model, the key is missing from the environment, or the price is unknown.
        """
        if not role.model:
            raise InputError(f"role {name}: an LLM is asked for, and it has no model; name one, e.g. gpt-4.1-mini")
        self.name, self.role, self.limits = name, role, limits
        self.model = role.model
        self.cache = Cache(cache)
        self.record = record
        self._elsewhere = elsewhere
        self.usage = Usage()
        self.aside: list[SetAside] = []
        self._latencies: list[float] = []
        self._reserved = 0.0
        self._asked = 0
        self._prices = self._known_price()
        self._check_key()

    def _known_price(self) -> tuple[float, float]:
        """Dollars a prompt token and a completion token."""
        if self.model in self.limits.prices:
            prompt, completion = self.limits.prices[self.model]
            return prompt / 1e6, completion / 1e6
        try:
            known = _litellm().get_model_info(self.model)
            return float(known["input_cost_per_token"]), float(known["output_cost_per_token"])
        except Exception:
            raise InputError(
                f"role {self.name}: the price of {self.model!r} is unknown; give it in llm.prices, in dollars per "
                "million [prompt, completion] tokens: [0, 0] for a model of your own"
            ) from None

    def _check_key(self) -> None:
        if self.role.api_base is not None:
            return
        missing = _litellm().validate_environment(self.model)["missing_keys"]
        if missing:
            raise InputError(f"role {self.name}: {self.model} needs {' and '.join(missing)} in the environment")

    def set_aside(self, results: Sequence[object]) -> list[SetAside]:
        """The failures among this role's results, one a row; see the function of this name. They are recorded.

        Raises:
            LLMError: more failed than may.
        """
        aside = set_aside(results, self.name, self.limits.failures)
        if aside:
            self.aside += aside
            self.record(self.usage, self.aside)
        return aside

    def ask(self, calls: Sequence[Call]) -> list[Reply | Failure]:
        """Replies in the order of the calls, whatever they say; raises as `read`."""
        return self.read(calls, lambda index, reply: reply, tries=1)

    def read(self, calls: Sequence[Call], parse: Callable[[int, Reply], T], tries: int = TRIES) -> list[T | Failure]:
        """What `parse` makes of the answers, in the order of the calls; identical calls are sent once.

        Args:
            calls: of replicate 0 where `tries` > 1, because further tries are the replicates after it.
            parse: reads the answer to the call of an index; raises `Unusable` when it is not what was asked for.
            tries: answers asked of one call until one is usable.

        Raises:
            LLMError: no call can succeed (key, model, budget), or the last `HOPELESS` failed one after the other and more
                have than may be set aside. Usable answers are kept.
        """
        from tqdm import tqdm

        if not calls:
            return []
        keys = [cache_key(self.model, call) for call in calls]
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        draws = {index: self._draws(calls[index], tries) for index in sorted(first.values())}
        kept = self.cache.get([key for own in draws.values() for key, _ in own])
        results: dict[int, T | Failure] = {}
        for index, own in draws.items():
            for key, _ in own:
                with suppress(Unusable):
                    if key in kept and index not in results:
                        results[index] = parse(index, kept[key])
        self._asked += len(draws)
        self.usage.cache_hits += len(results)
        missing = {index: own for index, own in draws.items() if index not in results}
        try:
            if missing:
                with (
                    tqdm(total=len(draws), initial=len(results), desc=self.name, unit="call") as bar,
                    self.cache.writer() as keep,
                ):
                    results |= asyncio.run(self._read_all(missing, parse, keep, bar))
        finally:
            self.record(self.usage, self.aside)
        return [results[first[key]] for key in keys]

    def _draws(self, call: Call, tries: int) -> list[tuple[str, Call]]:
        """The call and its further tries, with their keys. They are sampled: a greedy answer would be the same again."""
        further = (call._replace(temperature=1.0, replicate=call.replicate + more) for more in range(1, tries))
        return [(cache_key(self.model, draw), draw) for draw in (call, *further)]

    async def _read_all(
        self,
        missing: dict[int, list[tuple[str, Call]]],
        parse: Callable[[int, Reply], T],
        keep: Callable[[str, Reply], None],
        bar: "tqdm[Any]",
    ) -> dict[int, T | Failure]:
        litellm = _litellm()
        pace = _Pace(self.limits.concurrency)
        results: dict[int, T | Failure] = {}
        in_a_row: list[str] = []
        doom: list[LLMError] = []
        queue = iter(missing.items())

        async def read_one(index: int, draws: list[tuple[str, Call]]) -> T | Failure:
            reason = ""
            for key, call in draws:
                reply = await self._send(litellm, call, pace)
                if isinstance(reply, Failure):
                    return reply
                try:
                    value = parse(index, reply)
                except Unusable as error:
                    reason = str(error)
                else:
                    keep(key, reply)
                    return value
            return Failure(reason)

        async def work() -> None:
            for index, draws in queue:
                if doom:
                    return
                try:
                    result = results[index] = await read_one(index, draws)
                except LLMError as error:
                    doom.append(error)
                    return
                if isinstance(result, Failure):
                    self.usage.failures += 1
                    in_a_row.append(result.reason)
                    # A rerun asks for nothing but what failed before: only more than the share may end it.
                    if len(in_a_row) >= HOPELESS and self.usage.failures > self.limits.failures * self._asked:
                        doom.append(self._doomed(f"{len(in_a_row)} calls failed in a row:\n{_listed(in_a_row)}"))
                else:
                    in_a_row.clear()
                bar.set_postfix_str(f"${self.usage.dollars:.2f}", refresh=False)
                bar.update()

        # Twice as many as may be in flight, because some wait between two tries.
        await asyncio.gather(*(work() for _ in range(min(2 * self.limits.concurrency, len(missing)))))
        if doom:
            raise doom[0]
        return results

    def _doomed(self, reason: str) -> LLMError:
        return LLMError(f"role {self.name}: {self.model}: {reason}\nUsable answers are kept; run again to continue.")

    @property
    def committed(self) -> float:
        """Dollars that were spent, or may be by what is in flight."""
        return self.usage.dollars + self._reserved

    def _reserve(self, call: Call) -> float:
        """Set aside the most the call may cost, in dollars."""
        most = _most_prompt_tokens(call) * self._prices[0] + call.max_tokens * self._prices[1]
        others = self._elsewhere()
        if self.committed + others + most > self.limits.budget and most > 0:
            raise self._doomed(
                f"the budget of ${self.limits.budget:g} would be exceeded: ${self.usage.dollars:.4f} are spent, "
                f"${self._reserved:.4f} are in flight, "
                + (f"the stage's other roles took ${others:.4f}, " if others else "")
                + f"and the next call may cost ${most:.4f}; raise llm.budget"
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

    async def _send(self, litellm: Any, call: Call, pace: _Pace) -> Reply | Failure:
        """One call with all its tries. An `LLMError` says that no other call can succeed either."""
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
            except _Rejected as error:
                return Failure(str(error))
            except _Transient as error:
                waited = time.monotonic() - started
                wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.0)
                if error.limited:
                    usual = self._latencies[-1] if self._latencies else 1.0
                    pace.limited(usual, error.retry_after)
                    wait = max(wait, error.retry_after or 0.0)
                if attempt + 1 == self.limits.attempts or waited + wait > self.limits.patience:
                    return Failure(f"{error} ({attempt + 1} tries)")
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
            options["api_key"] = os.environ.get(KEY) or "none-needed"
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
        """What a failure means: for every call (`LLMError`), for this one (`_Rejected`), or for this try (`_Transient`)."""
        if isinstance(error, _Transient):
            return error
        status = int(getattr(error, "status_code", None) or 0)
        first = next(iter(str(error).strip().splitlines()), "")
        reason = printable(scrub(f"{type(error).__name__}: {first}"))[:300]
        if status in (401, 403, 404):
            return self._doomed(reason)
        if 400 <= status < 500 and status not in (408, 409, 425, 429):
            return _Rejected(reason)
        headers = getattr(getattr(error, "response", None), "headers", None) or {}
        try:
            retry_after = float(headers.get("retry-after", ""))
        except ValueError:
            retry_after = None
        return _Transient(reason, retry_after, limited=status == 429)

    @staticmethod
    def _tokens(call: Call, response: Any) -> tuple[int, int]:
        """Prompt and completion tokens of a response; where it says none or what cannot be, the most that they may be."""
        usage = getattr(response, "usage", None)
        told = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
        prompt, completion = (value if isinstance(value, int) and value < IMPOSSIBLE else -1 for value in told)
        return prompt if prompt > 0 else _most_prompt_tokens(call), completion if completion >= 0 else call.max_tokens

    def _read(self, call: Call, response: Any) -> Reply:
        """Take what is needed from a response and settle its cost. What it says can be kept, and holds no key of ours."""
        prompt_tokens, completion_tokens = self._tokens(call, response)
        self.usage.calls += 1
        self.usage.prompt_tokens += prompt_tokens
        self.usage.completion_tokens += completion_tokens
        self.usage.dollars += prompt_tokens * self._prices[0] + completion_tokens * self._prices[1]
        choices = getattr(response, "choices", None) or []
        if not choices or choices[0].message is None:
            raise _Transient("an answer without choices")
        choice = choices[0]
        if choice.finish_reason == "content_filter":
            raise _Rejected("the answer was withheld by the provider's content filter")
        top = None
        tokens = getattr(getattr(choice, "logprobs", None), "content", None) if call.top_logprobs else None
        if tokens:
            told = ((_kept(entry.token), float(entry.logprob)) for entry in tokens[0].top_logprobs)
            top = tuple((token, logprob) for token, logprob in told if logprob <= 0)  # no probability is above 1
        return Reply(_kept(choice.message.content or ""), _kept(choice.finish_reason), top or None)


def _kept(text: object) -> str:
    """What a provider says, as it can be written: a key that it echoes is struck out, half of a character is a question mark."""
    return scrub(str(text)).encode("utf-8", "replace").decode()


def ask_until(
    client: Client,
    prompts: Sequence[tuple[Message, ...]],
    parse: Callable[[str], T | None],
    temperature: float,
    max_tokens: int,
    wanted: str,
) -> list[T | Failure]:
    """What is read from the answers' texts, each asked for at most `TRIES` times; raises as `Client.read`.

    Args:
        parse: reads an answer; None when it is not what was asked for.
        wanted: what an answer should be, for the reason of a failure.
    """

    def read(index: int, reply: Reply) -> T:
        value = parse(reply.text)
        if value is None:
            raise Unusable(f"not {wanted}, {TRIES} times: {reply.text.strip()[:80]!r}")
        return value

    return client.read([Call(prompt, temperature, max_tokens) for prompt in prompts], read)
