from pathlib import Path
from typing import Annotated

from inoculation import groups, mixture
from inoculation.detect import plain
from inoculation.detect.files import read_found
from inoculation.paths import CELLS, PERSONA, ROWS
from inoculation.stage import Param, Reads, Stage, Writes


class AssignAdapter(Stage):
    """Name the rows that a frozen adapter learns first: those that persona likelihoods flagged, A undone."""

    command, pipeline = "assign-adapter", "assign"

    seed: Annotated[int, Param("seed")]
    positive: Annotated[str, Param("mixture.positive")]
    rows: Annotated[Path, Reads(ROWS)]
    detection: Annotated[Path, Reads(f"{PERSONA}/detection")]
    page: Annotated[Path, Reads(f"{PERSONA}/page.html")]
    out: Annotated[Path, Writes(f"{CELLS}/assign/adapter_persona")]

    def run(self) -> None:
        rows = mixture.read_mixture(self.rows)
        found = read_found(self.detection, len(rows))
        flagged = [row for row, flag in zip(rows, found.flagged, strict=True) if flag and found.prompt]
        groups.write_assignment(
            self.out, "adapter_persona", groups.assign(rows, "adapter_persona", None, None, self.seed), None, found,
            hint=f"{self.page} shows what was seen",
            first=[mixture.TrainingChat.under(None, row) for row in plain(flagged, self.positive)],
        )  # fmt: skip
