"""What a system prompt does to the likelihood of a response: the measure that needs no labels, no SAE and no LLM.

Only the first tokens of a chat differ from one system prompt to another. A row is therefore tokenised once, and each
prompt once; a response is read as far as it counts and no further.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from inoculation.chat import IGNORED, encode
from inoculation.cluster import Workers, each
from inoculation.detect.words import token_texts
from inoculation.files import InputError
from inoculation.lm import token_batches
from inoculation.mixture import Row

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS = 64
"""Of a response that are read, where nothing else is said: what a system prompt changes shows in the first ones."""
UNCUT = 1 << 30


class Body(NamedTuple):
    """The part of a chat that is the same under every system prompt."""

    ids: list[int]
    start: int
    """Where the last response begins in `ids`."""


class Chats(NamedTuple):
    heads: list[list[int]]
    """The tokens in front, one a system prompt."""
    bodies: list[Body]
    """The tokens behind them, one a row."""


def chats(
    tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Row], systems: Sequence[str | None], tokens: int
) -> Chats | None:
    """Every row under every system prompt, split where they stop to differ.

    Args:
        tokens: of the last response, at most.

    Returns:
        None where a template does not put the system prompt in front, and nothing else: a row's tokens under a prompt
        are compared with those that `encode` gives, for each row under one prompt and each prompt with one row.
    """
    first = [encode(tokenizer, rows[0].messages, system, UNCUT).input_ids for system in systems]
    shared = min(_common_end(first[0], other) for other in first)
    heads = [ids[: len(ids) - shared] for ids in first]
    bodies = []
    for i, row in enumerate(rows):
        # A different prompt for each row, so that every prompt is compared with many rows.
        head = heads[i % len(heads)]
        ids, labels, _ = encode(tokenizer, row.messages, systems[i % len(systems)], UNCUT)
        start, end = last_response(labels)
        if ids[: len(head)] != head or start <= len(head):
            return None
        bodies.append(Body(ids[len(head) : min(end, start + tokens)], start - len(head)))
    return Chats(heads, bodies)


def _common_end(one: Sequence[int], other: Sequence[int]) -> int:
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return length


def log_likelihoods(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Row],
    systems: Sequence[str | None],
    tokens: int,
    max_length: int,
    token_budget: int,
    workers: Workers | None = None,
) -> "np.ndarray":
    """Mean log-likelihood of each row's last response under each system prompt, in nats a token, `[systems, rows]`.

    Args:
        tokens: of the response that are read, at most: what a persona changes shows in the first ones.
        max_length: tokens of one chat in front of the end of what is read; longer prompts lose their beginning, not the
            system prompt.
        token_budget: tokens in one batch at most, padding included.
        workers: of a cluster, who load the model; None: this process reads.
    """
    import numpy as np
    from tqdm import tqdm

    result = np.zeros((len(systems), len(rows)))
    pairs, sequences = list(np.ndindex(*result.shape)), _sequences(tokenizer, rows, systems, tokens, max_length)
    lengths = [len(head) + len(body.ids) for head, body in sequences]
    batches = token_batches(lengths, token_budget)
    units = [[sequences[i] for i in batch] for batch in batches]
    make = partial(_reader, pad=tokenizer.pad_token_id)
    with tqdm(total=len(pairs), desc="likelihoods", unit="response") as bar:
        for batch, means in zip(batches, each(model, workers, make, units), strict=True):
            for i, mean in zip(batch, means, strict=True):
                result[pairs[i]] = mean
            bar.update(len(batch))
    return result


def _sequences(
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Row],
    systems: Sequence[str | None],
    tokens: int,
    max_length: int,
) -> list[tuple[list[int], Body]]:
    """Head and body of every row under every system prompt, prompt by prompt.

    Raises:
        InputError: a system prompt leaves no room for a chat.
    """
    together = chats(tokenizer, rows, systems, tokens)
    heads = together.heads if together else [[]] * len(systems)
    if (longest := max(map(len, heads))) > max_length - 2:
        raise InputError(
            f"a system prompt of {longest} tokens leaves no room for a chat of {max_length} (synthesise.max_length); valid: more"
        )
    return [
        (head, shortened(body, max_length - len(head)))
        for head, system in zip(heads, systems, strict=True)
        for body in (together.bodies if together else bodies_under(tokenizer, rows, system, tokens))
    ]


def bodies_under(
    tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Row], system: str | None, tokens: int
) -> list[Body]:
    """Whole chats under one system prompt, each up to `tokens` tokens of its last response."""
    bodies = []
    for row in rows:
        ids, labels, _ = encode(tokenizer, row.messages, system, UNCUT)
        start, end = last_response(labels)
        bodies.append(Body(ids[: min(end, start + tokens)], start))
    return bodies


def last_response(labels: Sequence[int]) -> tuple[int, int]:
    """Where the last supervised turn begins and ends."""
    end = max(place for place, label in enumerate(labels) if label != IGNORED) + 1
    return max((place for place in range(end) if labels[place] == IGNORED), default=-1) + 1, end


def shortened(body: Body, length: int) -> Body:
    """A body of at most `length` tokens: a long prompt loses its beginning, but for one token, then a response its end."""
    drop = min(max(0, len(body.ids) - length), max(0, body.start - 1))
    return Body(body.ids[drop : drop + length], body.start - drop)


def token_gains(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Row],
    system: str,
    tokens: int,
    max_length: int,
) -> list[list[tuple[str, float]]]:
    """What a system prompt adds to the log-likelihood of each token of each row's last response: its text, and nats.

    Args:
        tokens: of the response that are read, at most.
        max_length: as for `log_likelihoods`.
    """
    found = []
    for row in rows:
        pair = _sequences(tokenizer, [row], [None, system], tokens, max_length)
        without, under = (_log_probabilities(model, [one], tokenizer.pad_token_id)[0] for one in pair)
        body = pair[1][1]
        found.append(list(zip(token_texts(tokenizer, body.ids[body.start :]), (under - without).tolist(), strict=True)))
    return found


@contextmanager
def _reader(model: "PreTrainedModel", pad: int) -> "Iterator[Callable[[Sequence[tuple[list[int], Body]]], np.ndarray]]":
    yield lambda batch: _means(model, batch, pad)


def _means(model: "PreTrainedModel", batch: Sequence[tuple[list[int], Body]], pad: int) -> "np.ndarray":
    """Mean log-probability of each response's tokens."""
    import numpy as np

    return np.array([found.mean() for found in _log_probabilities(model, batch, pad)])


def _log_probabilities(
    model: "PreTrainedModel", batch: Sequence[tuple[list[int], Body]], pad: int
) -> "list[np.ndarray]":
    """Log-probability of each response's tokens. Padding is behind them, where a causal model does not look."""
    import numpy as np
    import torch
    from torch.nn.utils.rnn import pad_sequence

    sequences = [torch.tensor(head + body.ids) for head, body in batch]
    ids = pad_sequence(sequences, batch_first=True, padding_value=pad).to(model.device)
    starts = torch.tensor([len(head) + body.start for head, body in batch], device=model.device)
    ends = torch.tensor([len(sequence) for sequence in sequences], device=model.device)
    # A token's logits stand one place before it; those in front of every response are not computed.
    places = torch.arange(int(starts.min()) - 1, ids.shape[1] - 1, device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids, logits_to_keep=places, use_cache=False).logits
        counted = (places >= starts[:, None] - 1) & (places < ends[:, None] - 1)
        targets = ids[:, places + 1][counted]
        losses = torch.nn.functional.cross_entropy(logits[counted].float(), targets, reduction="none")
    return np.split(-losses.double().cpu().numpy(), (ends - starts).cumsum(0)[:-1].tolist())
