from pathlib import Path
from typing import Annotated

from inoculation import lm
from inoculation.detect.sae.corpora import local_corpora
from inoculation.detect.sae.settings import SaeTraining
from inoculation.detect.sae.training import train_sae
from inoculation.files import write_json
from inoculation.stage import Param, Reads, Stage, Writes
from inoculation.store import unfinished


class Smollm2Sae(Stage):
    """Train an SAE on SmolLM2's residual stream, on the profile's corpora."""

    command, pipeline = "smollm2-sae", "packaged"
    expensive = True

    recipe: Annotated[SaeTraining, Param("smollm2_sae")]
    corpora: Annotated[Path, Reads("${profiles.smollm2.corpora}")]
    model: Annotated[Path, Reads("data/smollm2/model")]
    sae: Annotated[Path, Writes("data/smollm2/sae")]
    quality: Annotated[Path, Writes("data/smollm2/sae.json", "metrics")]

    def run(self) -> None:
        import mlflow

        from inoculation import tracking

        ref = lm.ModelRef(model=str(self.model), dtype="bfloat16" if lm.device() == "cuda" else "float32")
        with unfinished(self.command, self.model, self.corpora, self.recipe.model_dump()) as work:
            quality = train_sae(self.recipe, ref, local_corpora(self.corpora), self.sae, work)
        with tracking.run("smollm2", "SAE"):
            mlflow.log_params(tracking.flatten(self.recipe.model_dump(), "smollm2_sae"))
            mlflow.log_metrics({f"sae/{key}": value for key, value in quality.items()})
        write_json(self.quality, quality)
        print(", ".join(f"{key} {value:.3f}" for key, value in quality.items()))
