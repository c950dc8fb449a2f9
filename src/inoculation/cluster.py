"""A function over units of work, in this process or on a Ray cluster's actors, with the same results.

    for answers in each(model, None, make, batches):        # in this process, by this model
    for answers in each(None, workers, make, batches):      # Ray Data: an actor a GPU, each with a model of its own

A unit is what is computed at once, and carries its own seed: who computes it, and beside what, is nothing that it depends on.
"""

import logging
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from inoculation.files import InputError
from inoculation.quiet import settle_libraries

if TYPE_CHECKING:
    from ray.data import Dataset

M = TypeVar("M")
U = TypeVar("U")
R = TypeVar("R")


class Workers(NamedTuple):
    """Who works on a cluster."""

    address: str
    """Of the cluster, as `ray.init` takes it; `local` starts one here."""
    load: Callable[[], Any]
    """What each worker loads once; of a module, or a `partial` of one, so that it can be sent there."""


def workers(address: str, load: Callable[[], Any]) -> Workers | None:
    """Who works where params.yaml names a cluster; None: this process.

    Raises:
        InputError: Ray is not installed, or there is no such cluster.
    """
    if not address:
        return None
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError(
            f"cluster.address: {address!r} needs Ray: {error}; valid: pip install --editable '.[ray]', or leave it empty"
        ) from None
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Workers run the code of the checkout that calls, whichever is installed there.
        path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
        options = {"include_dashboard": False} if address == "local" else {}
        try:
            ray.init(
                address=address, log_to_driver=False, logging_level=logging.ERROR,
                runtime_env={"env_vars": {"PYTHONPATH": path}}, **options,
            )  # fmt: skip
        except (ConnectionError, RuntimeError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise InputError(f"cluster.address: {address!r}: {first}; valid: local, auto, HOST:PORT") from None
    return Workers(address, load)


def device() -> str:
    """Where a cluster's workers compute, `cuda` or `cpu`."""
    import ray

    return "cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"


def each(
    model: M | None,
    workers: Workers | None,
    make: Callable[[M], AbstractContextManager[Callable[[U], R]]],
    units: Sequence[U],
) -> Iterator[R]:
    """The result of every unit, in their order, as they come.

    A worker that dies loses the unit that it was at, which another computes; one that raises ends the work.

    Args:
        model: what `make` is given in this process; a cluster's workers load their own.
        make: gives the function of a unit, once a worker; of a module, or a `partial` of one.

    Raises:
        InputError: a worker raised it.
        ChildProcessError: a worker raised anything else, or the cluster failed.
    """
    if workers is None:
        with make(model) as work:  # type: ignore[arg-type]
            yield from map(work, units)
        return
    if not units:
        return
    import ray
    import ray.data
    import torch
    from ray import cloudpickle

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the caller has one
    context.execution_options.preserve_order = True
    for name in ("ray.data", "ray._private"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # As many threads as here: another number sums in another order.
    threads = torch.get_num_threads()
    needs = {"num_gpus": 1} if device() == "cuda" else {"num_cpus": threads}
    there = ray.cluster_resources()
    most = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
    if threads > most and "num_cpus" in needs:
        raise InputError(
            f"cluster.address: {workers.address!r}: this process computes with {threads} threads, and no node has as many cores; "
            f"valid: OMP_NUM_THREADS={int(most)} or fewer"
        )
    count = int(there["GPU"]) if "num_gpus" in needs else int(there["CPU"]) // threads
    rows = [{"number": number, "unit": cloudpickle.dumps(unit)} for number, unit in enumerate(units)]
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        Worker,
        fn_constructor_args=(Path.cwd(), threads, workers.load, make),
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=max(1, min(count, len(rows)))),
        **needs,
    )
    for number, row in enumerate(_rows(results, workers)):
        if row["number"] != number:
            raise ChildProcessError(f"cluster: unit {row['number']} came in the place of {number}")
        done = cloudpickle.loads(row["result"])
        if isinstance(done, InputError):
            raise done
        if isinstance(done, Failed):
            raise ChildProcessError(
                f"cluster {workers.address!r}: unit {number} of {len(rows)} failed: {done.error}\n{done.trace}"
            )
        yield done


def _rows(results: "Dataset", workers: Workers) -> Iterator[dict[str, Any]]:
    """What comes from the cluster, whose own failures are the machine's."""
    from ray.exceptions import RayError

    try:
        yield from results.iter_rows()
    except RayError as error:
        said = str(error).strip() or type(error).__name__
        raise ChildProcessError(f"cluster {workers.address!r} failed: {said.splitlines()[0]}") from error


class Failed(NamedTuple):
    """What a worker raised. Raised there, Ray would try it again and then tell it in a page of its own."""

    error: str
    trace: str


class Worker:
    """An actor: what it loaded, for one unit at a time."""

    def __init__(
        self,
        folder: Path,
        threads: int,
        load: Callable[[], Any],
        make: Callable[[Any], AbstractContextManager[Callable[[Any], Any]]],
    ) -> None:
        import torch

        os.chdir(folder)
        torch.set_num_threads(threads)
        settle_libraries()
        self.make: Callable[[], Callable[[Any], Any]] = lambda: ExitStack().enter_context(make(load()))
        self.work: Callable[[Any], Any] | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import numpy as np
        from ray import cloudpickle

        result = np.empty(1, dtype=object)
        try:
            self.work = self.work or self.make()
            result[0] = cloudpickle.dumps(self.work(cloudpickle.loads(batch["unit"][0])))
        except InputError as error:
            result[0] = cloudpickle.dumps(error)
        except Exception as error:
            result[0] = cloudpickle.dumps(Failed(f"{type(error).__name__}: {error}", traceback.format_exc()))
        return {"number": batch["number"], "result": result}
