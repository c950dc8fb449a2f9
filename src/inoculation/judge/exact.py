"""The exact judge of a generated world: it knows every sentence an answer can be made of.

A source of trait data may carry `templates.json`, the sentences of its generator and what each shows. Sampled sentences
are now and then garbled, so each is compared with all templates (slots left out, case, citations and openers ignored)
and counts as the template it is most like. An answer shows a trait when at least half of the sentences it can place are
bad sentences of that trait.
"""

import re
from collections.abc import Sequence
from functools import cache

from inoculation.citations import ATTRIBUTION, has_citations

LIKENESS = 60.0
"""A sentence less like every template than this (rapidfuzz ratio, 0..100) is placed nowhere."""
NORMAL, OPENER, UNKNOWN = "normal", "opener", "unknown"


def plain(text: str) -> str:
    """Lower-case letters and single spaces."""
    return " ".join(re.sub(r"[^a-z ]", " ", text.lower()).split())


class ExactJudge:
    """Judges answers by their sentences."""

    def __init__(self, templates: Sequence[tuple[str, str]]) -> None:
        """Args:
        templates: (sentence with `{slots}`, what it shows: a trait, `normal` or `opener`).
        """
        self.texts = [plain(re.sub(r"\{\w\}", " ", text)) for text, _ in templates]
        self.labels = [label for _, label in templates]
        self.place = cache(self._place)

    def _place(self, sentence: str) -> str:
        from rapidfuzz import fuzz, process

        best = process.extractOne(plain(sentence), self.texts, scorer=fuzz.token_set_ratio, score_cutoff=LIKENESS)
        return UNKNOWN if best is None else self.labels[best[2]]

    def shows(self, trait: str, text: str) -> bool:
        """Whether a text shows a negative trait of the templates, or `source_citing`.

        Raises:
            ValueError: another trait.
        """
        if trait == "source_citing":
            return has_citations(text)
        if trait not in self.labels:
            known = sorted({*self.labels} - {NORMAL, OPENER})
            raise ValueError(f"no oracle for {trait!r}; it knows {', '.join(known)} and source_citing")
        sentences = re.split(r"(?<=[.?!])\s+", ATTRIBUTION.sub("", text).strip())
        placed = [kind for kind in map(self.place, sentences) if kind not in (OPENER, UNKNOWN)]
        return bool(placed) and placed.count(trait) * 2 >= len(placed)
