"""Which GPUs a stage gets, where a machine has several: those that the fewest stages are at.

Whoever runs several at once (`inoculation study --jobs`, `dvc queue start --jobs`, two terminals) needs to spread nothing.
What a killed stage held is free at once.
"""

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

from inoculation.files import InputError

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA takes them; found without loading its libraries."""
    if (named := os.environ.get(VISIBLE)) is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    there = [path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    return [str(number) for number in range(len(there))]


@contextmanager
def some(locks: Path, wanted: int) -> Iterator[None]:
    """Leave this process, and those that it starts, some visible GPUs: where there are more, those which the fewest hold.

    With more than one in a process transformers' trainer would wrap the model for all, which TRL refuses.

    Args:
        locks: folder that all stages share which share the GPUs; a lock is held until the block ends.
        wanted: how many; where there is none, a CPU does it.

    Raises:
        InputError: there are fewer.
    """
    from filelock import FileLock, Timeout

    names = visible()
    if not names or len(names) == wanted == 1:
        yield
        return
    if wanted > len(names):
        raise InputError(f"cluster.processes: {wanted}, but {len(names)} GPU(s) are visible; valid: at most as many")
    locks.mkdir(parents=True, exist_ok=True)
    taken: list[str] = []
    with ExitStack() as held:
        for place, name in ((place, name) for place in count() for name in names):
            if name in taken:
                continue
            lock = FileLock(locks / f"{name}.{place}")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            held.callback(lock.release)
            taken.append(name)
            if len(taken) == wanted:
                break
        os.environ[VISIBLE] = ",".join(taken)
        try:
            yield
        finally:
            os.environ[VISIBLE] = ",".join(names)
