"""A model that Python packages carry as a GGUF file, turned into a normal model folder."""

import hashlib
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from inoculation.files import InputError, whole_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Piece(BaseModel):
    """A file of a package."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    package: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """As it is imported; it is not, only its folder is looked up."""
    file: Annotated[str, Field(pattern=r"^(\w[\w.-]*/)*\w[\w.-]*$")]


class GgufWeights(BaseModel):
    """A GGUF file that packages carry, whole or in pieces."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    install: str
    """The command that installs the packages, and the reader of the format."""
    pieces: Annotated[list[Piece], Field(min_length=1)]
    """In the file's order."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the whole file."""


def located(weights: GgufWeights) -> list[Path]:
    """Where the pieces are; nothing is imported, nothing read.

    Raises:
        InputError: a package or its file is missing.
    """
    files = []
    for piece in weights.pieces:
        found = find_spec(piece.package)
        if found is None or not found.submodule_search_locations:
            raise InputError(f"the package {piece.package} is not installed; run `{weights.install}`")
        path = Path(next(iter(found.submodule_search_locations))) / piece.file
        if not path.is_file():
            raise InputError(
                f"{path}: no such file; another version of {piece.package} is installed; run `{weights.install}`"
            )
        files.append(path)
    return files


def verified(weights: GgufWeights) -> list[Path]:
    """The pieces, read once to see that they are what was checked.

    Raises:
        InputError: one is missing, or together they are another file.
    """
    files, digest = located(weights), hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    if digest.hexdigest() != weights.sha256:
        raise InputError(
            f"{', '.join(map(str, files))}: sha256 {digest.hexdigest()}, expected {weights.sha256}; it is not what was checked: "
            f"`pip uninstall {' '.join(piece.package for piece in weights.pieces)}`, then `{weights.install}`"
        )
    return files


def convert(files: Sequence[Path], out: Path) -> None:
    """Write weights in safetensors (float32), configuration, tokenizer and chat template of a GGUF file, given in pieces.

    What transformers leaves out of a GGUF's tokenizer is put back from the file: which tokens end a turn and pad, and that
    digits are tokens of their own where the file says so.

    Raises:
        InputError: `gguf` is missing, or the file names a pre-tokeniser that is not known here.
    """
    if find_spec("gguf") is None:
        raise InputError("reading GGUF needs the package gguf; run `make smollm2`")
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    with TemporaryDirectory() as folder:
        path = joined(files, Path(folder) / "model.gguf")
        told = GGUFReader(path).fields.items()
        said = {name: field.contents() for name, field in told if name.startswith("tokenizer.")}
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


def joined(files: Sequence[Path], path: Path) -> Path:
    """The pieces as one file at `path`; one piece is linked to."""
    if len(files) == 1:
        path.symlink_to(files[0].resolve())
        return path
    with path.open("wb") as whole:
        for piece in files:
            with piece.open("rb") as file:
                shutil.copyfileobj(file, whole)
    return path


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
