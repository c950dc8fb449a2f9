"""Models and SAEs that cannot be used are refused before anything is loaded, with every reason at once."""

import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from inoculation import lm
from inoculation.detect.sae import rank
from inoculation.detect.sae.encoder import check_sae, decoder_for, load_sae
from inoculation.detect.sae.features import Means, Piece
from inoculation.files import InputError
from inoculation.lm import ModelShape, check_model, local_folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def model(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny / "models/qwen2", tmp_path / "model"))


@pytest.fixture
def sae(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny / "sae", tmp_path / "sae"))


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ---- models


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./none", "../none", "data/none", "data/none/model", "a/b/c", "none", "~/none"]
)
def test_a_name_that_can_only_be_a_folder_is_not_looked_up_on_the_hub(name):
    for call in (
        lambda: check_model(name, None),
        lambda: lm.load_tokenizer(lm.ModelRef(model=name)),
        lambda: lm.load_model(lm.ModelRef(model=name)),
    ):
        with pytest.raises(
            InputError, match="no such folder; valid: a model's folder, or a hub id of the form owner/name"
        ):
            call()


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen2.5-7B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", "google/gemma-3-4b-it"]
)
def test_a_hub_id_is_known_by_its_form(name):
    assert local_folder(name) is None and check_model(name, "abc") is None


def test_a_model_that_can_be_used(model):
    assert check_model(str(model), None) == ModelShape(128, 2)


def test_every_fault_of_a_folder_is_listed(model):
    (model / "config.json").unlink()
    next(model.glob("*.safetensors")).rename(model / "pytorch_model.bin")
    (model / "chat_template.jinja").unlink()
    with pytest.raises(InputError) as error:
        check_model(str(model), "main")
    for part in (
        "revision 'main': a folder has none",
        "no config.json",
        "pytorch_model.bin: a pickle, which can run any code when it is loaded; convert it",
        "has no chat template",
    ):
        assert part in str(error.value)


def test_pickled_weights_are_not_read(model):
    """A checkpoint as transformers 4 wrote it: `from_pretrained` would unpickle it."""
    from safetensors.torch import load_file

    weights = next(model.glob("*.safetensors"))
    torch.save(load_file(weights), model / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(InputError, match=r"pytorch_model\.bin: a pickle"):
        check_model(str(model), None)
    with pytest.raises(InputError, match="cannot be loaded"):
        lm.load_model(lm.ModelRef(model=str(model)))


def test_weights_that_are_cut_or_missing(model):
    weights = next(model.glob("*.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors: not readable as safetensors"):
        check_model(str(model), None)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001.safetensors"}}))
    weights.write_bytes(content)
    with pytest.raises(
        InputError, match=r"model-00001\.safetensors: no such file, model\.safetensors\.index\.json names it"
    ):
        check_model(str(model), None)


def test_folders_that_are_no_model(model, tmp_path):
    edit(model / "config.json", vocab_size=10)
    with pytest.raises(InputError, match="the tokenizer has 1500 tokens, the model 10: they do not belong together"):
        check_model(str(model), None)
    edit(model / "config.json", model_type="resnet")
    with pytest.raises(InputError, match=r"config\.json is not a language model's"):
        check_model(str(model), None)
    (model / "config.json").rename(model / "adapter_config.json")
    with pytest.raises(InputError, match="it is an adapter, the base model's folder is needed"):
        check_model(str(model), None)
    (tmp_path / "file.gguf").write_text("x")
    with pytest.raises(InputError, match="no such folder"):
        check_model(str(tmp_path / "file.gguf"), None)


def test_a_folders_own_code_is_neither_run_nor_asked_about(model, monkeypatch):
    """transformers asks at the terminal, and `yes` is an answer."""
    (model / "own.py").write_text("from pathlib import Path\nPath('ran').touch()\nclass A: pass\n")
    classes = {"AutoConfig": "own.A", "AutoModelForCausalLM": "own.A"}
    edit(model / "config.json", model_type="own", auto_map=classes)
    edit(model / "tokenizer_config.json", tokenizer_class="A", auto_map={"AutoTokenizer": ["own.A", "own.A"]})
    monkeypatch.chdir(model)
    asked = []
    monkeypatch.setattr("builtins.input", lambda *prompt: asked.append(prompt) or "y")
    ref = lm.ModelRef(model=str(model))
    for call in (lambda: check_model(str(model), None), lambda: lm.load_tokenizer(ref), lambda: lm.load_model(ref)):
        with pytest.raises(InputError, match="cannot be"):
            call()
    assert not asked and not Path("ran").exists()


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size"])
def test_a_configuration_beyond_its_weights_is_not_built(model, key):
    """A hundred million layers: transformers would lay them out, and this machine would end."""
    edit(model / "config.json", **{key: 10**8})
    with pytest.raises(InputError, match=f"{key} 100000000, and the weights have 2[0-9] tensors, at most 1500 long"):
        check_model(str(model), None)
    edit(model / "config.json", **{key: 1}, text_config={key: 10**8})
    with pytest.raises(InputError, match=f"{key} 100000000"):
        check_model(str(model), None)


@pytest.mark.parametrize(
    "change",
    [{"shape": [10**9, 10**9]}, {"data_offsets": [0, 10**15]}, {"data_offsets": [0, 8]}, {"dtype": "F64"}, None],
    ids=["shape", "beyond the file", "overlap", "type", "length"],
)
def test_weights_whose_header_lies(model, change):
    path = next(model.glob("*.safetensors"))
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    first = next(name for name in header if name != "__metadata__")
    header[first] |= change or {}
    told = json.dumps(header).encode()
    size = len(told) if change else 2**62
    path.write_bytes(size.to_bytes(8, "little") + told + content[8 + length :])
    with pytest.raises(InputError, match=r"model\.safetensors: not readable as safetensors"):
        check_model(str(model), None)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[]"), ("tokenizer.json", "[]"), ("tokenizer.json", '{"model": {"vocab": 3}}'), ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": 3}'), ("model.safetensors.index.json", "[]"),
        ("model.safetensors.index.json", '{"weight_map": {"a": [1]}}'), ("model.safetensors.index.json", '{"weight_map": {"a": "../../x"}}'),
    ],
)  # fmt: skip
def test_files_of_a_model_that_say_something_else(model, name, content):
    (model / name).write_text(content)
    with pytest.raises(InputError, match="cannot be used"):
        check_model(str(model), None)


# ---- SAEs


def test_an_sae_that_fits(sae, model):
    shape = check_sae(str(sae), None, check_model(str(model), None))
    assert shape is not None and (shape.width, shape.latents) == (128, 1024)
    assert check_sae("qwen2.5-7b-instruct-andyrdt", "resid_post_layer_15_trainer_1", None) is None


def test_a_wrong_width_and_block_are_refused_without_loading_weights(sae, model):
    with pytest.raises(InputError) as error:
        check_sae(str(sae), "layer_3", ModelShape(64, 1))
    for part in (
        "sae.id 'layer_3': a folder holds one SAE",
        "it reads block 1; the model has 1, valid: 0 to 0",
        "it reads a residual stream of width 128, the model's has 64",
    ):
        assert part in str(error.value)
    edit(sae / "cfg.json", d_in=64, metadata={"hook_name": "blocks.0.hook_mlp_out"})
    with pytest.raises(InputError) as error:
        check_sae(str(sae), None, ModelShape(128, 2))
    assert "the decoder is [1024, 128], cfg.json says [1024, 64]" in str(error.value)
    assert "it reads 'blocks.0.hook_mlp_out'" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [("[]", "d_in, d_sae and metadata.hook_name are needed"), ("{", "not valid JSON"), (None, "no such file")],
)
def test_a_folder_that_is_no_sae(sae, content, message):
    (sae / "cfg.json").unlink()
    if content is not None:
        (sae / "cfg.json").write_text(content)
    with pytest.raises(InputError, match=message):
        check_sae(str(sae), None, None)


def test_names_that_sae_lens_does_not_know():
    with pytest.raises(InputError, match="neither a folder nor a release"):
        check_sae("data/none/sae", None, None)
    with pytest.raises(InputError, match=r"sae\.id None is not in release"):
        check_sae("qwen2.5-7b-instruct-andyrdt", None, None)


def test_a_loaded_sae_of_another_width_is_refused(sae, model):
    loaded = load_sae(str(sae), None, "cpu")
    loaded.sae.cfg.d_in = 64
    with pytest.raises(InputError, match="the SAE reads a residual stream of width 64, the model's has 128"):
        decoder_for(loaded, lm.load_model(lm.ModelRef(model=str(model))))


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


@pytest.fixture
def release(tmp_path, monkeypatch):
    """A release on the hub whose SAE is a pickle, `ae.pt`, as the `andyrdt` ones are: (release, id, its file)."""
    from sae_lens.loading import pretrained_sae_loaders

    monkeypatch.chdir(tmp_path)
    trainer = {
        "layer": 15, "activation_dim": 4, "dict_size": 8, "k": 2, "dict_class": "BatchTopKSAE", "lm_name": "Qwen/Qwen2.5-7B-Instruct",
        "submodule_name": "resid_post_layer_15",
    }  # fmt: skip
    Path("config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    monkeypatch.setattr(pretrained_sae_loaders, "hf_hub_download", lambda repo_id, filename, **_: Path(filename).name)
    return "qwen2.5-7b-instruct-andyrdt", "resid_post_layer_15_trainer_1", Path("ae.pt")


def weights() -> dict[str, torch.Tensor]:
    return {
        "encoder.weight": torch.ones(8, 4), "encoder.bias": torch.zeros(8), "decoder.weight": torch.ones(4, 8),
        "b_dec": torch.zeros(4), "threshold": torch.tensor(0.5), "k": torch.tensor(2),
    }  # fmt: skip


def test_a_pickled_release_is_read_without_running_its_code(release):
    name, sae_id, file = release
    torch.save(weights(), file)
    loaded = load_sae(name, sae_id, "cpu")
    assert loaded.block == 15 and loaded.sae.cfg.d_in == 4
    torch.save(weights() | {"k": Bomb()}, file)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_sae(name, sae_id, "cpu")
    assert not Path("exploded").exists()


def test_a_release_is_not_loaded_where_unpickling_is_allowed(release, monkeypatch):
    name, sae_id, file = release
    torch.save({"k": Bomb()}, file)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(InputError, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD lets a downloaded SAE run code; unset it"):
        load_sae(name, sae_id, "cpu")
    assert not Path("exploded").exists()


# ---- rankings


def test_the_significance_test_reads_rows_of_either_kind_where_they_alternate():
    rng = np.random.default_rng(0)
    n, shows = 1200, np.arange(1200) % 2 == 0
    values = rng.normal(size=(n, 40)).clip(0) + shows[:, None] * (np.arange(40) < 20) * 2.0
    target, base = (
        csr_matrix(values.astype(np.float32)),
        csr_matrix(rng.normal(size=(n, 40)).clip(0).astype(np.float32)),
    )
    means = Means(target, base, base)
    pieces = [Piece(np.arange(n), np.ones(n, bool), means, means)]
    found = rank.component(pieces, rank.moments(pieces, "whole"))
    assert found.variance > 2 * found.floor and found.loadings.any()


def test_one_example_cannot_be_ranked():
    means = Means(*(csr_matrix(np.ones((1, 5), np.float32)) for _ in range(3)))
    pieces = [Piece(np.arange(1), np.ones(1, bool), means, means)]
    with pytest.raises(InputError, match="no latent differs between the 1 examples"):
        rank.component(pieces, rank.moments(pieces, "whole"))
