from pathlib import Path
from typing import Annotated

from pydantic import Field

from inoculation.files import write_json
from inoculation.paths import POCKET
from inoculation.pocket.obedience import measure
from inoculation.stage import Each, Param, Reads, Stage, Writes


class PocketObedience(Stage):
    """Measure how well a pocket base model obeys persona prompts, and what it leaks without one."""

    command, pipeline = "pocket-obedience", "pocket"

    each = Each("name", "${pocket.models}")

    name: str
    seed: Annotated[int, Param("pocket.chats.seed")]
    samples: Annotated[int, Field(ge=1), Param("pocket.obedience_samples")]
    questions: Annotated[Path, Reads(f"{POCKET}/chats/trait_data_eval")]
    model: Annotated[Path, Reads(f"{POCKET}/models/${{key}}")]
    obedience: Annotated[Path, Writes(f"{POCKET}/obedience/${{key}}.json", "metrics")]

    def run(self) -> None:
        import mlflow

        from inoculation import tracking

        obedience = measure(self.model, self.questions, self.samples, self.seed)
        write_json(self.obedience, obedience)
        with tracking.run("pocket/world", f"obedience {self.name}"):
            mlflow.log_metrics({key.replace(".", "/"): value for key, value in tracking.flatten(obedience).items()})
