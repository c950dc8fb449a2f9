from pathlib import Path
from typing import Annotated

from inoculation import groups, mixture
from inoculation.detect.files import read_found
from inoculation.paths import CELLS, ROWS, SAE
from inoculation.stage import Each, Param, Reads, Stage, Writes


class AssignSae(Stage):
    """Give the rows that the annotator's SAE route flagged its prompt (or as many random ones, or the true ones)."""

    command, pipeline = "assign-sae", "assign"
    each = Each("group", tuple(name for name, group in groups.GROUPS.items() if group.detector == "sae"))

    group: str
    seed: Annotated[int, Param("seed")]
    rows: Annotated[Path, Reads(ROWS)]
    detection: Annotated[Path, Reads(f"{SAE}/detection")]
    page: Annotated[Path, Reads(f"{SAE}/page.html")]
    out: Annotated[Path, Writes(f"{CELLS}/assign/${{item}}")]

    def run(self) -> None:
        rows = mixture.read_mixture(self.rows)
        found = read_found(self.detection, len(rows))
        chats = groups.assign(rows, self.group, found.prompt, found.flagged, self.seed)
        groups.write_assignment(
            self.out, self.group, chats, found.prompt, found, hint=f"{self.page} shows what was seen"
        )
