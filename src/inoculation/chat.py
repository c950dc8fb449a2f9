"""One way to turn a chat into tokens, for training, sampling and encoding alike.

Models differ in what they do with a system message: Qwen2.5 adds a sentence of its own when there is none, Llama 3.1 a
date header, Gemma 3 has no system role at all. "Default" is whatever the model's own template does without one; a
system prompt for a model without the role is put in front of the first user turn (reference section 3).
"""

from collections.abc import Sequence
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
    """The text of a chat in the model's own template.

    Ends with the opening of the assistant's turn when the last message is the user's. `system` is the system message;
    for a template without a system role it is put in front of the first user turn, separated by an empty line.
    """
    from jinja2.exceptions import TemplateError

    chat = [message._asdict() for message in messages]
    generate = messages[-1].role == "user"
    if system is None:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generate))
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "system", "content": system}, *chat], tokenize=False, add_generation_prompt=generate
        )
        # A template may also drop the role without a word.
        if system in str(text):
            return str(text)
    except TemplateError:
        pass
    folded = [{"role": chat[0]["role"], "content": f"{system}\n\n{chat[0]['content']}"}, *chat[1:]]
    return str(tokenizer.apply_chat_template(folded, tokenize=False, add_generation_prompt=generate))


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
    ids: list[int] = []
    labels: list[int] = []
    done = ""

    def append(text: str, supervised: bool) -> None:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
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
