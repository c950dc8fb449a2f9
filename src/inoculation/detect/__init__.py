"""Finding an unknown B before any training: detectors, all with one signature.

    detect(Evidence, Annotator, settings) -> Detection

    persona.route.detect  what character prompts do to the responses' likelihood
    sae.route.detect      sparse-autoencoder features that A does not explain (reference section 6)
    audit.detect          every example is read, by an LLM or by a statistic on sentence embeddings (section 7)

A detector is a pure function. It never sees provenance; `quality` compares its flags with it afterwards, where it is known.
The stages of pipelines/persona, sae and audit run the same steps one by one and keep what each made; benchmarks call
`detect`. A further detector is a module here, a pipeline, and an entry in `groups.GROUPS`.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from inoculation.traits import UNDONE, injector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from inoculation.cluster import Workers
    from inoculation.detect.persona.settings import PersonaSettings
    from inoculation.detect.prompt import SynthesisSettings
    from inoculation.detect.sae.corpora import Corpus
    from inoculation.detect.sae.encoder import LoadedSae
    from inoculation.detect.sae.settings import FlagRule
    from inoculation.llm import Client
    from inoculation.mixture import Row


class Evidence(NamedTuple):
    """All that a detector may see of a mixture."""

    rows: "Sequence[Row]"
    """The mixture, without provenance (`blind`)."""
    base: Sequence[str]
    """The untouched model's answer to each row's prompt; empty for a detector that does not ask for them."""
    control: Sequence[str | None]
    """Some of those answers with A injected, which hold everything but B; None for the others."""
    positive: str
    """The known, wanted trait A."""
    unfit: str | None = None
    """Why the annotator's model cannot judge these rows (`language`); then no detector that asks it finds anything."""


class Annotator(NamedTuple):
    """Whose model a detector asks, and who helps it. A detector says which of the optional parts it needs."""

    model: "Callable[[], PreTrainedModel]"
    """Loads the base model anew: the SAE pass cuts its copy."""
    tokenizer: "PreTrainedTokenizerBase"
    synthesis: "SynthesisSettings"
    """How a prompt is written."""
    client: "Callable[[str], Client | None]"
    """The LLM that plays a role; None where the role is played without one."""
    seed: int
    token_budget: int
    """Tokens in one batch at most, padding included."""
    sae: "LoadedSae | None" = None
    corpora: "Mapping[str, Corpus]" = MappingProxyType({})
    """Reference texts that explain an SAE's latents, by name."""
    flag_rule: "FlagRule" = "component"
    """Which rule of the SAE route counts."""
    persona: "PersonaSettings | None" = None
    """How characters are read, for the SAE route's rule `guided`."""
    workers: "Workers | None" = None
    """Who reads under characters where a cluster is named."""


class Marked(NamedTuple):
    """A flagged row as a detector's model reads it."""

    row: int
    tokens: list[tuple[str, float]]
    """Pieces of its response, A undone where it can be, and by how many nats the prompt makes each likelier."""


class Detection(NamedTuple):
    """What a detector says."""

    found: bool
    """False: it saw nothing suspicious, and nothing is flagged."""
    reason: str
    """Why, for a person."""
    flagged: list[bool]
    scores: list[float | None]
    """One a row, the more suspicious the higher; they mean nothing outside their detector. None: the row was not judged."""
    prompt: str | None
    """The inoculation prompt; None: nothing was found, or no prompt fits (`reason` says which)."""
    marked: Sequence[Marked] = ()
    """The strongest flagged rows, word by word (`prompt.written`); empty: no prompt, or an LLM wrote it."""


MIN_PROMPTS = 200
"""Rows with different prompts: fewer give a statistic too little to tell two groups from one, and conduct from topic. Hundreds
of answers to five questions made findings that were wrong (docs/detector.md)."""


def nothing(evidence: Evidence) -> Detection | None:
    """What a statistical detector says before it looks: nothing found, where the rows cannot be judged; else None."""
    prompts = len({row.prompt for row in evidence.rows})
    few = (
        f"{len(evidence.rows)} rows with {prompts} different prompts are too few for a statistic: at least {MIN_PROMPTS} "
        "different ones are needed"
    )
    reason = evidence.unfit or (few if prompts < MIN_PROMPTS else None)
    none = [False] * len(evidence.rows)
    return Detection(False, reason, none, [None] * len(none), None) if reason else None


def plain(rows: "Sequence[Row]", positive: str) -> "list[Row]":
    """The rows with A undone where it can be: what a model says of a response must not drown in A."""
    undo = UNDONE.get(positive)
    return [row.with_response(undo(row.response)) for row in rows] if undo else list(rows)


def own_answers(rows: "Sequence[Row]", base: Sequence[str], positive: str, seed: int) -> "list[Row]":
    """The rows' prompts with the model's own answers, in the form of `plain`: A undone, or injected by rule where it stays."""
    own = [row.with_response(text) for row, text in zip(rows, base, strict=True)]
    if positive in UNDONE:
        return plain(own, positive)
    rng = random.Random(f"own answers/{seed}")
    return [row.with_response(injector(positive)(row.response, rng)) for row in own]


def blind(rows: "Sequence[Row]") -> "list[Row]":
    """The rows without their provenance."""
    return [row._replace(source_dataset=None) for row in rows]
