"""Where an experiment cell's files are. dvc.yaml spells the same paths with ${...}; a test keeps the two alike."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from inoculation.params import Params

FROM_PROFILE = "data/from_profile"
"""The value of `mixture.source` that means: build the mixture from the profile's trait data."""


def profile_dir(params: Params) -> Path:
    return Path("data") / params.profile


def mixture_dir(params: Params) -> Path:
    m = params.mixture
    return profile_dir(params) / f"{m.positive}+{m.negative}-{m.contamination}" / f"seed{params.seed}"


def assignment(params: Params) -> Path:
    return mixture_dir(params) / "assign" / f"{params.group}.jsonl"


def assignment_summary(params: Params) -> Path:
    return assignment(params).with_suffix(".json")


def sae_dir(params: Params) -> Path:
    return mixture_dir(params) / "sae"


def audit_dir(params: Params) -> Path:
    return mixture_dir(params) / "audit"


def llm_cache() -> Path:
    """Answers of LLM roles, shared by all stages and queued experiments."""
    return main_checkout() / ".cache" / "llm.sqlite"


def group_dir(params: Params) -> Path:
    return mixture_dir(params) / params.group


def mixture_name(params: Params) -> str:
    """Name of the mixture for a person: its traits and contamination, or the file it was read from."""
    m = params.mixture
    return f"{m.positive}+{m.negative}-{m.contamination}" if m.source == FROM_PROFILE else Path(m.source).stem


def main_checkout() -> Path:
    """The checkout that keeps what outlives a stage. Queued DVC experiments run in `<it>/.dvc/tmp/exps/<name>`."""
    here = Path(os.environ.get("DVC_ROOT") or Path.cwd()).resolve()
    for parent in here.parents:
        if parent.name == "exps" and parent.parent.name == "tmp" and parent.parent.parent.name == ".dvc":
            return parent.parent.parent.parent
    return here


def digest(*parts: Any) -> str:
    """Short SHA-256 of JSON-able values; a `Path` counts by the content of its file."""
    hasher = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else json.dumps(part, sort_keys=True).encode()
        hasher.update(hashlib.sha256(data).digest())
    return hasher.hexdigest()[:16]


def work_dir(stage: str, *inputs: Any) -> Path:
    """Where a stage keeps unfinished work. Named by its inputs, so that only the same work is ever continued."""
    return main_checkout() / ".cache" / "work" / f"{stage}-{digest(*inputs)}"
