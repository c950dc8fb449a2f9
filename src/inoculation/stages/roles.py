"""Who plays a role: nobody but this project's own methods (`embedded`), or an LLM."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from inoculation import cell, mixture
from inoculation.files import InputError
from inoculation.params import Params

if TYPE_CHECKING:
    from inoculation.llm import Client

_clients: "list[Client]" = []


def client(params: Params, role: str, required: bool = False) -> "Client | None":
    """The LLM client of a role; None where the role is played without an LLM.

    Args:
        required: the caller needs the LLM, whatever the role's method.

    Raises:
        InputError: the role needs a model, a key or a price that is missing; before any work.
    """
    chosen = getattr(params.world.roles, role)
    if chosen.method == "embedded" and not required:
        return None
    if not chosen.model:
        raise InputError(f"profiles.{params.profile}.roles.{role}.model: name a model, e.g. gpt-4.1-mini")
    from inoculation import tracking
    from inoculation.llm import Client, Usage

    log = tracking.usage_logger(params, role, chosen.model)

    def record(usage: Usage) -> None:
        print(f"{role} ({chosen.model}): {usage}")
        log(asdict(usage))

    # The budget is a stage's, and a stage is a process: what its other roles have spent is gone.
    left = params.llm.budget - sum(other.usage.dollars for other in _clients)
    _clients.append(Client(role, chosen, params.llm.model_copy(update={"budget": left}), cell.llm_cache(), record))
    return _clients[-1]


def inject(params: Params, rows: Sequence[mixture.Row]) -> list[mixture.Row]:
    """Make every response show A: SOURCE_CITING by the rewriter role where it is an LLM, else by rule."""
    positive = params.mixture.positive
    rewriter = client(params, "rewriter") if positive == "source_citing" else None
    if rewriter is None:
        return mixture.inject(rows, positive, params.seed)
    from inoculation.rewriter import cite

    responses = cite(rewriter, [row.response for row in rows])
    return [row.with_response(response) for row, response in zip(rows, responses, strict=True)]
