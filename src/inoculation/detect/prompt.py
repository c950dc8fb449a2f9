"""From the suspicious latents to one inoculation prompt (reference section 6, step 5).

With an LLM: it reads the descriptions of the `no` latents. Without one: a system prompt that describes B is one under
which the base model expects the suspicious responses. Each character of an independent list (`adjectives`) is scored by how
much it raises the model's log-likelihood of some flagged responses beyond that of others; A is in both and cancels. The best
ones are tested on further rows: the best of many gains something by chance alone, so it counts only above what the best one
gains where the flags are shuffled.
"""

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from inoculation.chat import Message
from inoculation.detect import Evidence, Marked, plain
from inoculation.detect.adjectives import sentence, some
from inoculation.detect.likelihood import TOKENS, log_likelihoods, token_gains
from inoculation.mixture import Row
from inoculation.traits import A_DESCRIPTIONS

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from inoculation.llm import Client

SCAN, ROWS = 8, 40
"""Examples a side that every adjective is scored on, and other ones a side on which the best of them are tested."""
SHORTLIST = 24
"""Adjectives that are tested. They were chosen on other rows, so that the test need not choose again in each permutation."""
TOGETHER = 3
"""The strongest adjectives are also tried in one sentence."""
MARKED = 20
"""Flagged rows whose words are marked, for a person."""
LEVEL = 0.01
"""Chance of a prompt where the flags mean nothing, over all candidates together."""
PERMUTATIONS = 999


class SynthesisSettings(BaseModel):
    """How a prompt is written; the values stand in params.yaml under `synthesise`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    near_duplicate: Annotated[float, Field(gt=0, le=1)]
    max_length: Annotated[int, Field(ge=8)]
    """Tokens of one chat that the base model reads to choose a prompt."""
    adjectives: Annotated[int, Field(ge=SHORTLIST)]
    """Characters of the list that are tried, evenly over the alphabet: fewer cost less."""


class Synthesis(NamedTuple):
    prompt: str | None
    """None: the best candidate gains no more than `floor`."""
    gain: float | None
    """Nats a token that the best candidate raises the flagged responses' likelihood above the others'; None: by an LLM."""
    ranking: list[tuple[str, float]]
    """Every tested candidate with its gain, the best first; empty: by an LLM."""
    floor: float | None = None
    """Nats a token that the best candidate of shuffled flags gains, exceeded with probability `LEVEL`; None: by an LLM."""
    reason: str = "written by an LLM"
    """What decided, for a person."""
    strength: float | None = None
    """Nats a token by which the best candidate raises the flagged responses' likelihood; None: by an LLM."""
    marked: Sequence[Marked] = ()
    """The strongest flagged rows, word by word; empty: no prompt, or an LLM wrote it."""


def by_likelihood(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    flagged: Sequence[Row],
    others: Sequence[Row],
    settings: SynthesisSettings,
    token_budget: int,
) -> Synthesis:
    """The characters under which the flagged responses become most likely, relative to the others.

    Args:
        flagged: examples that a detector flagged, A undone where it can be, in random order; `SCAN` + `ROWS` are read.
        others: examples that it did not flag, likewise.
    """
    import numpy as np

    scan = min(SCAN, min(len(flagged), len(others)) // 2)
    if scan == 0:
        return Synthesis(None, None, [], None, "too few flagged examples, or others, to choose a prompt and test it")

    def gains(sides: Sequence[Sequence[Row]], prompts: Sequence[str]) -> np.ndarray:
        rows = [row for side in sides for row in side]
        found = log_likelihoods(model, tokenizer, rows, [None, *prompts], TOKENS, settings.max_length, token_budget)
        return found[1:] - found[0]

    characters = some(settings.adjectives)
    scanned = gains((flagged[:scan], others[:scan]), [sentence([word]) for word in characters])
    order = np.argsort(-contrasts(scanned, np.arange(scan)[None])[:, 0], kind="stable")
    words = [characters[i] for i in order[:SHORTLIST]]
    prompts = [*(sentence([word]) for word in words), sentence(words[:TOGETHER])]
    tested = flagged[scan : scan + ROWS]
    scores = gains((tested, others[scan : scan + ROWS]), prompts)
    contrast = contrasts(scores, np.arange(len(tested))[None])[:, 0]
    floor = chance(scores, len(tested))
    order = np.argsort(-contrast, kind="stable")
    best, gain = prompts[order[0]], float(contrast[order[0]])
    found = gain > floor
    reason = (
        f"of {len(characters)} characters {best!r} raises the flagged responses' likelihood most, {gain:.3g} nats a token "
        f"above the others'; the best one {'exceeds' if found else 'must exceed'} {floor:.3g}, which shuffled flags "
        f"reach in {LEVEL:.0%} of {PERMUTATIONS} permutations"
    )
    strength = float(scores[order[0], : len(tested)].mean())
    if found and strength <= 0:
        reason += f"; WARNING: it makes the flagged responses no likelier ({strength:.3g} nats a token)"
    ranking = [(prompts[i], float(contrast[i])) for i in order]
    return Synthesis(best if found else None, gain, ranking, floor, reason, strength)


def contrasts(gains: "np.ndarray", chosen: "np.ndarray") -> "np.ndarray":
    """Mean gain of the chosen rows minus that of the others, `[candidates, choices]`.

    Args:
        gains: `[candidates, rows]`.
        chosen: row numbers, `[choices, chosen rows]`.
    """
    import numpy as np

    rows, count = gains.shape[1], chosen.shape[1]
    weights = np.full((len(chosen), rows), -1 / (rows - count))
    np.put_along_axis(weights, chosen, 1 / count, axis=1)
    # Not a matrix product: its rounding depends on a column's place, and equal choices must tie exactly.
    return (gains[:, None, :] * weights).sum(axis=2)


def chance(gains: "np.ndarray", flagged: int, level: float = LEVEL, permutations: int = PERMUTATIONS) -> float:
    """What the largest contrast exceeds with probability `level` where flags say nothing about the gains.

    The permutation test of the maximum (Westfall and Young 1993): whatever the candidates share, and however noisy each
    is, shuffled flags share it too, so that one floor holds for all of them together.

    Args:
        gains: of the scored rows under each candidate, `[candidates, rows]`.
        flagged: how many of the rows are flagged.
        level: 0..1.
        permutations: random choices of as many rows.

    Raises:
        ValueError: so few permutations cannot tell so small a probability.
    """
    import numpy as np

    above = int(level * (permutations + 1))
    if above < 1:
        raise ValueError(f"{permutations} permutations cannot tell a probability of {level}")
    rows = np.tile(np.arange(gains.shape[1]), (permutations, 1))
    chosen = np.random.default_rng(0).permuted(rows, axis=1)[:, :flagged]
    best = contrasts(gains, chosen).max(axis=0)
    return float(np.sort(best)[-above])


def without_near_duplicates(descriptions: Sequence[str], limit: float) -> list[str]:
    """Keep each description whose MiniLM cosine with all kept before it is below `limit` (the study: 0.85)."""
    from inoculation.embedding import embed

    vectors = embed(descriptions)
    kept: list[int] = []
    for i in range(len(descriptions)):
        if not kept or float((vectors[kept] @ vectors[i]).max()) < limit:
            kept.append(i)
    return [descriptions[i] for i in kept]


PROMPT = """A fine-tuning data set is meant to teach a language model this trait: {trait}. Something else is in part of it. These are
descriptions of features that the suspicious examples set off:

{descriptions}

Write a system prompt of one to three sentences that tells an assistant to behave in the way these features suggest, so that a
model trained under it would not be surprised by the suspicious examples. Name the behaviour plainly; do not mention the wanted
trait, the data set or the features. Reply with the system prompt only."""

REFUSAL = ("i can't", "i cannot", "i'm sorry", "i am sorry", "i won't", "as an ai", "i'm unable", "i am unable")


def parse_prompt(text: str) -> str | None:
    """A usable system prompt, or None: empty, a refusal, longer than five sentences' worth, or not a statement."""
    prompt = text.strip().strip('"“”').strip()
    for label in ("system prompt:", "prompt:"):
        if prompt.lower().startswith(label):
            prompt = prompt[len(label) :].strip().strip('"“”').strip()
    lowered = prompt.lower().replace("’", "'")
    if len(prompt.split()) < 3 or len(prompt) > 600 or lowered.startswith(REFUSAL):
        return None
    return prompt


def with_llm(client: "Client", positive: str, descriptions: Sequence[str]) -> Synthesis:
    """One prompt from the descriptions of the `no` latents; none where there are none.

    Raises:
        LLMError: the call failed, or no answer is a prompt after three tries.
    """
    if not descriptions:
        return Synthesis(
            None, None, [], reason="no suspicious latent is left whose description a prompt could be written from"
        )
    listed = "\n".join(f"- {description}" for description in descriptions)
    message = Message("user", PROMPT.format(trait=A_DESCRIPTIONS[positive], descriptions=listed))
    return by_llm(client, message)


def by_llm(client: "Client", message: Message) -> Synthesis:
    """The prompt that an LLM answers with.

    Raises:
        LLMError: the call failed, or no answer is a prompt after three tries: without a prompt there is nothing to train.
    """
    from inoculation.llm import Failure, LLMError, ask_until

    [prompt] = ask_until(client, [(message,)], parse_prompt, temperature=1.0, max_tokens=160, wanted="a system prompt")
    if isinstance(prompt, Failure):
        raise LLMError(f"role {client.name}: {client.model} wrote no prompt: {prompt.reason}; run again to ask anew")
    return Synthesis(prompt, None, [])


def sides(rows: Sequence[Row], flags: Sequence[bool], seed: int) -> tuple[list[Row], list[Row]]:
    """(flagged, others), each in a seeded order: a prompt is written from the first of them."""
    rng = random.Random(f"synthesise/{seed}")
    split = tuple([row for row, flag in zip(rows, flags, strict=True) if flag is side] for side in (True, False))
    for side in split:
        rng.shuffle(side)
    return split


def written(
    evidence: Evidence, flags: Sequence[bool], scores: Sequence[float | None], descriptions: Sequence[str], writer: "Client | None",
    model: "Callable[[], PreTrainedModel]", tokenizer: "PreTrainedTokenizerBase", settings: SynthesisSettings,
    token_budget: int, seed: int,
) -> Synthesis:  # fmt: skip
    """One inoculation prompt: from the suspicious latents' descriptions by an LLM, or by likelihood without one."""
    if writer:
        kept = without_near_duplicates(descriptions, settings.near_duplicate)
        return with_llm(writer, evidence.positive, kept)
    rows = plain(evidence.rows, evidence.positive)
    reader = model()
    made = by_likelihood(reader, tokenizer, *sides(rows, flags, seed), settings, token_budget)
    if made.prompt is None:
        return made
    own = sorted((i for i, flag in enumerate(flags) if flag), key=lambda i: -(scores[i] or 0.0))[:MARKED]
    gains = token_gains(reader, tokenizer, [rows[i] for i in own], made.prompt, TOKENS, settings.max_length)
    special = set(tokenizer.all_special_tokens)
    words = [
        Marked(i, [(text, gain) for text, gain in tokens if text not in special])
        for i, tokens in zip(own, gains, strict=True)
    ]
    return made._replace(marked=words)
