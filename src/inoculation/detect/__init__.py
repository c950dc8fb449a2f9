"""Finding an unknown B before any training: detectors, all with one signature.

    detect(Evidence, Annotator, settings) -> Detection

    sae.route.detect    sparse-autoencoder features that A does not explain (reference section 6)
    audit.detect        every example is read, by an LLM or by a statistic on sentence embeddings (section 7)

A detector is a pure function. It never sees provenance; `quality` compares its flags with it afterwards, where it is known.
The stages of pipelines/sae and pipelines/audit run the same steps one by one and keep what each made; benchmarks call
`detect`. A further detector is a module here, a pipeline, and an entry in `groups.GROUPS`.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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


def blind(rows: "Sequence[Row]") -> "list[Row]":
    """The rows without their provenance."""
    return [row._replace(source_dataset=None) for row in rows]
