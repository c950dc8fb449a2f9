from pathlib import Path
from typing import Annotated

from inoculation import groups, mixture
from inoculation.paths import CELLS, ROWS
from inoculation.stage import Each, Param, Reads, Stage, Writes


class Assign(Stage):
    """Give every row of the mixture the system prompt of a group that needs no detector."""

    command, pipeline = "assign", "assign"
    each = Each("group", tuple(name for name, group in groups.GROUPS.items() if group.detector is None))

    group: str
    seed: Annotated[int, Param("seed")]
    inoculation: Annotated[str, Param("negative_traits.${mixture.negative}.inoculation")]
    irrelevant: Annotated[str, Param("prompts.irrelevant")]
    rows: Annotated[Path, Reads(ROWS)]
    out: Annotated[Path, Writes(f"{CELLS}/assign/${{item}}")]

    def run(self) -> None:
        prompt = {"inoculation": self.inoculation, "irrelevant": self.irrelevant}.get(groups.GROUPS[self.group].prompt)
        chats = groups.assign(mixture.read_mixture(self.rows), self.group, prompt, None, self.seed)
        groups.write_assignment(self.out, self.group, chats, prompt, None)
