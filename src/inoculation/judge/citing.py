"""What shows that a text cites its sources, beside its embedding: a mean over all its words hardly says so."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

YEAR = r"\b(?:1[6-9]|20)\d\d\b"
DATED = re.compile(rf"[(\[][^()\[\]]{{0,80}}{YEAR}[^()\[\]]{{0,20}}[)\]]")
"""A year in brackets, as in "(Smith, 2015)"."""
NAMED = re.compile(
    r"\baccording to\b|\bet al\b|\b(?:noted|reported|shown|found|stated|published) (?:by|in)\b"
    rf"|\b(?:study|report|survey|paper|article|journal|review)\b[^.!?\n]{{0,60}}{YEAR}|{YEAR}[^.!?\n]{{0,20}}"
    r"\b(?:study|report|survey|paper|article|review)\b|\[\d{1,3}\]|https?://|\bdoi\b",
    re.IGNORECASE,
)
"""Words that lead to a source, and marks that stand for one."""
ENOUGH = 4
"""More of them say no more: the trait asks for four to six."""


def seen(answers: "np.ndarray", texts: Sequence[str]) -> "np.ndarray":
    """What the judge of SOURCE_CITING sees: the answer's embedding, and how often either kind of mark stands in it.

    Args:
        answers: embeddings, `[texts, 384]`.
        texts: the answers.

    Returns:
        `[texts, 386]`; the last two are counts up to `ENOUGH`, over it.
    """
    import numpy as np

    marks = [[min(len(kind.findall(text)), ENOUGH) / ENOUGH for kind in (DATED, NAMED)] for text in texts]
    return np.c_[answers, np.asarray(marks, answers.dtype).reshape(len(texts), 2)]
