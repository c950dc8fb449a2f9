"""The classes of latents: `yes`, explained by A; `neutral`, ordinary; `no`, suspicious."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from inoculation.files import read_json, write_json

if TYPE_CHECKING:
    from inoculation.detect.sae.rank import Latent

Class = Literal["yes", "neutral", "no"]


class Classes(NamedTuple):
    method: str
    """`local` (the causal control) or `llm`: whose classes count."""
    by: dict[str, list[Class]]
    """method -> a class a latent."""

    @property
    def chosen(self) -> list[Class]:
        return self.by[self.method]

    @property
    def agreement(self) -> float | None:
        """Share of the latents on which two classifiers agree; None where there is one."""
        if len(self.by) < 2:
            return None
        return sum(a == b for a, b in zip(*self.by.values(), strict=True)) / len(self.chosen)

    @property
    def suspicious(self) -> list[bool]:
        return [name == "no" for name in self.chosen]


def write_classes(path: Path, latents: Sequence[int], classes: Classes) -> None:
    """Write each latent's class by every classifier, and the one that counts."""
    by = {
        str(latent): {name: own[i] for name, own in classes.by.items()} | {"class": classes.chosen[i]}
        for i, latent in enumerate(latents)
    }
    write_json(path, {"method": classes.method, "agreement": classes.agreement, "classes": by})


def read_classes(path: Path, latents: "Sequence[Latent]") -> list[bool]:
    """Whether each latent is suspicious: its class is `no`."""
    classes = read_json(path)["classes"]
    return [classes[str(row.latent)]["class"] == "no" for row in latents]
