"""What tests launch in several processes, in a module that is quick to import there."""

import os
from collections.abc import Callable

from inoculation.files import InputError


def say(word: str, on_log: Callable[..., None]) -> str:
    """Log and return what the first process knows of itself."""
    told = os.environ["RANK"] + os.environ["WORLD_SIZE"] + word
    on_log(1, {"rank": float(os.environ["RANK"])})
    return told


def refuse(word: str, on_log: Callable[..., None]) -> None:
    """Refuse an input, as every process does."""
    raise InputError(f"{word}: valid: another")


def fail(word: str, on_log: Callable[..., None]) -> None:
    """Fail in the second process, while the first waits for it."""
    if os.environ["RANK"] == "1":
        raise RuntimeError(f"out of {word}")
    while True:
        pass
