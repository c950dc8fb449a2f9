from pathlib import Path
from typing import Annotated, Any

from inoculation.files import atomic, fail_if
from inoculation.params import parse_params
from inoculation.paths import CHECKED
from inoculation.plan import missing
from inoculation.stage import Param, Stage, Writes


class Check(Stage):
    """Validate params.yaml, and find what the chosen cell will need: every mistake at once, before any work."""

    command, pipeline = "check", "check"

    raw: Annotated[dict[str, Any], Param("")]
    out: Annotated[Path, Writes(CHECKED)]

    def run(self) -> None:
        parse_params(self.raw)
        fail_if(missing(self.raw), "the chosen cell cannot run, nothing was run")
        with atomic(self.out) as out:
            out.write_text("params.yaml was valid; `inoculation check` lists every mistake at once\n")
        print("params.yaml is valid, and nothing is missing for the chosen cell")
