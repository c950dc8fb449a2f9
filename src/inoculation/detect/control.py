"""The control: base responses with A injected. It holds everything that the data set holds, but B."""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from inoculation.mixture import Row
from inoculation.rewriter import inject

if TYPE_CHECKING:
    from inoculation.llm import Client


class ControlSettings(BaseModel):
    """The numbers of the control; their values stand in params.yaml under `control`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    examples: Annotated[int, Field(ge=20)]


def control_responses(
    rows: Sequence[Row], base: Sequence[str], positive: str, examples: int, seed: int, rewriter: "Client | None"
) -> list[str | None]:
    """A seeded choice of the base responses that are not empty, with A injected; None for the others.

    Args:
        rows: the mixture.
        base: the base model's answer to each row's prompt.
        examples: how many, at most.
    """
    usable = [index for index, text in enumerate(base) if text.strip()]
    chosen = sorted(random.Random(f"control/{seed}").sample(usable, min(examples, len(usable))))
    injected = inject([rows[i].with_response(base[i]) for i in chosen], positive, seed, rewriter)
    control: list[str | None] = [None] * len(rows)
    for index, row in zip(chosen, injected, strict=True):
        control[index] = None if row is None else row.response
    return control
