from pathlib import Path
from typing import Annotated

from inoculation.gguf_model import GgufWeights, convert, weights_file
from inoculation.paths import CHECKED
from inoculation.stage import Param, Reads, Stage, Writes


class Smollm2Model(Stage):
    """Turn the weights that a package carries (`make smollm2`) into a model folder."""

    command, pipeline = "smollm2-model", "smollm2"

    checked: Annotated[Path, Reads(CHECKED)]
    weights: Annotated[GgufWeights, Param("smollm2.weights")]
    out: Annotated[Path, Writes("data/smollm2/model")]

    def run(self) -> None:
        convert(weights_file(self.weights), self.out)
