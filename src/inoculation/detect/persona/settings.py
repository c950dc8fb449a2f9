"""The numbers of the persona route; their values stand in params.yaml under `persona`."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class PersonaSettings(BaseModel):
    """What is read, and when something counts as found."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sample: Annotated[int, Field(ge=16)]
    """Rows on which the personas are chosen among all adjectives."""
    personas: Annotated[int, Field(ge=4, multiple_of=2)]
    """Adjectives that the rows are read under."""
    read: Annotated[int, Field(ge=100)]
    """Rows that are read under the personas, at most; the others are scored by what the model sees in them."""
    controls: Annotated[int, Field(ge=50)]
    """The model's own answers that are read under them too, at most."""
    separation: Annotated[float, Field(ge=0)]
    """Least Ashman's D between the two groups."""
    control_share: Annotated[float, Field(ge=0, le=1)]
    """How much of the flagged kind the model's own answers hold, over the flagged share, at most."""
