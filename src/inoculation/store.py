"""What outlives a stage, in the main checkout: unfinished work, answers that cells share, those of LLMs, MLflow's store.

Queued DVC experiments run in a copy of the checkout that is deleted afterwards.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main_checkout() -> Path:
    """The checkout that keeps what outlives a stage. Queued DVC experiments run in `<it>/.dvc/tmp/exps/<name>`."""
    here = Path(os.environ.get("DVC_ROOT") or Path.cwd()).resolve()
    for parent in here.parents:
        if parent.name == "exps" and parent.parent.name == "tmp" and parent.parent.parent.name == ".dvc":
            return parent.parent.parent.parent
    return here


def llm_cache() -> Path:
    """Answers of LLM roles, shared by all stages and queued experiments."""
    return main_checkout() / ".cache" / "llm.sqlite"


def kept(stage: str, *inputs: Any) -> Path:
    """Where a result is kept that cells share though their stages differ, named by everything that it depends on.

    Args:
        stage: whose result, for a person who looks.
        inputs: as for `unfinished`, inside of which it is written.
    """
    return main_checkout() / ".cache" / "kept" / f"{stage}-{digest(*inputs)}.jsonl"


def digest(*parts: Any) -> str:
    """Short SHA-256 of JSON-able values; a `Path` counts by the content of its file, or of its folder's files."""
    hasher = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path) and part.is_dir():
            files = sorted(path for path in part.rglob("*") if path.is_file())
            own = hashlib.sha256(digest(*(str(path.relative_to(part)) for path in files), *files).encode())
        elif isinstance(part, Path):
            with part.open("rb") as file:
                own = hashlib.file_digest(file, "sha256")
        else:
            own = hashlib.sha256(json.dumps(part, sort_keys=True).encode())
        hasher.update(own.digest())
    return hasher.hexdigest()[:16]


def last_checkpoint(work: Path) -> Path | None:
    """The trainer's newest checkpoint that is whole; None: there is none. A kill or a full disk may leave half of one.

    The trainer's state is the last file that it writes.
    """
    whole = {}
    for state in work.glob("checkpoint-*/trainer_state.json"):
        with suppress(ValueError, KeyError, TypeError):
            step = json.loads(state.read_bytes())["global_step"]
            if state.parent.name == f"checkpoint-{step}":
                whole[step] = state.parent
    return whole[max(whole)] if whole else None


@contextmanager
def unfinished(stage: str, *inputs: Any) -> Iterator[Path]:
    """A folder for a stage's unfinished work: found again after an interruption, removed when the block ends well.

    It is named by everything that the work depends on, this checkout's code and the libraries among it, so that only the same
    work is ever continued, and belongs to one process at a time: a second worker with the same work (two queued experiments
    that need the same base responses) waits for the first, and continues from what that one left.

    Args:
        stage: of which command, for a person who looks.
        inputs: what the outcome depends on, as `digest` takes it.
    """
    from filelock import FileLock, Timeout

    folder = main_checkout() / ".cache" / "work" / f"{stage}-{digest(*inputs, _code())}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process is at the same work ({folder.name}); waiting for what it makes", flush=True)
        mark = folder.with_name(f"{folder.name}.waiting-{os.getpid()}")
        with FileLock(mark):  # of a process that was killed it is held no longer
            lock.acquire()
        mark.unlink(missing_ok=True)
    try:
        folder.mkdir(exist_ok=True)
        yield folder
        if not any([_held(mark) for mark in folder.parent.glob(f"{folder.name}.waiting-*")]):
            shutil.rmtree(folder)
    finally:
        lock.release()


def _held(mark: Path) -> bool:
    """Whether a process waits behind a mark; where none does any more, the mark goes."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(mark, timeout=0):
            mark.unlink(missing_ok=True)
    except Timeout:
        return True
    return False


def _code() -> list[Any]:
    """What a queued cell of another commit, or an upgraded library, would do otherwise with the same inputs."""
    own = digest(*sorted(Path(__file__).parent.rglob("*.py")))
    return [own, *(version(library) for library in ("torch", "transformers", "peft", "trl"))]
