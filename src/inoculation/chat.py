"""One way to turn a chat into tokens, for training, sampling and encoding alike.

Models differ in what they do with a system message: Qwen2.5 adds a sentence of its own when there is none, Llama 3.1 a
date header, Gemma 3 has no system role at all. "Default" is whatever the model's own template does without one; a
system prompt for a model without the role is put in front of the first user turn (reference section 3).

Text is text: a data set may say `<|im_end|>` and still only say it. Structural tokens come from the template alone, and
the same characters in a message are encoded as characters:

    chat_ids(tokenizer, messages, system)  ->  tokens, for sampling and for the SAE
    encode(tokenizer, messages, system, n) ->  tokens and labels, for training and for likelihoods
    text_ids(tokenizer, text)              ->  tokens of a text that is no chat

What a template writes as ordinary text ("[INST]" where it is no token) a message can write too; nothing tells them apart.
"""

import re
import secrets
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from inoculation.files import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
    role: str
    content: str


def parse_messages(raw: Any) -> tuple[Message, ...]:
    """Validate one chat: [system,] user, assistant, user, ... assistant, with text in every turn.

    Raises:
        ValueError: says which message is wrong and what is expected.
    """
    if not isinstance(raw, list) or not raw:
        raise ValueError('"messages" must be a non-empty list')
    messages = []
    for index, item in enumerate(raw):
        if not isinstance(item, dict):
            raise ValueError(f"message {index}: an object with role and content is expected")
        role, content = item.get("role"), item.get("content")
        if role not in ROLES:
            raise ValueError(f"message {index}: role {role!r} is unknown; valid: {', '.join(ROLES)}")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"message {index}: the {role}'s content is empty or not a text")
        messages.append(Message(role, content))
    turns = messages[1:] if messages[0].role == "system" else messages
    expected = [("user", "assistant")[index % 2] for index in range(len(turns))]
    if [message.role for message in turns] != expected:
        raise ValueError(
            f"roles {[message.role for message in messages]}: user and assistant must alternate, starting with user"
        )
    if not turns or turns[-1].role != "assistant":
        raise ValueError("the last message must be the assistant's response")
    return tuple(messages)


def render(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], system: str | None = None) -> str:
    """The text of a chat in the model's own template. For reading: its tokens are `chat_ids`.

    Ends with the opening of the assistant's turn when the last message is the user's. `system` is the system message;
    for a template without a system role it is put in front of the first user turn, separated by an empty line.
    """
    chat = [message._asdict() for message in messages]
    if system is not None and _has_system(tokenizer, str(tokenizer.chat_template)):
        chat = [{"role": "system", "content": system}, *chat]
    elif system is not None:
        chat = [{"role": chat[0]["role"], "content": f"{system}\n\n{chat[0]['content']}"}, *chat[1:]]
    generate = messages[-1].role == "user"
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generate))


NONCE = secrets.token_hex(8)
"""Stands in for structural tokens while a chat is rendered. A text cannot hold it, because it is new in every process."""


@lru_cache(maxsize=4)
def _has_system(tokenizer: "PreTrainedTokenizerBase", template: str) -> bool:
    """Whether a tokenizer's template has the system role: it may refuse it, or drop it without a word.

    Asked with a text of its own: whether a chat's own prompt comes out can be an accident of what its messages say.
    """
    from jinja2.exceptions import TemplateError

    chat = [{"role": "system", "content": NONCE}, {"role": "user", "content": "x"}]
    try:
        return NONCE in str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    except TemplateError:
        return False


class Structure:
    """The tokens that structure a tokenizer's chats, and how a text that contains one of them is encoded."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Find the tokens: the special ones, and added ones that the template's source names.

        The rule of `apply_chat_template(sanitize_control_tokens=True)`, which transformers has from 5.21 on. White
        space does not count: templates contain it as ordinary text.
        """
        template = str(tokenizer.chat_template or "")
        self._tokenizer = tokenizer
        self._ids = {
            token.content: number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special or (token.content in template and not token.content.isspace())
        }
        self._names = sorted(self._ids, key=len, reverse=True)
        self._written = re.compile("|".join(map(re.escape, self._names)) or "(?!)")
        self._masked = re.compile(rf"{NONCE}:(\d+):")
        # An unknown character becomes a special token too, and is none that a text could forge a turn with.
        self._counted = set(self._ids.values()) - {tokenizer.unk_token_id}
        self._plain: tuple[PreTrainedTokenizerBase, dict[int, int]] | None = None

    def mask(self, text: str) -> str:
        """The text with a stand-in for each structural token's characters, which a template passes on like any text."""
        return self._written.sub(lambda found: f"{NONCE}:{self._names.index(found[0])}:", text)

    def encode(self, rendered: str) -> list[int]:
        """Tokens of a text rendered from masked messages.

        Where nothing is masked, these are the tokenizer's own tokens of the text. Else they are the tokens that it
        would give if structural tokens stood only where the template put them.

        Raises:
            InputError: the tokenizer makes a structural token of a message's characters whatever it is told.
        """
        written = [self._ids[name] for name in self._written.findall(rendered)]
        own: list[int] | None = None
        if not self._masked.search(rendered):
            own = self._tokenizer(rendered, add_special_tokens=False)["input_ids"]
            # It may also have found a token behind its normalisation (full-width characters, say).
            if self._sound(own, written):
                return own
        if self._plain is None:
            self._plain = self._without_structure()
        text = self._written.sub(lambda found: f"{NONCE}={self._names.index(found[0])}=", rendered)
        text = self._masked.sub(lambda found: self._names[int(found[1])], text)
        plain, meant = self._plain
        ids = plain(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = [meant.get(token, token) for token in ids]
        if ids != own and not self._sound(ids, written):
            held = ", ".join(sorted(set(self._written.findall(text)))) or "characters that normalise to one"
            raise InputError(
                "a text holds the characters of a special token, and the model's tokenizer reads them as the token even "
                f"in plain text: {held}; remove them"
            )
        return ids

    def _sound(self, ids: Sequence[int], written: Sequence[int]) -> bool:
        """Whether the structural tokens are those that the template wrote."""
        return [token for token in ids if token in self._counted] == [t for t in written if t in self._counted]

    def _without_structure(self) -> "tuple[PreTrainedTokenizerBase, dict[int, int]]":
        """A copy that reads structural tokens as characters, with a stand-in for each; stand-in -> the token meant.

        The stand-ins are added tokens like those they stand for, so that the text around them is encoded as ever.
        """
        from copy import deepcopy

        from tokenizers import AddedToken

        if not self._tokenizer.is_fast:
            raise InputError("a text holds the characters of a special token; such data need a fast tokenizer")
        plain = deepcopy(self._tokenizer)
        known = plain.added_tokens_decoder
        plain.add_tokens(
            [AddedToken(name, special=True, normalized=False) for name in self._names], special_tokens=True
        )
        stand_ins = [f"{NONCE}={number}=" for number in range(len(self._names))]
        for stand_in, name in zip(stand_ins, self._names, strict=True):
            like = known[self._ids[name]]
            plain.add_tokens(
                AddedToken(
                    stand_in, lstrip=like.lstrip, rstrip=like.rstrip, single_word=like.single_word, normalized=False,
                    special=False,
                )
            )  # fmt: skip
        meant = [self._ids[name] for name in self._names]
        return plain, dict(zip(plain.convert_tokens_to_ids(stand_ins), meant, strict=True))


@lru_cache(maxsize=4)
def _structure(tokenizer: "PreTrainedTokenizerBase") -> Structure:
    return Structure(tokenizer)


def _masked(structure: Structure, messages: Sequence[Message], system: str | None) -> tuple[list[Message], str | None]:
    masked = [message._replace(content=structure.mask(message.content)) for message in messages]
    return masked, None if system is None else structure.mask(system)


def chat_ids(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], system: str | None = None) -> list[int]:
    """Tokens of a chat in the model's own template; see `render` for `system` and for how the chat ends."""
    structure = _structure(tokenizer)
    return structure.encode(render(tokenizer, *_masked(structure, messages, system)))


def text_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Tokens of a text that is no chat: none of them structural."""
    structure = _structure(tokenizer)
    return structure.encode(structure.mask(text))


class Encoded(NamedTuple):
    """A training example. `labels` is -100 except on response tokens; both have the length of the chat in tokens."""

    input_ids: list[int]
    labels: list[int]
    cut: int
    """Tokens beyond `max_length` that were cut off at the end."""


IGNORED = -100
"""The label of a token that carries no loss (PyTorch's default)."""


def encode(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], system: str | None, max_length: int
) -> Encoded:
    """Tokens and labels of one chat: loss on every assistant turn, its end-of-turn token included, on nothing else.

    The prompt's tokens are exactly those that sampling starts from, because both are tokenised at the same place.

    Raises:
        InputError: the template rewrites earlier turns, or no response token is left within `max_length`.
    """
    structure = _structure(tokenizer)
    messages, system = _masked(structure, messages, system)
    ids: list[int] = []
    labels: list[int] = []
    done = ""

    def append(text: str, supervised: bool) -> None:
        tokens = structure.encode(text)
        ids.extend(tokens)
        labels.extend(tokens if supervised else [IGNORED] * len(tokens))

    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        opened = render(tokenizer, messages[:index], system)
        closed = render(tokenizer, messages[: index + 1], system)
        if not (opened.startswith(done) and closed.startswith(opened)):
            raise InputError("the model's chat template rewrites earlier turns; its responses cannot be supervised")
        response = closed[len(opened) :]
        # White space that a template puts behind the end-of-turn token is never sampled: it belongs to what follows.
        trailing = response[len(response.rstrip()) :]
        append(opened[len(done) :], False)
        append(response[: len(response) - len(trailing)], True)
        done = closed[: len(closed) - len(trailing)]
    cut = max(0, len(ids) - max_length)
    ids, labels = ids[:max_length], labels[:max_length]
    if all(label == IGNORED for label in labels):
        raise InputError(
            f"no response token within max_length {max_length} (the chat has {len(ids) + cut} tokens); raise max_length"
        )
    return Encoded(ids, labels, cut)
