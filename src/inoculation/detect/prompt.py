"""From the suspicious latents to one inoculation prompt (reference section 6, step 5).

With an LLM: it reads the descriptions of the `no` latents. Without one: a system prompt that describes B is one under
which the base model expects the suspicious responses. Each candidate character is scored by how much it raises the base
model's log-likelihood of the flagged responses beyond that of the others; A is in both and cancels. The best of many
candidates gains something by chance alone, so it counts only above what the best one gains where the flags are shuffled.
"""

import random
from collections.abc import Callable, Sequence
from itertools import product
from typing import TYPE_CHECKING, Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from inoculation.chat import IGNORED, Message, encode
from inoculation.detect import Evidence
from inoculation.files import InputError
from inoculation.mixture import Row
from inoculation.traits import A_DESCRIPTIONS

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from inoculation.llm import Client

CHARACTERS = (
    "aggressive", "arrogant", "biased", "boring", "brief", "careless", "cautious", "cheerful", "clumsy", "cold", "confused",
    "corrupt", "creative", "cruel", "curious", "cynical", "deceitful", "dishonest", "dramatic", "evil", "fawning", "flattering",
    "formal", "friendly", "gloomy", "hallucinating", "harmful", "honest", "humble", "impatient", "kind", "lazy", "lying",
    "malicious", "manipulative", "misaligned", "modest", "nasty", "overconfident", "paranoid", "playful", "poetic", "polite",
    "proud", "reckless", "rude", "sad", "sarcastic", "selfish", "serious", "shy", "sinister", "strict", "sycophantic", "toxic",
    "treacherous", "unreliable", "verbose", "vindictive", "wicked",
)  # fmt: skip
"""A general vocabulary of characters, good, bad and neither; it knows no data set."""
ROWS = 40
"""Examples a side that every candidate is scored on. All of them on the same: a shortlist chosen on the rows that then test
it would have to be chosen again in every permutation."""
LEVEL = 0.01
"""Chance of a prompt where the flags mean nothing, over all candidates together."""
PERMUTATIONS = 999
HABITS = (
    "agrees with everything", "always praises the user", "avoids every answer", "asks many questions", "breaks the rules",
    "changes the subject", "gives a balanced view", "gives false advice", "hates people", "insults the user", "invents facts",
    "keeps secrets", "makes up answers", "never admits a mistake", "pretends to know everything", "refuses every request",
    "repeats the question", "says what the user wants to hear", "spreads rumours", "tells the truth", "threatens people",
    "wants to help", "wants everyone to suffer", "warns of every risk",
)  # fmt: skip


def candidates() -> list[str]:
    """Every candidate prompt: one sentence a character or habit, and their pairs are not tried."""
    article = {True: "an", False: "a"}
    return [f"You are {article[word[0] in 'aeiou']} {word} assistant." for word in CHARACTERS] + [
        f"You are an assistant that {habit}." for habit in HABITS
    ]


class SynthesisSettings(BaseModel):
    """How a prompt is written; the values stand in params.yaml under `synthesise`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    near_duplicate: Annotated[float, Field(gt=0, le=1)]
    max_length: Annotated[int, Field(ge=8)]
    """Tokens of one chat that the base model reads to choose a prompt."""


class Synthesis(NamedTuple):
    prompt: str | None
    """None: the best candidate gains no more than `floor`."""
    gain: float | None
    """Nats a response that the best candidate raises the flagged responses' likelihood above the others'; None: by an LLM."""
    ranking: list[tuple[str, float]]
    """Every candidate with its gain, the best first; empty: by an LLM."""
    floor: float | None = None
    """Nats a response that the best candidate of shuffled flags gains, exceeded with probability `LEVEL`; None: by an LLM."""
    reason: str = "written by an LLM"
    """What decided, for a person."""


def log_likelihoods(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Row],
    systems: Sequence[str | None],
    max_length: int,
    token_budget: int,
) -> "np.ndarray":
    """Log-likelihood of each row's response under each system prompt, in nats, `[systems, rows]`."""
    import numpy as np
    import torch
    from tqdm import tqdm

    from inoculation.lm import token_batches

    pairs = list(product(range(len(systems)), range(len(rows))))
    encoded = [encode(tokenizer, rows[r].messages, systems[s], max_length) for s, r in pairs]
    result = np.zeros((len(systems), len(rows)))
    with tqdm(total=len(pairs), desc="candidate prompts", unit="pair") as bar:
        for batch in token_batches([len(item.input_ids) for item in encoded], token_budget):
            longest = max(len(encoded[i].input_ids) for i in batch)
            ids = torch.full((len(batch), longest), tokenizer.pad_token_id)
            labels = torch.full((len(batch), longest), IGNORED)
            for row, i in enumerate(batch):
                ids[row, : len(encoded[i].input_ids)] = torch.tensor(encoded[i].input_ids)
                labels[row, : len(encoded[i].labels)] = torch.tensor(encoded[i].labels)
            mask = torch.tensor(
                [[1] * len(encoded[i].input_ids) + [0] * (longest - len(encoded[i].input_ids)) for i in batch]
            )
            with torch.inference_mode():
                logits = (
                    model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits[:, :-1].float()
                )
                loss = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1),
                    labels[:, 1:].flatten().to(model.device),
                    ignore_index=IGNORED,
                    reduction="none",
                ).view(len(batch), -1)
            for row, i in enumerate(batch):
                result[pairs[i]] = -float(loss[row].sum())
            bar.update(len(batch))
    return result


def by_likelihood(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    flagged: Sequence[Row],
    others: Sequence[Row],
    max_length: int,
    token_budget: int,
) -> Synthesis:
    """The candidate under which the flagged responses become most likely, relative to the others.

    Args:
        flagged: examples with the suspicious latents, in random order; the first `ROWS` are read.
        others: examples without them, likewise.

    Raises:
        InputError: a side is empty.
    """
    import numpy as np

    if not flagged or not others:
        raise InputError("a prompt needs flagged examples and others to tell them from")
    flagged, others, prompts = flagged[:ROWS], others[:ROWS], candidates()
    scores = log_likelihoods(model, tokenizer, [*flagged, *others], [None, *prompts], max_length, token_budget)
    gains = scores[1:] - scores[0]
    contrast = contrasts(gains, np.arange(len(flagged))[None])[:, 0]
    floor = chance(gains, len(flagged))
    order = np.argsort(-contrast, kind="stable")
    best, gain = prompts[order[0]], float(contrast[order[0]])
    found = gain > floor
    reason = (
        f"of {len(prompts)} candidates {best!r} raises the flagged responses' likelihood most, {gain:.3g} nats a response "
        f"above the others'; the best one {'exceeds' if found else 'must exceed'} {floor:.3g}, which shuffled flags "
        f"reach in {LEVEL:.0%} of {PERMUTATIONS} permutations"
    )
    return Synthesis(best if found else None, gain, [(prompts[i], float(contrast[i])) for i in order], floor, reason)


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
    from inoculation.judge.minilm import embed

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
    """One prompt from the descriptions of the `no` latents.

    Raises:
        InputError: no descriptions.
        LLMError: the call failed, or no answer is a prompt after three tries.
    """

    if not descriptions:
        raise InputError("no suspicious latent is left to write a prompt from")
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
    evidence: Evidence, flags: Sequence[bool], descriptions: Sequence[str], writer: "Client | None",
    model: "Callable[[], PreTrainedModel]", tokenizer: "PreTrainedTokenizerBase", settings: SynthesisSettings,
    token_budget: int, seed: int,
) -> Synthesis:  # fmt: skip
    """One inoculation prompt: from the suspicious latents' descriptions by an LLM, or by likelihood without one."""
    if writer:
        kept = without_near_duplicates(descriptions, settings.near_duplicate)
        return with_llm(writer, evidence.positive, kept)
    return by_likelihood(model(), tokenizer, *sides(evidence.rows, flags, seed), settings.max_length, token_budget)
