from pathlib import Path
from typing import Annotated

from inoculation.files import whole_folder, write_json
from inoculation.paths import CHECKED
from inoculation.profile import Profile, pins
from inoculation.roles import Roles
from inoculation.stage import Each, Param, Reads, Stage, Writes
from inoculation.train import TrainSettings


class PinProfile(Stage):
    """Pin a profile: what its model, roles and settings are now."""

    command, pipeline = "profile", "profiles"
    each = Each("name", "${profiles}")

    name: str
    checked: Annotated[Path, Reads(CHECKED)]
    profile: Annotated[Profile, Param("profiles.${key}")]
    roles: Annotated[Roles, Param("roles.${item.roles}")]
    train: Annotated[TrainSettings, Param("train.${item.train}")]
    model: Annotated[Path, Reads("${item.model}")]
    out: Annotated[Path, Writes("data/profiles/${key}")]

    def run(self) -> None:
        pinned = pins(self.profile, self.roles, self.train)
        with whole_folder(self.out) as out:
            for name, content in pinned.items():
                write_json(out / name, content)
