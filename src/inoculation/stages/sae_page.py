from pathlib import Path
from typing import Annotated

from inoculation import mixture
from inoculation.detect.sae import page
from inoculation.detect.sae.rank import read_latents
from inoculation.detect.words import read_marked
from inoculation.files import read_json, read_jsonl
from inoculation.paths import ROWS, SAE
from inoculation.stage import Param, Reads, Stage, Writes


class SaePage(Stage):
    """Make a page to read: latents, flagged examples, and why."""

    command, pipeline = "sae-page", "sae"

    annotator: Annotated[str, Param("annotator")]
    mark: Annotated[float, Param("sae.explain.mark")]
    template: Annotated[Path, Reads("src/inoculation/detect/sae/page.html.j2")]
    rows: Annotated[Path, Reads(ROWS)]
    rank: Annotated[Path, Reads(f"{SAE}/rank")]
    explanations: Annotated[Path, Reads(f"{SAE}/explanations.jsonl")]
    classes: Annotated[Path, Reads(f"{SAE}/classes.json")]
    flags: Annotated[Path, Reads(f"{SAE}/flag")]
    detection: Annotated[Path, Reads(f"{SAE}/detection")]
    out: Annotated[Path, Writes(f"{SAE}/page.html")]

    def run(self) -> None:
        detected = read_json(self.detection / "detection.json")
        page.write(
            self.out,
            template=self.template,
            title=f"{self.rows.parent.relative_to('data/mixtures')} (read by {self.annotator})",
            rows=mixture.read_mixture(self.rows),
            latents=read_latents(self.rank),
            explanations=read_jsonl(self.explanations, dict),
            classes=read_json(self.classes)["classes"],
            flags=read_jsonl(self.flags / "flags.jsonl", dict),
            detected=detected["rules"] | {"detection": detected["quality"]},
            prompt=detected["prompt"],
            mark=self.mark,
            pieces=read_marked(self.detection),
        )
