"""How long commands took on this machine: what `plan`, `study` and `inoculate` estimate from."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from inoculation.store import main_checkout


def path() -> Path:
    """One JSON object a command that ran: `step`, `profile`, `seconds`; of a whole data set of one's own also `rows`."""
    return main_checkout() / ".cache" / "timings.jsonl"


def noted() -> list[dict[str, Any]]:
    """Everything noted so far, oldest first, but lines that a kill or a full disk cut: notes are no results."""
    rows = []
    for line in path().read_bytes().splitlines() if path().exists() else ():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def note(step: str, profile: str | None, seconds: float, **more: Any) -> None:
    """Note how long something took. Where no note can be written, what took so long is finished all the same."""
    line = json.dumps({"step": step, "profile": profile, "seconds": round(seconds, 2), **more})
    with suppress(OSError):
        path().parent.mkdir(parents=True, exist_ok=True)
        with path().open("a", encoding="utf-8") as out:
            out.write(f"\n{line}\n")  # apart from one that was cut
