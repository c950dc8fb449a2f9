"""The reference corpora that explain latents: files of one's own, or of the hub."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from inoculation.chat import Message, parse_messages
from inoculation.files import InputError, fail_if, read_jsonl, read_yaml
from inoculation.stage import complaints
from inoculation.store import digest

Corpus = list[str | list[Message]] | Path
"""Texts and chats, or the .h5 file in which an SAE's author published strongest contexts."""


HUB = "hf://datasets/"


def corpus_file(name: str) -> Path:
    """The file of a reference corpus: a path, or `hf://datasets/<owner>/<name>/<file>` fetched from the hub.

    Raises:
        InputError: there is no such file.
    """
    if name.startswith(HUB):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        owner, _, rest = name.removeprefix(HUB).partition("/")
        dataset, _, file = rest.partition("/")
        if not file:
            raise InputError(f"{name}: {HUB}<owner>/<name>/<file> is expected")
        try:
            return Path(hf_hub_download(f"{owner}/{dataset}", file, repo_type="dataset"))
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise InputError(f"{name} cannot be fetched from the hub: {str(error).splitlines()[0]}") from error
    if not Path(name).is_file():
        raise InputError(f"{name}: no such file; a corpus is JSONL of chats or texts, or a published .h5")
    return Path(name)


def read_corpus(path: Path, limit: int) -> list[str | list[Message]]:
    """The first `limit` lines of a reference corpus: JSONL of {"messages": [...]} or {"text": ...}.

    Raises:
        InputError: the file is missing, empty or malformed (file and line).
    """

    def parse(raw: Any) -> str | list[Message]:
        if isinstance(raw, dict) and isinstance(raw.get("text"), str) and raw["text"].strip():
            return str(raw["text"])
        if isinstance(raw, dict) and "messages" in raw:
            return list(parse_messages(raw["messages"]))
        raise ValueError('an object with "messages" or a non-empty "text" is expected')

    rows = read_jsonl(path, parse)
    if not rows:
        raise InputError(f"{path}: no rows")
    return rows[:limit]


class Corpora(BaseModel):
    """A profile's reference corpora; the content of its `corpora.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    conversational: str
    """JSONL of chats or texts, a published .h5, or `hf://datasets/<owner>/<name>/<file>`."""
    pretraining: str
    digest: str | None = None
    """Of the local files."""

    def read(self, limit: int) -> dict[str, Corpus]:
        """The first `limit` texts of each, by name; a published .h5 is its path.

        Raises:
            InputError: a file is missing or malformed.
        """
        files = {name: corpus_file(getattr(self, name)) for name in ("conversational", "pretraining")}
        return {name: path if path.suffix == ".h5" else read_corpus(path, limit) for name, path in files.items()}


def named_corpora(path: Path) -> Corpora:
    """The corpora that a profile names: a folder of two files, or a file of hub/.

    Raises:
        InputError: the file of hub/ does not say both.
    """
    names = (
        {name: str(path / f"{name}.jsonl") for name in ("conversational", "pretraining")}
        if path.is_dir()
        else read_yaml(path)
    )
    try:
        corpora = Corpora.model_validate(names)
    except ValidationError as error:
        listed = "\n".join(f"  - {path}{complaint}" for complaint in complaints(error))
        raise InputError(f"the reference corpora cannot be used:\n{listed}") from None
    files = [Path(name) for name in (corpora.conversational, corpora.pretraining) if not name.startswith("hf://")]
    present = [file for file in files if file.is_file()]
    return corpora.model_copy(update={"digest": digest(*present) if present else None})


def local_corpora(path: Path) -> list[Path]:
    """The files of a profile's corpora that texts can be read from.

    Raises:
        InputError: there is none.
    """
    corpora = named_corpora(path)
    files = [Path(name) for name in (corpora.conversational, corpora.pretraining)]
    problems = [f"{file}: no such file" for file in files if not file.is_file() or file.suffix == ".h5"]
    fail_if(problems, f"{path}: an SAE is trained on corpora of chats or texts in JSONL")
    return files
