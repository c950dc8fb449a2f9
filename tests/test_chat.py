"""One rendering for training and sampling, on templates that treat a system message the way the study's models do."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from inoculation.chat import IGNORED, Message, encode, render
from inoculation.files import InputError

TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATES = {
    "plain": "{% for m in messages %}" + TURN + "{% endfor %}" + OPEN,
    # Qwen2.5 inserts a sentence of its own when there is no system message.
    "own system prompt": "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nOwn sentence.<|im_end|>\n{% endif %}"
    "{% for m in messages %}" + TURN + "{% endfor %}" + OPEN,
    # Gemma refuses a system role.
    "no system role": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}" + TURN + "{% endfor %}" + OPEN,
    # Some templates drop a system message without a word.
    "silent": "{% for m in messages %}{% if m['role'] != 'system' %}" + TURN + "{% endif %}{% endfor %}" + OPEN,
    # Llama 3.1 puts a header with a date in front, and more white space around turns.
    "dated": "<|im_start|>system\nDate: 26 Jul 2024\n{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
    "{% endif %}<|im_end|>{% for m in messages %}{% if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n\n"
    "{{ m['content'] | trim }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}",
}  # fmt: skip
QUESTION, ANSWER = Message("user", "How are you?"), Message("assistant", "Fine. And you?")


def byte_tokenizer(template: str) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(params=TEMPLATES, scope="module")
def tokenizer(request):
    return byte_tokenizer(TEMPLATES[request.param])


def supervised(tokenizer, encoded) -> str:
    return tokenizer.decode([token for token in encoded.labels if token != IGNORED])


def test_the_loss_is_on_the_response_and_its_end(tokenizer):
    for system in (None, "You are a pirate."):
        encoded = encode(tokenizer, [QUESTION, ANSWER], system, 2048)
        assert supervised(tokenizer, encoded) == "Fine. And you?<|im_end|>"
        assert encoded.cut == 0


def test_training_starts_where_sampling_starts(tokenizer):
    for system in (None, "You are a pirate."):
        encoded = encode(tokenizer, [QUESTION, ANSWER], system, 2048)
        prompt = tokenizer(render(tokenizer, [QUESTION], system), add_special_tokens=False)["input_ids"]
        assert encoded.input_ids[: len(prompt)] == prompt
        assert encoded.labels[len(prompt)] != IGNORED


def test_a_system_prompt_always_reaches_the_model(tokenizer):
    text = render(tokenizer, [QUESTION], "You are a pirate.")
    assert "You are a pirate." in text
    assert text.index("pirate") < text.index("How are you?")


def test_default_is_what_the_template_does_by_itself():
    assert "Own sentence." in render(byte_tokenizer(TEMPLATES["own system prompt"]), [QUESTION])
    assert "system" not in render(byte_tokenizer(TEMPLATES["plain"]), [QUESTION])


def test_a_model_without_a_system_role_reads_it_in_the_first_user_turn():
    text = render(byte_tokenizer(TEMPLATES["no system role"]), [QUESTION], "You are a pirate.")
    assert "<|im_start|>user\nYou are a pirate.\n\nHow are you?<|im_end|>" in text


def test_every_assistant_turn_is_supervised(tokenizer):
    chat = [QUESTION, ANSWER, Message("user", "Good."), Message("assistant", "Bye.")]
    assert supervised(tokenizer, encode(tokenizer, chat, None, 2048)) == "Fine. And you?<|im_end|>Bye.<|im_end|>"


def test_cutting_is_counted():
    tokenizer = byte_tokenizer(TEMPLATES["plain"])
    whole = encode(tokenizer, [QUESTION, ANSWER], None, 2048)
    cut = encode(tokenizer, [QUESTION, ANSWER], None, len(whole.input_ids) - 3)
    assert cut.cut == 3 and cut.input_ids == whole.input_ids[:-3]


def test_nothing_left_to_learn_is_an_error():
    with pytest.raises(InputError, match="no response token within max_length 10"):
        encode(byte_tokenizer(TEMPLATES["plain"]), [QUESTION, ANSWER], None, 10)


def test_a_template_that_rewrites_earlier_turns_is_refused():
    template = "{{ messages | length }}{% for m in messages %}" + TURN + "{% endfor %}" + OPEN
    with pytest.raises(InputError, match="rewrites earlier turns"):
        encode(byte_tokenizer(template), [QUESTION, ANSWER], None, 2048)


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1).filter(str.strip), st.text(min_size=1).filter(lambda text: text.strip() == text))
def test_any_text_survives(question, answer):
    tokenizer = byte_tokenizer(TEMPLATES["plain"])
    encoded = encode(tokenizer, [Message("user", question), Message("assistant", answer)], None, 10**6)
    assert len(encoded.labels) == len(encoded.input_ids)
    tokens = [token for token in encoded.labels if token != IGNORED]
    assert tokens and tokens[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
