from pathlib import Path
from typing import Annotated

from pydantic import Field

from inoculation import groups, mixture
from inoculation.detect.files import read_found
from inoculation.detect.persona.read import direction, read_readings
from inoculation.paths import CELLS, PERSONA, ROWS
from inoculation.preventative import Steering
from inoculation.stage import Param, Reads, Stage, Writes


class AssignSteering(Stage):
    """Make the vector that training is steered by: how the rows differ that persona likelihoods flagged."""

    command, pipeline = "assign-steering", "assign"

    seed: Annotated[int, Param("seed")]
    strength: Annotated[float, Field(gt=0), Param("steering.strength")]
    rows: Annotated[Path, Reads(ROWS)]
    readings: Annotated[Path, Reads(f"{PERSONA}/readings.npz")]
    detection: Annotated[Path, Reads(f"{PERSONA}/detection")]
    page: Annotated[Path, Reads(f"{PERSONA}/page.html")]
    out: Annotated[Path, Writes(f"{CELLS}/assign/steer_persona")]

    def run(self) -> None:
        rows = mixture.read_mixture(self.rows)
        found = read_found(self.detection, len(rows))
        steering = None
        if found.prompt:
            read = read_readings(self.readings)
            vector = self.strength * direction(read.states, found.flagged)
            steering = Steering(block=int(read.block), vector=vector.tolist())
        groups.write_assignment(
            self.out, "steer_persona", groups.assign(rows, "steer_persona", None, None, self.seed), None, found,
            hint=f"{self.page} shows what was seen", steering=steering,
        )  # fmt: skip
