"""A profile: a model, an SAE, and the names of shared blocks; and what each stage reads of it, pinned.

A profile names a local folder, or a small file in hub/ that says which artefact of the Hugging Face hub is meant: both are
paths that DVC can watch. Pinned, it is a folder of small JSON files, one for each thing that a stage may depend on, so
that another learning rate trains again and does not sample the base model again.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from inoculation import lm
from inoculation.detect.sae.corpora import named_corpora
from inoculation.detect.sae.encoder import PinnedSae, check_sae
from inoculation.detect.sae.settings import FlagRule
from inoculation.files import InputError, fail_if, read_yaml
from inoculation.respond import SampleSettings
from inoculation.roles import Roles
from inoculation.server import ApiBase, ServerSettings
from inoculation.stage import complaints
from inoculation.store import digest
from inoculation.train import TrainSettings

Text = Annotated[str, Field(min_length=1, pattern=r"\S")]


class Profile(BaseModel):
    """One entry of `profiles` in params.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: Text
    """A model folder, or a file of hub/ with `model` and `revision`."""
    dtype: Literal["float32", "bfloat16", "float16"]
    load_in_4bit: bool
    sae: Text
    """An SAE folder, or a file of hub/ with `release` and `id`."""
    corpora: Text
    """A folder with conversational.jsonl and pretraining.jsonl, or a file of hub/ that names both."""
    roles: Text
    """A key of `roles`."""
    train: Text
    """A key of `train`."""
    auditor: Literal["local", "llm"]
    """Who audits for the group inoc_llm."""
    flag_rule: FlagRule
    """Which rule of the SAE route counts."""
    max_new_tokens: Annotated[int, Field(ge=1)]
    machine: lm.Machine
    api_base: ApiBase
    """Of the server that samples answers; empty: this process."""


def named(path: Path, *keys: str) -> dict[str, Any]:
    """What a file of hub/ says, or nothing for a folder.

    Raises:
        InputError: the file is no mapping of these keys.
    """
    said = read_yaml(path) if path.is_file() else {}
    if not isinstance(said, dict) or not set(said) <= set(keys):
        raise InputError(f"{path}: a mapping is expected; valid keys: {', '.join(keys)}")
    return said


def settings(profile: Profile, roles: Roles, train: TrainSettings) -> dict[str, Any]:
    """What params.yaml alone says of what is pinned: file name -> JSON-able content."""
    return {
        "sampling.json": SampleSettings(max_new_tokens=profile.max_new_tokens).model_dump(),
        "machine.json": profile.machine.model_dump(),
        "server.json": ServerSettings(api_base=profile.api_base).model_dump(),
        "train.json": train.model_dump(),
        "flag_rule.json": profile.flag_rule,
        **{f"roles/{name}.json": role for name, role in roles.model_dump().items()},
    }


def model_pin(profile: Profile) -> dict[str, Any]:
    """Which model a profile means: a folder by its content, an artefact of the hub by its name.

    Raises:
        InputError: it is missing, or malformed.
    """
    _there(profile, "model")
    model = Path(profile.model)
    if model.is_dir():
        lm.check_model(str(model), None)
    said = {"model": str(model), "digest": digest(model)} if model.is_dir() else named(model, "model", "revision")
    try:
        ref = lm.ModelRef(**said, dtype=profile.dtype, load_in_4bit=profile.load_in_4bit)
    except ValidationError as error:
        raise InputError(f"the profile cannot be used: {model}{next(complaints(error))}") from None
    return ref.model_dump()


def pins(profile: Profile, roles: Roles, train: TrainSettings) -> dict[str, Any]:
    """What is pinned of a profile: file name -> JSON-able content.

    Raises:
        InputError: the model is missing or malformed (all that is wrong is listed).
    """
    return {"model.json": model_pin(profile), **settings(profile, roles, train)}


def sae_pins(profile: Profile) -> dict[str, Any]:
    """What is pinned of a profile's SAE and reference corpora.

    Raises:
        InputError: the SAE or a corpus is missing or malformed, or the SAE does not fit the model (all are listed).
    """
    _there(profile, "model", "sae", "corpora")
    model, sae, corpora = (Path(name) for name in (profile.model, profile.sae, profile.corpora))
    problems: list[str] = []
    found: dict[str, Any] = {}
    try:
        if sae.is_dir():
            check_sae(str(sae), None, lm.check_model(str(model), None) if model.is_dir() else None)
    except InputError as error:
        problems.append(str(error))
    try:
        said = {"release": str(sae), "digest": digest(sae)} if sae.is_dir() else named(sae, "release", "id")
        found["sae.json"] = PinnedSae(**said).model_dump()
        found["corpora.json"] = named_corpora(corpora).model_dump()
    except ValidationError as error:
        problems += complaints(error)
    fail_if(problems, "the profile's SAE cannot be used")
    return found


def _there(profile: Profile, *keys: str) -> None:
    missing = [
        f"{key}: {getattr(profile, key)}: no such file or folder"
        for key in keys
        if not Path(getattr(profile, key)).exists()
    ]
    fail_if(missing, "the profile cannot be used")
