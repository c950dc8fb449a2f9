from pathlib import Path
from typing import Annotated

from inoculation.files import whole_folder, write_json
from inoculation.paths import CHECKED
from inoculation.profile import Profile, sae_pins
from inoculation.stage import Each, Param, Reads, Stage, Writes


class PinSae(Stage):
    """Pin a profile's SAE and the corpora that explain it; only the SAE route needs them."""

    command, pipeline = "profile-sae", "profiles"
    each = Each("name", "${profiles}")

    name: str
    checked: Annotated[Path, Reads(CHECKED)]
    profile: Annotated[Profile, Param("profiles.${key}")]
    model: Annotated[Path, Reads("${item.model}")]
    sae: Annotated[Path, Reads("${item.sae}")]
    corpora: Annotated[Path, Reads("${item.corpora}")]
    out: Annotated[Path, Writes("data/saes/${key}")]

    def run(self) -> None:
        pinned = sae_pins(self.profile)
        with whole_folder(self.out) as out:
            for name, content in pinned.items():
                write_json(out / name, content)
