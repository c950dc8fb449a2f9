"""How long commands took on this machine: what `plan`, `study` and `inoculate` estimate from."""

import json
from pathlib import Path
from typing import Any

from inoculation.files import read_jsonl
from inoculation.store import main_checkout


def path() -> Path:
    """One JSON object a command that ran: `step`, `profile`, `seconds`; of a whole data set of one's own also `rows`."""
    return main_checkout() / ".cache" / "timings.jsonl"


def noted() -> list[dict[str, Any]]:
    """Everything noted so far, oldest first."""
    return read_jsonl(path(), dict) if path().exists() else []


def note(step: str, profile: str | None, seconds: float, **more: Any) -> None:
    """Note how long something took."""
    path().parent.mkdir(parents=True, exist_ok=True)
    with path().open("a", encoding="utf-8") as out:
        out.write(json.dumps({"step": step, "profile": profile, "seconds": round(seconds, 2), **more}) + "\n")
