from pathlib import Path
from typing import Annotated

from inoculation.paths import CHECKED, POCKET
from inoculation.pocket.recipe import ChatsParams
from inoculation.pocket.world import write_chats
from inoculation.stage import Param, Reads, Stage, Writes


class PocketChats(Stage):
    """Generate the pocket world's chats: parallel answers, evaluation questions, reference and pretraining chats."""

    command, pipeline = "pocket-chats", "pocket"

    checked: Annotated[Path, Reads(CHECKED)]
    world: Annotated[ChatsParams, Param("pocket.chats")]
    chats: Annotated[Path, Writes(f"{POCKET}/chats")]

    def run(self) -> None:
        write_chats(self.world, self.chats)
