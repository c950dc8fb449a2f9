from pathlib import Path
from typing import Annotated

from inoculation.paths import CHECKED
from inoculation.persona_vectors import fetch
from inoculation.stage import Param, Reads, Stage, Writes


class PersonaVectorsFetch(Stage):
    """Get the study's data from its public repository, and note the commit."""

    command, pipeline = "persona-vectors-fetch", "persona_vectors"

    checked: Annotated[Path, Reads(CHECKED)]
    repository: Annotated[str, Param("persona_vectors.repository")]
    revision: Annotated[str, Param("persona_vectors.revision")]
    source: Annotated[Path, Writes("data/persona_vectors_source")]

    def run(self) -> None:
        print(f"{self.repository} at {fetch(self.repository, self.revision, self.source)}")
