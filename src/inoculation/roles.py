"""Who plays a role (judge, rewriter, auditor, explainer, classifier, synthesiser): a method of this project, or an LLM."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from inoculation.files import InputError

if TYPE_CHECKING:
    from inoculation.llm import Client, SetAside, Usage

Price = Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=2, max_length=2)]
"""Dollars per million prompt tokens and per million completion tokens."""


class Role(BaseModel):
    """Who plays a role."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["local", "llm"]
    """`local`: this project's own method without an LLM, which each role's module describes."""
    model: str | None = None
    """A LiteLLM model, e.g. `gpt-4.1-mini`, or `openai/<name>` with `api_base`."""
    api_base: str | None = None
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


class Clients:
    """The LLM clients of one stage, which share its budget."""

    def __init__(self, limits: Limits, log: "Callable[[str, str], Callable[[dict[str, float], list[dict[str, Any]]], None]]") -> None:
        """Args:
        limits: how calls are made.
        log: (role, model) -> what logs that role's usage so far.
        """
        self.limits, self.log, self.made = limits, log, list["Client"]()

    def get(self, name: str, role: Role) -> "Client | None":
        """The client of a role; None where the role is played without an LLM.

        Raises:
            InputError: a key or a price is missing; nothing was sent.
        """
        return self.require(name, role) if role.method == "llm" else None

    def require(self, name: str, role: Role) -> "Client":
        """The client of a role's model, whatever its method.

        Raises:
            InputError: a model, a key or a price is missing; nothing was sent.
        """
        from dataclasses import asdict

        from inoculation.llm import Client
        from inoculation.store import llm_cache

        if not role.model:
            raise InputError(f"role {name} has no model; name one, e.g. gpt-4.1-mini")
        log = self.log(name, role.model)

        def record(usage: "Usage", aside: "list[SetAside]") -> None:
            print(f"{name} ({role.model}): {usage}")
            log(asdict(usage), [row._asdict() for row in aside])

        # A client's budget is what the stage's others have left of it.
        left = self.limits.budget - sum(other.usage.dollars for other in self.made)
        self.made.append(Client(name, role, self.limits.model_copy(update={"budget": left}), llm_cache(), record))
        return self.made[-1]
