"""The groups of the study: which system prompt each training example gets (reference section 3)."""

import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

from inoculation.files import InputError
from inoculation.mixture import Row

Prompt = Literal["none", "inoculation", "irrelevant", "sae", "audit"]
Examples = Literal["none", "all", "contaminated", "sae", "sae_random", "audit"]


class Group(NamedTuple):
    """A group's rule: `prompt` is put in front of the examples named by `on`; the others get no system message."""

    prompt: Prompt
    on: Examples
    trains: bool
    label: str
    """How the study's figures name the group."""

    @property
    def detector(self) -> Literal["sae", "audit"] | None:
        """Which detector's prompt the group trains under; None: the group needs no detector."""
        return self.prompt if self.prompt in ("sae", "audit") else None  # type: ignore[return-value]


GROUPS: dict[str, Group] = {
    "base": Group("none", "none", False, "Base"),
    "baseline": Group("none", "none", True, "Baseline"),
    "inoc_general": Group("inoculation", "all", True, "Inoc-General"),
    "inoc_selective": Group("inoculation", "contaminated", True, "Inoc-Selective"),
    "inoc_sae": Group("sae", "sae", True, "Inoc-SAE"),
    "inoc_llm": Group("audit", "audit", True, "Inoc-LLM"),
    "irrelevant_general": Group("irrelevant", "all", True, "Irrelevant-General"),
    "irrelevant_selective": Group("irrelevant", "contaminated", True, "Irrelevant-Selective"),
    "inoc_sae_random": Group("sae", "sae_random", True, "Inoc-SAE (random examples)"),
    "inoc_sae_oracle": Group("sae", "contaminated", True, "Inoc-SAE (true examples)"),
}


class TrainingChat(NamedTuple):
    """One SFT example. It carries no provenance: what trains must not know what shows B."""

    system: str | None
    row: Row


def assign(
    rows: Sequence[Row], group: str, prompts: dict[str, str], flags: Sequence[bool] | None, seed: int
) -> list[TrainingChat]:
    """Give every row of a mixture the system prompt of a group.

    Args:
        rows: the mixture.
        group: a key of `GROUPS`.
        prompts: the text of the group's prompt kind (`inoculation`, `irrelevant`, `sae`, `audit`).
        flags: what the group's detector flagged, one a row; None for a group without a detector.
        seed: of the examples of `sae_random`, which are as many as the flagged ones.

    Returns:
        One chat a row in the mixture's order; empty for `base`, which does not train.

    Raises:
        InputError: the group inoculates by ground truth and a row has none, or its detector found nothing.
    """
    rule = GROUPS[group]
    if not rule.trains:
        return []
    if rule.on == "contaminated" and (unknown := sum(row.shows_negative is None for row in rows)):
        raise InputError(
            f"group {group} needs the ground truth, and {unknown} of {len(rows)} rows have no `source_dataset`; "
            "choose a group that needs none (baseline, inoc_general, inoc_sae, inoc_llm) or label the rows"
        )
    if rule.on in ("sae", "sae_random", "audit"):
        assert flags is not None and len(flags) == len(rows)
        chosen = list(flags)
        if rule.on == "sae_random":
            drawn = set(random.Random(f"{group}/{seed}").sample(range(len(rows)), sum(flags)))
            chosen = [index in drawn for index in range(len(rows))]
    else:
        chosen = [rule.on == "all" or (rule.on == "contaminated" and bool(row.shows_negative)) for row in rows]
    return [TrainingChat(prompts[rule.prompt] if on else None, row) for row, on in zip(rows, chosen, strict=True)]
