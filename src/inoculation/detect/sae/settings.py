"""The numbers of the SAE route; their values stand in params.yaml under `sae`."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
FlagRule = Literal["component", "guided", "study"]


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FeatureSettings(Settings):
    """Which tokens are pooled."""

    pool: Literal["all_tokens", "response_tokens"]
    length_match: bool
    max_length: Annotated[int, Field(ge=8)]


class ExplainSettings(Settings):
    """What is shown of a latent."""

    contexts: Count
    corpus: Count
    mark: Annotated[float, Field(gt=0, lt=1)]


class ClassifySettings(Settings):
    """When a latent counts as explained by A, or as ordinary."""

    explained_by_a: Annotated[float, Field(gt=0)]
    neutral: Annotated[float, Field(gt=0)]
    top_share: Annotated[float, Field(gt=0, le=1)]
    both: bool


class FlagSettings(Settings):
    """When an example counts as suspicious; which rule counts is the profile's choice."""

    separation: Annotated[float, Field(ge=0)]
    control_share: Share
    guided_separation: Annotated[float, Field(ge=0)]
    study_top: Count
    study_hits: Count


class SaeSettings(Settings):
    """Everything under `sae`."""

    latents: Annotated[int, Field(ge=2)]
    features: FeatureSettings
    explain: ExplainSettings
    classify: ClassifySettings
    flag: FlagSettings


class SaeTraining(Settings):
    """Size and schedule of an SAE."""

    seed: Annotated[int, Field(ge=0)]
    block: Annotated[int, Field(ge=0)]
    """Whose output it reads."""
    latents: Count
    k: Count
    """Active a token, on average (BatchTopK)."""
    tokens: Count
    """Of the corpora, at most."""
    skip: Annotated[int, Field(ge=0)]
    """First tokens of each text that are left out: attention sinks of real models."""
    standardise: bool
    """Train on standardised dimensions."""
    steps: Count
    batch_size: Count
    """Tokens a step."""
    learning_rate: Annotated[float, Field(gt=0)]
