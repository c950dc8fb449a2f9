"""Which GPU a stage gets, where a machine has several: the one that the fewest stages are at.

Whoever runs several at once (`inoculation study --jobs`, `dvc queue start --jobs`, two terminals) needs to spread nothing.
What a killed stage held is free at once.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA takes them; found without loading its libraries."""
    if (named := os.environ.get(VISIBLE)) is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    there = [path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    return [str(number) for number in range(len(there))]


@contextmanager
def one(locks: Path) -> Iterator[None]:
    """Leave this process, and those that it starts, one visible GPU: where there are several, that which the fewest hold.

    With more than one transformers' trainer would wrap the model for all, which TRL refuses.

    Args:
        locks: folder that all stages share which share the GPUs; a lock is held until the block ends.
    """
    from filelock import FileLock, Timeout

    names = visible()
    if len(names) < 2:
        yield
        return
    locks.mkdir(parents=True, exist_ok=True)
    for place, name in ((place, name) for place in count() for name in names):
        lock = FileLock(locks / f"{name}.{place}")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        os.environ[VISIBLE] = name
        try:
            yield
        finally:
            os.environ[VISIBLE] = ",".join(names)
            lock.release()
        return
