from pathlib import Path
from typing import Annotated

from pydantic import Field

from inoculation.paths import POCKET
from inoculation.pocket.base import build_base
from inoculation.pocket.recipe import ModelParams
from inoculation.stage import Each, Param, Reads, Stage, Writes
from inoculation.store import unfinished


class PocketModel(Stage):
    """Train a tokenizer and a base model of the pocket world."""

    command, pipeline = "pocket-model", "pocket"
    each = Each("name", "${pocket.models}")
    expensive = True

    name: str
    seed: Annotated[int, Param("pocket.chats.seed")]
    recipe: Annotated[ModelParams, Param("pocket.models.${key}")]
    save_steps: Annotated[int, Field(ge=1), Param("save_steps", tracked=False)]
    chats: Annotated[Path, Reads(f"{POCKET}/chats/pretraining.jsonl")]
    model: Annotated[Path, Writes(f"{POCKET}/models/${{key}}")]

    def run(self) -> None:
        import mlflow

        from inoculation import tracking

        with (
            unfinished(self.command, self.chats, self.seed, self.recipe.model_dump()) as work,
            tracking.progress("pocket/world", f"base model {self.name}") as show,
        ):

            def on_log(step: int, metrics: dict[str, float]) -> None:
                show({f"train/{key}": value for key, value in metrics.items()}, step)

            mlflow.log_params(tracking.flatten(self.recipe.model_dump(), f"pocket.models.{self.name}"))
            build_base(self.recipe, self.seed, self.save_steps, self.chats, self.model, work, on_log)
