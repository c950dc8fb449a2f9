"""Tokens as pieces of the text that they are, and how pages show them."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from inoculation.files import read_jsonl

if TYPE_CHECKING:
    from markupsafe import Markup
    from transformers import PreTrainedTokenizerBase


SHADES = 5
"""How many shades a marked word can have."""
STYLE = ".words mark { color: inherit; border-radius: 2px; } " + " ".join(
    f".s{shade} {{ background: rgb(179 38 30 / {0.16 * shade:.2f}); }}" for shade in range(1, SHADES + 1)
)
"""Of `shown`, for a page's <style>."""


def token_texts(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
    """The text of each token; of tokens that are parts of a character, the first has its text and the others have none."""
    alone = [tokenizer.decode([token]) for token in ids]
    texts: list[str] = []
    for broken, run in groupby(zip(ids, alone, strict=True), key=lambda pair: "\ufffd" in pair[1]):
        tokens, own = zip(*run, strict=True)
        texts += [tokenizer.decode(list(tokens)), *[""] * (len(tokens) - 1)] if broken else own
    return texts


def shown(pieces: Sequence[tuple[str, int]] | None) -> "Markup":
    """A response word by word as HTML, with a shade each (0: none); nothing where there are no pieces. Text is escaped."""
    from markupsafe import Markup

    if not pieces:
        return Markup("")
    words = (Markup('<mark class="s{}">{}</mark>').format(shade, text) if shade else text for text, shade in pieces)
    told = Markup('<p class="words">As the model reads it; the darker, the more the prompt raises a word:\n{} ...</p>')
    return told.format(Markup("").join(words))


def read_marked(folder: Path) -> dict[int, list[tuple[str, int]]]:
    """Row -> pieces of its response as the detector read it, with a shade: 0, to `SHADES` for what the prompt raises most.

    Shades go with the root of the gain: a first word may gain ten times what any other does. Empty where a detector marks no words.
    """
    if not (folder / "marked.jsonl").exists():
        return {}
    found = {row["row"]: row["tokens"] for row in read_jsonl(folder / "marked.jsonl", dict)}
    most = max((gain for tokens in found.values() for _, gain in tokens), default=0.0)
    return {
        row: [(text, round(SHADES * (max(0.0, gain) / most) ** 0.5) if most > 0 else 0) for text, gain in tokens]
        for row, tokens in found.items()
    }
