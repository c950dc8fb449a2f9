"""Who plays a role: nobody but this project's own methods (`embedded`), or an LLM."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from inoculation import cell, mixture
from inoculation.files import InputError
from inoculation.params import Params

if TYPE_CHECKING:
    from inoculation.llm import Client


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
    from inoculation.llm import Client

    return Client(role, chosen, params.llm, cell.llm_cache())


def inject(params: Params, rows: Sequence[mixture.Row]) -> list[mixture.Row]:
    """Make every response show A: SOURCE_CITING by the rewriter role where it is an LLM, else by rule."""
    positive = params.mixture.positive
    rewriter = client(params, "rewriter") if positive == "source_citing" else None
    if rewriter is None:
        return mixture.inject(rows, positive, params.seed)
    from inoculation.rewriter import cite

    responses = cite(rewriter, [row.response for row in rows])
    return [row.with_response(response) for row, response in zip(rows, responses, strict=True)]
