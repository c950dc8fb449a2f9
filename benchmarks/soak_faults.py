"""Faults at random moments in every long stage: is the outcome, after a second call, what it would have been?

    python benchmarks/soak_faults.py --rounds 3 --cells 500      # `make soak-faults`

In a temporary folder, with the tests' tiny world. Each stage is run once whole; then, in every round, it is ended by SIGKILL and
by SIGTERM at a moment drawn from its duration, and run on a disk that becomes full (a tmpfs, where mounts are allowed; else a
limit on the size of files); after each it is called again, and its outputs are compared byte by byte. Last, a store with many
rows: how long MLflow's run list takes. Prints a JSON line for every stage and fault, and ends with 1 if anything differed.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1] / "tests"))

import yaml  # noqa: E402
from conftest import Project, copied, warm_socket  # noqa: E402
from test_stores import mlflow_server  # noqa: E402

from inoculation import plan  # noqa: E402
from inoculation.stage import Writes  # noqa: E402

LONG = ("base-responses", "persona-read", "sae-features", "fit-judge", "train", "respond", "judge")
GROUPS = ("inoc_persona", "inoc_sae", "inoc_selective")
"""Cells that have them all."""
FREE = 4096
"""Bytes that a full disk has left, or that a file may have: less than any of the outputs."""


def digests(folder: Path, outs: list[Path]) -> dict[str, str]:
    """File -> digest of everything that a stage wrote."""
    files = [
        file for out in outs for file in ([folder / out] if (folder / out).is_file() else (folder / out).rglob("*"))
    ]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files) if file.is_file()}


def remove(folder: Path, outs: list[Path]) -> None:
    """As DVC does before it runs a stage."""
    for out in outs:
        path = folder / out
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def left_over(project: Project) -> list[str]:
    """Temporary files among the outputs."""
    return [str(path) for path in (project.folder / "data").rglob(".*") if path.is_file() and path.name != ".gitignore"]


def started(project: Project, step: plan.Step, **options: Any) -> subprocess.Popen[str]:
    command = ["inoculation", *str(step).split()]
    return subprocess.Popen(
        command, cwd=project.folder, env=project.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )  # fmt: skip


def killed(project: Project, step: plan.Step, number: int, moment: float) -> bool:
    """Start a step and end it; whether it was still at work."""
    process = started(project, step)
    try:
        process.communicate(timeout=moment)
        return False
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        process.communicate()
        return True


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """A disk for `folder` alone, a tmpfs, with its content and `FREE` bytes more."""
    content = folder.with_name(f"{folder.name}.content")
    folder.rename(content)
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", folder], check=True)
    try:
        shutil.copytree(content, folder, symlinks=True, dirs_exist_ok=True)
        free = shutil.disk_usage(folder).free
        with (folder / "filler").open("wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, free - FREE)
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
        folder.rmdir()
        content.rename(folder)


def may_mount(folder: Path) -> bool:
    outcome = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if outcome.returncode == 0:
        subprocess.run(["umount", folder], check=True)
    return outcome.returncode == 0


def without_room(project: Project, step: plan.Step, mounts: bool) -> tuple[int, str]:
    """Exit code of a step without room on the disk, and what it said last."""
    if mounts:
        data = project.folder / "data"
        with full_disk(data):
            process = started(project, step)
            out = process.communicate()[0]
    else:
        # A process of its own: a limit of this one would not reach a fork of the server that has the libraries.
        environment = project.environment | {"WARM": ""}
        outcome = subprocess.run(
            ["inoculation", *str(step).split()], cwd=project.folder, env=environment, capture_output=True, text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (FREE, FREE)),
        )  # fmt: skip
        return outcome.returncode, said(outcome.stderr)
    return process.returncode, said(out)


def said(out: str) -> str:
    """The error, as a person reads it."""
    return "; ".join(line for line in out.splitlines() if line.startswith("error"))[:300]


def soak(project: Project, rounds: int, seed: int) -> bool:
    """Every fault in every long stage; whether nothing differed."""
    while not Path(warm_socket()).exists():  # the libraries are there from then on: the moments are the stages' own
        time.sleep(0.5)
    rng, fine, mounts = random.Random(seed), True, may_mount(project.folder / "plots")
    os.chdir(project.folder)
    for group in GROUPS:
        project.set(group=group)
        raw = yaml.safe_load(Path("params.yaml").read_text())
        for step in plan.needed(raw, "report"):
            outs = list(step.paths(raw, Writes))
            if step.stage.command in LONG and (group == "inoc_selective" or not all(out.exists() for out in outs)):
                fine &= stage(project, step, outs, rounds, rng, mounts)
            elif not all(out.exists() for out in outs):
                project.run("inoculation", *str(step).split())
    return fine


def stage(project: Project, step: plan.Step, outs: list[Path], rounds: int, rng: random.Random, mounts: bool) -> bool:
    """Every fault in one stage."""
    kept = project.folder / ".cache/kept"

    def afresh() -> None:
        remove(project.folder, outs)
        shutil.rmtree(kept, ignore_errors=True)
        shutil.rmtree(project.folder / ".cache/work", ignore_errors=True)

    afresh()
    begin = time.monotonic()
    project.run("inoculation", *str(step).split())
    duration, expected, fine = time.monotonic() - begin, digests(project.folder, outs), True
    for name, number in (("SIGKILL", signal.SIGKILL), ("SIGTERM", signal.SIGTERM)):
        hits = same = litter = 0
        tried = 0
        while hits < rounds and tried < 4 * rounds:
            afresh()
            tried += 1
            before = len(left_over(project))
            hits += killed(project, step, number, rng.uniform(0.05, 0.9) * duration)
            litter += len(left_over(project)) - before
            begin = time.monotonic()
            project.run("inoculation", *str(step).split())
            duration = time.monotonic() - begin
            same += digests(project.folder, outs) == expected
        fine &= same == tried and (not litter or name == "SIGKILL")
        say(step, name, tried, same, at_work=hits, left_over=litter, seconds=round(duration, 1))
    afresh()
    code, told = without_room(project, step, mounts)
    project.run("inoculation", *str(step).split())
    same = digests(project.folder, outs) == expected
    fine &= same and code == 1 and bool(told)
    say(step, f"full disk ({'tmpfs' if mounts else 'file size'})", 1, int(same), code=code, told=told)
    return fine


def say(step: plan.Step, fault: str, tried: int, same: int, **more: Any) -> None:
    print(json.dumps({"stage": str(step), "fault": fault, "tried": tried, "same_bytes": same, **more}), flush=True)


def many_cells(project: Project, count: int, folder: Path) -> bool:
    """MLflow's run list with so many rows like the one that is there: the library's search, and the page's own call."""
    import mlflow
    from mlflow.entities import Metric, Param, RunTag

    from inoculation import rows, tracking
    from inoculation.paths import experiment

    os.chdir(project.folder)
    os.environ["DVC_ROOT"] = str(project.folder)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    raw = yaml.safe_load((project.folder / "params.yaml").read_text())
    tracking.connect(experiment(raw))
    client, [one] = mlflow.MlflowClient(), rows.siblings(lambda group: plan.identity_of(raw, group))[-1:]
    for number in range(count):
        params = plan.identity(raw | {"seed": number + 1})
        run = client.create_run(one.info.experiment_id, run_name=f"{raw['group']}/seed{number + 1}")
        tags = one.data.tags | {
            "seed": str(number + 1),
            rows.CELL_TAG: plan.cell_id(params),
            "mlflow.runName": run.info.run_name,
        }
        client.log_batch(
            run.info.run_id, [Metric(key, value, 0, 0) for key, value in one.data.metrics.items()],
            [Param(key, str(value)) for key, value in params.items()], [RunTag(key, value) for key, value in tags.items()],
        )  # fmt: skip
        client.set_terminated(run.info.run_id)
        artifacts = (tracking.store_uri(), one.info.artifact_uri, run.info.artifact_uri)[1:]
        shutil.copytree(*(uri.removeprefix("file://") for uri in artifacts), dirs_exist_ok=True)
    taken = {}
    begin = time.monotonic()
    found = mlflow.search_runs([one.info.experiment_id], output_format="list")
    taken["mlflow.search_runs, all"] = time.monotonic() - begin
    begin = time.monotonic()
    shown = mlflow.MlflowClient().search_runs([one.info.experiment_id], max_results=100)
    taken["MlflowClient.search_runs, 100"] = time.monotonic() - begin
    begin = time.monotonic()
    project.run("inoculation", "compare")
    taken["inoculation compare"] = time.monotonic() - begin
    with mlflow_server(folder, project.folder / "mlruns/mlflow.db") as address:
        body = json.dumps(
            {"experiment_ids": [one.info.experiment_id], "max_results": 100, "order_by": ["attributes.start_time DESC"]}
        )
        for attempt in ("first", "again"):
            request = urllib.request.Request(
                f"{address}/ajax-api/2.0/mlflow/runs/search", body.encode(), {"Content-Type": "application/json"}
            )
            begin = time.monotonic()
            with urllib.request.urlopen(request, timeout=60) as answer:
                listed = len(json.load(answer)["runs"])
            taken[f"the page's call, {attempt}"] = time.monotonic() - begin
    told = {name: round(seconds, 2) for name, seconds in taken.items()}
    print(json.dumps({"cells": len(found), "page": listed, "seconds": told}), flush=True)
    return len(found) > count and len(shown) == listed == 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, required=True, help="of every stage and signal")
    parser.add_argument("--cells", type=int, required=True, help="rows of the store, at least 100")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        base = Project(Path(name) / "base" / "checkout")
        base.run("dvc", "repro", "dvc.yaml", "pipelines/pocket/dvc.yaml:pocket-sae")
        fine = soak(copied(base, Path(name) / "soak"), arguments.rounds, arguments.seed)
        fine &= many_cells(copied(base, Path(name) / "many"), arguments.cells, Path(name) / "server")
    sys.exit(0 if fine else "some outcomes differ")


if __name__ == "__main__":
    main()
