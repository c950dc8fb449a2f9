from pathlib import Path
from typing import Annotated

from inoculation.gguf_model import GgufWeights, convert, verified
from inoculation.paths import CHECKED
from inoculation.stage import Each, Param, Reads, Stage, Writes


class PackagedModel(Stage):
    """Turn the weights that Python packages carry into a model folder."""

    command, pipeline = "packaged-model", "packaged"
    each = Each("name", "${packaged}")

    name: str
    checked: Annotated[Path, Reads(CHECKED)]
    weights: Annotated[GgufWeights, Param("packaged.${key}")]
    out: Annotated[Path, Writes("data/${key}/model")]

    def run(self) -> None:
        convert(verified(self.weights), self.out)
