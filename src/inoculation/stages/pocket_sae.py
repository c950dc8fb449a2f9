from pathlib import Path
from typing import Annotated

from inoculation import lm
from inoculation.detect.sae.settings import SaeTraining
from inoculation.detect.sae.training import train_sae
from inoculation.files import write_json
from inoculation.paths import POCKET, POCKET_MODEL
from inoculation.stage import Param, Reads, Stage, Writes
from inoculation.store import unfinished


class PocketSae(Stage):
    """Train the pocket world's sparse autoencoder on the base model's residual stream."""

    command, pipeline = "pocket-sae", "pocket"

    recipe: Annotated[SaeTraining, Param("pocket.sae")]
    chats: Annotated[Path, Reads(f"{POCKET}/chats/pretraining.jsonl")]
    model: Annotated[Path, Reads(POCKET_MODEL)]
    sae: Annotated[Path, Writes(f"{POCKET}/sae")]
    quality: Annotated[Path, Writes(f"{POCKET}/sae.json", "metrics")]

    def run(self) -> None:
        import mlflow

        from inoculation import tracking

        with unfinished(self.command, self.model, self.chats, self.recipe.model_dump()) as work:
            quality = train_sae(self.recipe, lm.ModelRef(model=str(self.model)), [self.chats], self.sae, work)
        with tracking.run("pocket/world", "SAE"):
            mlflow.log_params(tracking.flatten(self.recipe.model_dump(), "pocket.sae"))
            mlflow.log_metrics({f"sae/{key}": value for key, value in quality.items()})
        write_json(self.quality, quality)
        print(", ".join(f"{key} {value:.3f}" for key, value in quality.items()))
