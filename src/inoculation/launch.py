"""A function in several processes of this machine that train together, one a GPU: `accelerate launch`, as a call.

    launch(2, train, ref, settings, ..., on_log=log)     # what it returned in the first process

Each finds the others through the environment, as under `accelerate launch`, and asks accelerate's state how many they are. The
process that calls only listens, so that it is there to say what happened to them.
"""

import ctypes
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from inoculation.files import InputError
from inoculation.quiet import settle_libraries

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from torch.multiprocessing import ProcessContext

T = TypeVar("T")
OnLog = Callable[[int, dict[str, float]], None]

GRACE = 5
"""Seconds that the others have to end by themselves when one has failed."""


class Returned(NamedTuple):
    value: Any


def launch(processes: int, function: Callable[..., T], *arguments: Any, on_log: OnLog) -> T:
    """Call `function(*arguments, on_log)` in so many processes and return what it returned in the first.

    Args:
        processes: 1: in this one.
        function: of a module, so that another process finds it.
        on_log: called here with what the first process logs; the others print and log nothing.

    Raises:
        InputError: the function raised it in the first process.
        ChildProcessError: one failed or was killed; the others were stopped.
    """
    if processes == 1:
        return function(*arguments, on_log)
    import torch.multiprocessing as mp
    from accelerate.utils.other import get_free_port
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

    reader, writer = mp.get_context("spawn").Pipe(duplex=False)
    workers = mp.spawn(_work, (processes, get_free_port(), writer, function, arguments), processes, join=False)
    writer.close()
    returned: list[Returned] = []

    def hear(seconds: float = 0) -> None:
        with suppress(EOFError):
            while reader.poll(seconds):
                said = reader.recv()
                if isinstance(said, InputError):
                    raise said
                returned.append(said) if isinstance(said, Returned) else on_log(*said)

    try:
        while not workers.join(timeout=0, grace_period=GRACE):
            hear(0.1)
        hear()
    except (ProcessExitedException, ProcessRaisedException) as error:
        hear()
        raise ChildProcessError(
            f"of {processes} processes {_failures(workers, error.msg)}; all were stopped"
        ) from error
    finally:
        for process in workers.processes:
            process.kill()
            process.join()
    if not returned:
        raise ChildProcessError(f"of {processes} processes the first ended without a result")
    return returned[0].value


def _failures(workers: "ProcessContext", message: str) -> str:
    """Who was killed, for the others fail of that; else what the first to fail said last."""
    killed = [
        f"number {number} ended by {signal.Signals(-process.exitcode).name}"
        for number, process in enumerate(workers.processes)
        if (process.exitcode or 0) < 0 and process.exitcode != -signal.SIGTERM
    ]
    return ", ".join(killed) or f"one failed: {message.strip().splitlines()[-1]}"


def _work(
    rank: int, processes: int, port: int, writer: "Connection", function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """What each process runs."""
    # Whatever kills the stage kills this: waiting for the others on a GPU, it would hear of nothing for ten minutes.
    if prctl := getattr(ctypes.CDLL(None), "prctl", None):
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of <sys/prctl.h>
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    import torch

    settle_libraries()
    if rank:
        writer.close()
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)

    def on_log(step: int, metrics: dict[str, float]) -> None:
        if not rank:
            writer.send((step, metrics))

    try:
        value = function(*arguments, on_log)
    except InputError as error:
        if not rank:
            writer.send(error)
        raise
    if not rank:
        writer.send(Returned(value))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
