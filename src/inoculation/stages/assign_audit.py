from pathlib import Path
from typing import Annotated

from inoculation import groups, mixture
from inoculation.detect.files import read_found
from inoculation.paths import ANNOTATIONS, MIXTURE_KEY, ROWS
from inoculation.stage import Each, Param, Reads, Stage, Writes


class AssignAudit(Stage):
    """Give the rows that the audit flagged its prompt; a stage a profile, because the profile says who audits."""

    command, pipeline = "assign-audit", "assign"
    each = Each("profile", "${profiles}")

    profile: str
    seed: Annotated[int, Param("seed")]
    rows: Annotated[Path, Reads(ROWS)]
    detection: Annotated[Path, Reads(f"{ANNOTATIONS}/audit/${{item.auditor}}")]
    out: Annotated[Path, Writes(f"data/cells/${{key}}/{MIXTURE_KEY}/assign/inoc_llm")]

    def run(self) -> None:
        rows = mixture.read_mixture(self.rows)
        found = read_found(self.detection, len(rows))
        chats = groups.assign(rows, "inoc_llm", found.prompt, found.flagged, self.seed)
        groups.write_assignment(self.out, "inoc_llm", chats, found.prompt, found)
