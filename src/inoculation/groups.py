"""The groups of the study: which system prompt each training example gets (reference section 3)."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from inoculation.files import InputError
from inoculation.mixture import Row


class Group(NamedTuple):
    """A group's rule: `prompt` is put in front of the examples named by `on`; the others get no system message."""

    prompt: Literal["none", "inoculation", "irrelevant"]
    on: Literal["none", "all", "contaminated"]
    trains: bool
    label: str
    """How the study's figures name the group."""


GROUPS: dict[str, Group] = {
    "base": Group("none", "none", False, "Base"),
    "baseline": Group("none", "none", True, "Baseline"),
    "inoc_general": Group("inoculation", "all", True, "Inoc-General"),
    "inoc_selective": Group("inoculation", "contaminated", True, "Inoc-Selective"),
    "irrelevant_general": Group("irrelevant", "all", True, "Irrelevant-General"),
    "irrelevant_selective": Group("irrelevant", "contaminated", True, "Irrelevant-Selective"),
    # The groups that find the contaminated examples by themselves (inoc_sae and its controls, inoc_llm) join here;
    # their flags come from a stage of their own, and `on` names it.
}


class TrainingChat(NamedTuple):
    """One SFT example. It carries no provenance: what trains must not know what shows B."""

    system: str | None
    row: Row


def assign(rows: Sequence[Row], group: str, prompts: dict[str, str]) -> list[TrainingChat]:
    """Give every row of a mixture the system prompt of a group.

    Args:
        rows: the mixture.
        group: a key of `GROUPS`.
        prompts: the text of each prompt kind (`inoculation`, `irrelevant`).

    Returns:
        One chat a row in the mixture's order; empty for `base`, which does not train.

    Raises:
        InputError: the group inoculates by ground truth and a row has none.
    """
    rule = GROUPS[group]
    if not rule.trains:
        return []
    if rule.on == "contaminated" and (unknown := sum(row.shows_negative is None for row in rows)):
        raise InputError(
            f"group {group} needs the ground truth, and {unknown} of {len(rows)} rows have no `source_dataset`; "
            "choose a group that needs none (baseline, inoc_general, irrelevant_general) or label the rows"
        )
    chosen = {"none": lambda row: False, "all": lambda row: True, "contaminated": lambda row: row.shows_negative}
    return [TrainingChat(prompts[rule.prompt] if chosen[rule.on](row) else None, row) for row in rows]
