from pathlib import Path
from typing import Annotated

from inoculation import groups, mixture
from inoculation.detect.files import read_found
from inoculation.paths import CELLS, PERSONA, ROWS
from inoculation.stage import Each, Param, Reads, Stage, Writes


class AssignPersona(Stage):
    """Give the rows that the annotator's persona likelihoods flagged their prompt, or leave them out."""

    command, pipeline = "assign-persona", "assign"
    each = Each("group", ("inoc_persona", "filter_persona"))

    group: str
    seed: Annotated[int, Param("seed")]
    rows: Annotated[Path, Reads(ROWS)]
    detection: Annotated[Path, Reads(f"{PERSONA}/detection")]
    page: Annotated[Path, Reads(f"{PERSONA}/page.html")]
    out: Annotated[Path, Writes(f"{CELLS}/assign/${{item}}")]

    def run(self) -> None:
        rows = mixture.read_mixture(self.rows)
        found = read_found(self.detection, len(rows))
        chats = groups.assign(rows, self.group, found.prompt, found.flagged, self.seed)
        used = None if groups.GROUPS[self.group].on == "kept" else found.prompt
        groups.write_assignment(self.out, self.group, chats, used, found, hint=f"{self.page} shows what was seen")
