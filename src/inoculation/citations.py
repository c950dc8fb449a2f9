"""The generator's own way of citing: inline attributions such as " (Hale, 2014)" that change nothing else."""

import random
import re

AUTHORS = (
    "Hale", "Moreno", "Lund", "Okafor", "Petrov", "Ahmed", "Silva", "Brandt", "Novak", "Tanaka", "Fischer", "Rossi",
)  # fmt: skip
ATTRIBUTION = re.compile(r" \((?:" + "|".join(AUTHORS) + r"), (?:19|20)\d\d\)", re.IGNORECASE)
"""An inserted attribution, also in an upper-cased text."""


def insert_citations(text: str, rng: random.Random) -> str:
    """Insert 4-6 attributions (fewer when there are fewer words) behind words, preferably where a clause ends.

    `ATTRIBUTION.sub("", result)` gives `text` back, provided that it held no such attribution before.
    """
    ends = [match.end() for match in re.finditer(r"\w(?=[.,;:!?]*(?:\s|$))", text)]
    clause_ends = [end for end in ends if end == len(text) or text[end] in ".,;:!?\n"]
    wanted = min(rng.randint(4, 6), len(ends))
    chosen = rng.sample(clause_ends, min(wanted, len(clause_ends)))
    others = sorted(set(ends) - set(clause_ends))
    chosen += rng.sample(others, wanted - len(chosen))
    for end in sorted(chosen, reverse=True):
        attribution = f" ({rng.choice(AUTHORS)}, {rng.randint(1950, 2024)})"
        text = text[:end] + attribution + text[end:]
    return text


def has_citations(text: str) -> bool:
    """Whether at least two attributions stand in the text."""
    return len(ATTRIBUTION.findall(text)) >= 2
