from pathlib import Path
from typing import Annotated

from pydantic import Field

from inoculation.paths import CHECKED
from inoculation.roles import Role
from inoculation.source import bring
from inoculation.stage import Each, Param, Reads, Stage, Writes
from inoculation.traits import NegativeTrait


class Source(Stage):
    """Verify a source of trait data and lay it out: answers, questions, rubrics."""

    command, pipeline = "source", "sources"
    each = Each("name", "${sources}")

    name: str
    checked: Annotated[Path, Reads(CHECKED)]
    traits: Annotated[Path, Reads("${item.traits}")]
    rewriter: Annotated[Role, Param("sources.${key}.rewriter")]
    negative_traits: Annotated[dict[str, NegativeTrait], Param("negative_traits")]
    questions: Annotated[int, Field(ge=2), Param("evaluate.questions")]
    out: Annotated[Path, Writes("data/sources/${key}")]

    def run(self) -> None:
        bring(self.traits, self.negative_traits, self.questions, self.rewriter, self.out)
