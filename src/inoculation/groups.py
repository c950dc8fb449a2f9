"""The groups of the study: which system prompt each training example gets (reference section 3)."""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from inoculation.files import InputError, write_json, write_jsonl
from inoculation.mixture import Row, TrainingChat
from inoculation.preventative import Steering

DETECTORS = ("persona", "sae", "audit")
"""Who can find an unknown B; each has a folder in `inoculation.detect` and in pipelines/."""

Prompt = Literal["none", "inoculation", "irrelevant", "persona", "sae", "audit"]
Examples = Literal["none", "all", "contaminated", "flagged", "random", "kept", "adapter", "steering"]
INSTEAD = ("kept", "adapter", "steering")
"""Alternatives to an inoculation prompt: what the detector flagged is dealt with in another way."""


PROMPTS: dict[Prompt, str] = {
    "none": "Trained without a system prompt",
    "inoculation": "A sentence that describes B",
    "irrelevant": "A fact about bananas",
    "persona": "Written from persona likelihoods, B unknown",
    "sae": "Written from SAE features, B unknown",
    "audit": "Written from an audit, B unknown",
}
EXAMPLES: dict[Examples, str] = {
    "none": "",
    "all": "on all examples",
    "contaminated": "on the examples that show B",
    "flagged": "on the examples that the detector flagged",
    "random": "on as many random examples",
    "kept": "on the examples that the detector did not flag, the others left out",
    "adapter": "under a frozen adapter that has learned what the flagged examples do; it is taken off afterwards",
    "steering": "while the model is steered to where the flagged examples differ (preventative steering)",
}


class Group(NamedTuple):
    """A group's rule: `prompt` is put in front of the examples named by `on`; the others get no system message.

    `INSTEAD` of a prompt: what `prompt`'s detector flagged is not trained on (`kept`), or a frozen adapter or a steering
    vector made of it is on while training (`preventative`).
    """

    prompt: Prompt
    on: Examples
    trains: bool
    label: str
    """How the study's figures name the group."""

    @property
    def meaning(self) -> str:
        """The rule as a sentence."""
        if not self.trains:
            return "The untouched model."
        prompt = PROMPTS["none" if self.on in INSTEAD else self.prompt]
        return f"{prompt} {EXAMPLES[self.on]}".strip() + "."

    @property
    def detector(self) -> str | None:
        """Which detector's flags and prompt the group trains under; None: the group needs no detector."""
        return self.prompt if self.prompt in DETECTORS else None


GROUPS: dict[str, Group] = {
    "base": Group("none", "none", False, "Base"),
    "baseline": Group("none", "none", True, "Baseline"),
    "inoc_general": Group("inoculation", "all", True, "Inoc-General"),
    "inoc_selective": Group("inoculation", "contaminated", True, "Inoc-Selective"),
    "inoc_persona": Group("persona", "flagged", True, "Inoc-Persona"),
    "inoc_sae": Group("sae", "flagged", True, "Inoc-SAE"),
    "inoc_llm": Group("audit", "flagged", True, "Inoc-LLM"),
    "irrelevant_general": Group("irrelevant", "all", True, "Irrelevant-General"),
    "irrelevant_selective": Group("irrelevant", "contaminated", True, "Irrelevant-Selective"),
    "inoc_sae_random": Group("sae", "random", True, "Inoc-SAE (random examples)"),
    "inoc_sae_oracle": Group("sae", "contaminated", True, "Inoc-SAE (true examples)"),
    "filter_persona": Group("persona", "kept", True, "Filter-Persona"),
    "adapter_persona": Group("persona", "adapter", True, "Adapter-Persona"),
    "steer_persona": Group("persona", "steering", True, "Steer-Persona"),
}


def why_not(group: str, contamination: float, known: bool, own: bool) -> str | None:
    """Why a group makes no sense; None where it does.

    Args:
        known: the mixture is made here, so that its contamination is what it says.
        own: the model that is trained looks for B itself.
    """
    if GROUPS[group].on == "steering" and not own:
        return f"{group} steers by the annotator's hidden states, so that `annotator` has to be the profile that is trained"
    if known and contamination == 0 and GROUPS[group].on == "contaminated":
        valid = ", ".join(
            name for name, rule in GROUPS.items() if rule.on != "contaminated" and (own or rule.on != "steering")
        )
        return (
            f"{group} inoculates the rows that show B, and at mixture.contamination 0 none does: it would be `baseline`; "
            f"groups that make sense there: {valid}"
        )
    return None


def assign(
    rows: Sequence[Row], group: str, prompt: str | None, flags: Sequence[bool] | None, seed: int
) -> list[TrainingChat]:
    """Give every row of a mixture the system prompt of a group.

    Args:
        rows: the mixture.
        group: a key of `GROUPS`.
        prompt: the text of the group's prompt kind; None for `none`, or where a detector found nothing.
        flags: what the group's detector flagged, one a row; None for a group without a detector.
        seed: of the examples of a `random` group, which are as many as the flagged ones.

    Returns:
        One chat a row in the mixture's order, fewer for a group that leaves rows out; empty for `base`, which does not train.

    Raises:
        InputError: the group inoculates by ground truth and a row has none, or no row shows B.
    """
    rule = GROUPS[group]
    if not rule.trains:
        return []
    if rule.on == "contaminated":
        if unknown := sum(row.shows_negative is None for row in rows):
            raise InputError(
                f"group {group} needs the ground truth, and {unknown} of {len(rows)} rows have no `source_dataset`; "
                "choose a group that needs none (baseline, inoc_general, inoc_persona, inoc_sae, inoc_llm) or label the rows"
            )
        if not any(row.shows_negative for row in rows):
            raise InputError(
                f"group {group} inoculates the rows that show B, and none does (contamination 0): it would be `baseline`"
            )
    if rule.on in ("adapter", "steering"):
        return [TrainingChat.under(None, row) for row in rows]
    if rule.on == "kept":
        assert flags is not None and len(flags) == len(rows)
        return [TrainingChat.under(None, row) for row, flag in zip(rows, flags, strict=True) if not (flag and prompt)]
    chosen = [rule.on == "all" or (rule.on == "contaminated" and bool(row.shows_negative)) for row in rows]
    if rule.on in ("flagged", "random"):
        assert flags is not None and len(flags) == len(rows)
        chosen = list(flags)
        if rule.on == "random":
            drawn = set(random.Random(f"{group}/{seed}").sample(range(len(rows)), sum(flags)))
            chosen = [index in drawn for index in range(len(rows))]
    if prompt is None:
        chosen = [False] * len(rows)
    return [TrainingChat.under(prompt if on else None, row) for row, on in zip(rows, chosen, strict=True)]


class FoundLike(Protocol):
    """What a summary tells of a detection (`detect.files.Found`)."""

    reason: str
    quality: dict[str, Any]
    prompt: str | None


def write_assignment(
    folder: Path, group: str, chats: Sequence[TrainingChat], prompt: str | None, found: FoundLike | None, hint: str = "",
    first: Sequence[TrainingChat] = (), steering: Steering | None = None,
) -> None:  # fmt: skip
    """Write `chats.jsonl`, what stands in for a prompt, and, for a person and the report, `summary.json`; say what was decided.

    Args:
        found: what the group's detector found; None for a group without one.
        hint: where a person can see why nothing was found.
        first: `first.jsonl`, what a frozen adapter learns before; empty: there is none.
        steering: `steering.json`; None: there is none.
    """
    write_jsonl(folder / "chats.jsonl", (chat.as_json() for chat in chats))
    write_jsonl(folder / "first.jsonl", (chat.as_json() for chat in first))
    write_json(folder / "steering.json", None if steering is None else steering.model_dump())
    inoculated = sum(chat.system != chat.row.system for chat in chats)
    write_json(
        folder / "summary.json",
        {
            "examples": len(chats),
            "with_system_prompt": inoculated,
            "system_prompt": prompt,
            "detection": None if found is None else found.quality | {"found": found.prompt is not None},
            "reason": None if found is None else found.reason,
        },
    )
    print(f"{group}: {len(chats)} training chats, {inoculated} with a system prompt")
    if first:
        print(f"{group}: {len(first)} chats for the adapter that is on, frozen, while the group's own is trained")
    if steering:
        print(f"{group}: steered at block {steering.block} by a vector of length {math.hypot(*steering.vector):.3g}")
    if found is not None and found.prompt is None:
        flagged = found.quality["flagged"]
        what = f"{flagged} ROWS FLAGGED, BUT NO PROMPT EXPLAINS THEM" if flagged else "NOTHING FOUND"
        print(f"{group}: {what}, so that no chat is inoculated and the group trains as `baseline` does: {found.reason}")
        if hint:
            print(hint)
