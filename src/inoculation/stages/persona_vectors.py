from pathlib import Path
from typing import Annotated

from inoculation.persona_vectors import bring, table
from inoculation.stage import Param, Reads, Stage, Writes
from inoculation.traits import NegativeTrait


class PersonaVectors(Stage):
    """Unpack and verify the study's data, or your copy of it."""

    command, pipeline = "persona-vectors", "persona_vectors"

    source: Annotated[Path, Reads("${persona_vectors.source}")]
    negative_traits: Annotated[dict[str, NegativeTrait], Param("negative_traits")]
    data: Annotated[Path, Writes("data/persona_vectors")]

    def run(self) -> None:
        named = {name: (files.folder, files.evaluation) for name, files in self.negative_traits.items()}
        print(table(bring(str(self.source), named, self.data, questions=1)))
