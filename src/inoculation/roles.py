"""Who plays a role (judge, rewriter, auditor, explainer, classifier, synthesiser): a method of this project, or an LLM."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Price = Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=2, max_length=2)]
"""Dollars per million prompt tokens and per million completion tokens."""


def without_password(address: str) -> str:
    """An address that may stand in git, in dvc.lock and in MLflow.

    Raises:
        ValueError: it holds a password, or a token as the user's name.
    """
    if re.search(r"://[^/]*:[^/]*@|^https?://[^/]*@", address):
        raise ValueError(
            "a password or token is in it; keys belong into the environment, git's into its credential helper"
        )
    return address


class Role(BaseModel):
    """Who plays a role."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["local", "llm"]
    """`local`: this project's own method without an LLM, which each role's module describes."""
    model: str | None = None
    """A LiteLLM model, e.g. `gpt-4.1-mini`, or `openai/<name>` with `api_base`."""
    api_base: Annotated[str, AfterValidator(without_password)] | None = None
    """An OpenAI-compatible server of one's own."""

    @model_validator(mode="after")
    def _model_named(self) -> "Role":
        if self.method == "llm" and not self.model:
            raise ValueError("method llm needs a model, e.g. gpt-4.1-mini or openai/<name> with api_base")
        return self


class Roles(BaseModel):
    """Who plays each role but the rewriter, which belongs to the data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    judge: Role
    auditor: Role
    explainer: Role
    classifier: Role
    synthesiser: Role


class Limits(BaseModel):
    """How LLM calls are made, whichever role makes them: nothing here changes an answer."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    concurrency: Annotated[int, Field(ge=1)]
    attempts: Annotated[int, Field(ge=1)]
    timeout: Annotated[float, Field(gt=0)]
    patience: Annotated[float, Field(gt=0)]
    budget: Annotated[float, Field(ge=0)]
    failures: Annotated[float, Field(ge=0, lt=1)]
    tracing: bool
    prices: dict[str, Price] = {}
    """Of models that LiteLLM's table does not know."""
