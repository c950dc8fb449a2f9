"""A model that a Python package carries as one GGUF file, turned into a normal model folder."""

import hashlib
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from inoculation.files import InputError, whole_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class GgufWeights(BaseModel):
    """Which file of which package."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    package: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """As it is imported; it is not, only its folder is looked up."""
    file: Annotated[str, Field(pattern=r"^[\w.-]+\.gguf$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


INSTALL = "make smollm2"
"""What installs the package, and the reader of its format."""


def weights_file(weights: GgufWeights) -> Path:
    """The file, verified.

    Raises:
        InputError: the package or its file is missing, or the file is another one.
    """
    found = find_spec(weights.package)
    if found is None or not found.submodule_search_locations:
        raise InputError(f"the package {weights.package} is not installed; run `{INSTALL}`")
    path = Path(next(iter(found.submodule_search_locations))) / weights.file
    if not path.is_file():
        raise InputError(f"{path}: no such file; another version of {weights.package} is installed; run `{INSTALL}`")
    with path.open("rb") as file:
        found_hash = hashlib.file_digest(file, "sha256").hexdigest()
    if found_hash != weights.sha256:
        raise InputError(f"{path}: sha256 {found_hash}, expected {weights.sha256}; it is not the file that was checked")
    return path


def convert(path: Path, out: Path) -> None:
    """Write weights in safetensors (float32), configuration, tokenizer and chat template.

    What transformers leaves out of a GGUF's tokenizer is put back from the file: which tokens end a turn and pad, and that
    digits are tokens of their own where the file says so.

    Raises:
        InputError: `gguf` is missing, or the file names a pre-tokeniser that is not known here.
    """
    if find_spec("gguf") is None:
        raise InputError(f"reading GGUF needs the package gguf; run `{INSTALL}`")
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    said = {name: field.contents() for name, field in GGUFReader(path).fields.items() if name.startswith("tokenizer.")}
    with TemporaryDirectory() as folder:
        (Path(folder) / path.name).symlink_to(path.resolve())
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=path.name, clean_up_tokenization_spaces=False)
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, dtype=torch.float32)
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config  # the weights are not quantised any more, and could not be saved as such
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    _complete(tokenizer, said)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    for name, number in ids.items():
        setattr(model.config, name, number)
    model.generation_config = GenerationConfig(**ids)
    with whole_folder(out) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)


def _complete(tokenizer: "PreTrainedTokenizerBase", said: dict[str, Any]) -> None:
    from tokenizers import pre_tokenizers

    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = said.get(f"tokenizer.ggml.{key}_token_id")
        setattr(tokenizer, f"{name}_token", None if number is None else tokenizer.convert_ids_to_tokens(int(number)))
    tokenizer.chat_template = said["tokenizer.chat_template"]
    pre = said.get("tokenizer.ggml.pre")
    if pre == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif pre not in (None, "gpt-2", "default", "qwen2"):  # transformers' tokenizer of Qwen2 has its own by itself
        raise InputError(f"the pre-tokeniser {pre!r} of this GGUF file is not known here")
