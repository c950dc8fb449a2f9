"""A queue of cells with two workers, one of them killed with -9 and queued again: the metrics of runs one after the other?

    python benchmarks/queue_faults.py --groups baseline inoc_general inoc_selective --seeds 1 2

In a temporary folder, with the tests' tiny world. Cells of one seed meet at the same mixture and judge. Prints each cell's
metrics from both stores, and whether they agree.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1] / "tests"))

import psutil  # noqa: E402
from conftest import Project, copied  # noqa: E402

MIXTURE = "pocket/pocket_chats/all_caps+evil-0.5"


def results(project: Project) -> dict[str, dict[str, float]]:
    """Row -> its metrics; seconds are no results."""
    return {
        row.info.run_name: {key: value for key, value in row.data.metrics.items() if not key.startswith("seconds")}
        for row in project.rows(MIXTURE)
        if not row.info.run_name.endswith("seed0")
    }


def at_work(folder: Path) -> list[psutil.Process]:
    """Trainings that run in copies of the checkout."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        line, cwd = process.info["cmdline"] or [], process.info["cwd"] or ""
        if str(folder / ".dvc/tmp/exps") in cwd and line[-1:] == ["train"]:
            found.append(process)
    return found


def drain(project: Project, kill: bool) -> bool:
    """Run the queue with two workers until it is empty; kill a training that is at work if asked."""
    # Not `project.run`: the workers hold the pipes of the command that starts them, and it would wait for them.
    command = ("dvc", "queue", "start", "-j", "2")
    subprocess.run(
        command, cwd=project.folder, env=project.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    killed, deadline = False, time.monotonic() + 3600
    while time.monotonic() < deadline:
        time.sleep(0.5)
        if kill and not killed:
            if found := at_work(project.folder):
                time.sleep(1.5)
                os.kill(found[0].pid, signal.SIGKILL)
                print(f"killed -9: {' '.join(found[0].info['cmdline'][-2:])}", flush=True)
                killed = True
            continue
        status = project.run("dvc", "queue", "status").stdout
        if "Queued" not in status and "Running" not in status:
            return killed
    raise TimeoutError("the queue did not end within an hour")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", required=True, help="other than 0, which the project has already")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        start = time.monotonic()
        base = Project(Path(name) / "base" / "checkout")
        base.run("dvc", "repro", "dvc.yaml")
        base.commit("reproduced")
        one, queue = (copied(base, Path(name) / which) for which in ("one", "queue"))
        print(f"{time.monotonic() - start:.0f} s: the world is made", flush=True)
        for seed in arguments.seeds:
            for group in arguments.groups:
                one.run("dvc", "exp", "run", "-S", f"group={group}", "-S", f"seed={seed}")
        expected = results(one)
        print(f"{time.monotonic() - start:.0f} s: {len(expected)} cells, one after the other", flush=True)
        grid = ("-S", f"group={','.join(arguments.groups)}", "-S", f"seed={','.join(arguments.seeds)}")
        queue.run("dvc", "exp", "run", "--queue", *grid)
        assert drain(queue, kill=True), "a training was killed"
        failed = queue.run("dvc", "queue", "status").stdout.count("Failed")
        print(f"{time.monotonic() - start:.0f} s: {failed} failed; all are queued again", flush=True)
        queue.run("dvc", "exp", "run", "--queue", *grid)
        drain(queue, kill=False)
        got = results(queue)
        print(f"{time.monotonic() - start:.0f} s", flush=True)
        for row in sorted(expected):
            shown = {key: round(value, 3) for key, value in expected[row].items() if key in ("A", "B", "C")}
            alike = got.get(row) == expected[row]
            print(f"{row}: {json.dumps(shown)} {f'the same, all {len(expected[row])} metrics' if alike else 'DIFFERS'}")
            if not alike:
                mine, other = expected[row], got.get(row, {})
                print(
                    {k: (mine.get(k), other.get(k)) for k in mine.keys() | other.keys() if mine.get(k) != other.get(k)}
                )
        print(queue.run("dvc", "queue", "status").stdout)
        assert got == expected, "the queue's rows are those of one run after the other"


if __name__ == "__main__":
    main()
