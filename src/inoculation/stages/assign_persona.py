from pathlib import Path
from typing import Annotated

from inoculation import groups, mixture
from inoculation.detect.files import read_found
from inoculation.paths import CELLS, PERSONA, ROWS
from inoculation.stage import Param, Reads, Stage, Writes


class AssignPersona(Stage):
    """Give the rows that the annotator's persona likelihoods flagged their prompt."""

    command, pipeline = "assign-persona", "assign"

    seed: Annotated[int, Param("seed")]
    rows: Annotated[Path, Reads(ROWS)]
    detection: Annotated[Path, Reads(f"{PERSONA}/detection")]
    page: Annotated[Path, Reads(f"{PERSONA}/page.html")]
    out: Annotated[Path, Writes(f"{CELLS}/assign/inoc_persona")]

    def run(self) -> None:
        rows = mixture.read_mixture(self.rows)
        found = read_found(self.detection, len(rows))
        chats = groups.assign(rows, "inoc_persona", found.prompt, found.flagged, self.seed)
        groups.write_assignment(
            self.out, "inoc_persona", chats, found.prompt, found, hint=f"{self.page} shows what was seen"
        )
