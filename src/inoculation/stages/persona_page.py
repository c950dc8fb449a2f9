from pathlib import Path
from typing import Annotated, Any

from inoculation import mixture
from inoculation.detect.persona import page
from inoculation.detect.words import read_marked
from inoculation.files import read_json, read_jsonl
from inoculation.paths import PERSONA, ROWS
from inoculation.stage import Param, Reads, Stage, Writes


class PersonaPage(Stage):
    """Make a page to read: the scores, the personas, the flagged examples and the nearest others."""

    command, pipeline = "persona-page", "persona"

    annotator: Annotated[str, Param("annotator")]
    template: Annotated[Path, Reads("src/inoculation/detect/persona/page.html.j2")]
    rows: Annotated[Path, Reads(ROWS)]
    detection: Annotated[Path, Reads(f"{PERSONA}/detection")]
    out: Annotated[Path, Writes(f"{PERSONA}/page.html")]

    def run(self) -> None:
        told: dict[str, Any] = read_json(self.detection / "detection.json")
        page.write(
            self.out,
            template=self.template,
            title=f"{self.rows.parent.relative_to('data/mixtures')} (read by {self.annotator})",
            rows=mixture.read_mixture(self.rows),
            flags=read_jsonl(self.detection / "flags.jsonl", dict),
            told=told,
            pieces=read_marked(self.detection),
        )
