from pathlib import Path
from typing import Annotated

from pydantic import Field

from inoculation.detect.sae.features import read_features
from inoculation.detect.sae.rank import NO_LATENT, ranked, write_ranked
from inoculation.paths import SAE
from inoculation.stage import Param, Reads, Stage, Writes


class SaeRank(Stage):
    """Rank the latents that tell the data from the base model."""

    command, pipeline = "sae-rank", "sae"

    latents: Annotated[int, Field(ge=2), Param("sae.latents")]
    features: Annotated[Path, Reads(f"{SAE}/features.parquet")]
    out: Annotated[Path, Writes(f"{SAE}/rank")]

    def run(self) -> None:
        ranking = ranked(lambda: read_features(self.features), self.latents)
        if not ranking.latents:
            print(f"nothing will be found: {NO_LATENT}")
        else:
            print(
                f"variance along the component: {ranking.variance:.1f}; with random signs at most {ranking.floor:.1f}"
            )
        write_ranked(self.out, ranking)
