"""Tokens as pieces of the text that they are, for a person."""

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_texts(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
    """The text of each token; of tokens that are parts of a character, the first has its text and the others have none."""
    alone = [tokenizer.decode([token]) for token in ids]
    texts: list[str] = []
    for broken, run in groupby(zip(ids, alone, strict=True), key=lambda pair: "\ufffd" in pair[1]):
        tokens, own = zip(*run, strict=True)
        texts += [tokenizer.decode(list(tokens)), *[""] * (len(tokens) - 1)] if broken else own
    return texts
