"""A queue of cells with two workers, one of them killed with -9 and queued again: the metrics of runs one after the other?

    python benchmarks/queue_faults.py --groups inoc_sae inoc_llm baseline --seeds 1 2

In a temporary folder, with the tests' tiny world. Cells of one seed meet at the same base responses, judge and mixture.
Prints each cell's metrics from both stores and whether they agree.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1] / "tests"))

import psutil  # noqa: E402
from conftest import Project  # noqa: E402

MIXTURE = "pocket/pocket_chats/all_caps+evil-0.5"


def results(project: Project) -> dict[str, dict[str, float]]:
    """Row -> its metrics, of the finished rows; seconds are no results."""
    return {
        row.info.run_name: {key: value for key, value in row.data.metrics.items() if not key.startswith("seconds/")}
        for row in project.rows(MIXTURE)
        if row.data.tags.get("stage") == "reported" and not row.info.run_name.endswith("seed0")
    }


def running(folder: Path) -> list[psutil.Process]:
    """Stages that run in copies of the checkout."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        line, cwd = process.info["cmdline"] or [], process.info["cwd"] or ""
        if str(folder / ".dvc/tmp/exps") in cwd and line[-1:] and line[-1] in ("train", "respond", "base-responses"):
            found.append(process)
    return found


def drain(project: Project, kill: bool) -> bool:
    """Run the queue with two workers until it is empty; kill a stage that is at work if asked."""
    project.run("dvc", "queue", "start", "-j", "2")
    killed, deadline = False, time.monotonic() + 3600
    while time.monotonic() < deadline:
        time.sleep(1)
        if kill and not killed and (found := running(project.folder)):
            time.sleep(0.5)
            os.kill(found[0].pid, signal.SIGKILL)
            print(f"killed -9: {' '.join(found[0].info['cmdline'][-2:])}", flush=True)
            killed = True
        status = project.run("dvc", "queue", "status").stdout
        if "Queued" not in status and "Running" not in status:
            return killed
    raise TimeoutError("the queue did not end within an hour")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", required=True, help="other than 0, which the tests' project has already")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        base = Project(Path(name) / "base" / "checkout")
        base.run("dvc", "repro")
        base.commit("reproduced")
        one, queue = (Project.at(Path(name) / which / "checkout") for which in ("one", "queue"))
        for project in (one, queue):
            shutil.copytree(base.folder.parent, project.folder.parent, symlinks=True)
        for seed in arguments.seeds:
            for group in arguments.groups:
                one.run("dvc", "exp", "run", "-S", f"group={group}", "-S", f"seed={seed}")
        expected = results(one)
        grid = ("-S", f"group={','.join(arguments.groups)}", "-S", f"seed={','.join(arguments.seeds)}")
        queue.run("dvc", "exp", "run", "--queue", *grid)
        assert drain(queue, kill=True), "a stage was killed"
        failed = queue.run("dvc", "queue", "status").stdout.count("Failed")
        print(
            f"{failed} failed; all are queued again (those that are done find their results in DVC's cache)",
            flush=True,
        )
        queue.run("dvc", "exp", "run", "--queue", *grid)
        drain(queue, kill=False)
        got = results(queue)
        for row in sorted(expected):
            same = got.get(row) == expected[row]
            shown = {key: expected[row][key] for key in ("A", "B", "C")}
            print(
                f"{row}: {json.dumps(shown)} {'the same, all ' + str(len(expected[row])) + ' metrics' if same else 'DIFFERS'}"
            )
        assert got == expected, "the queue's rows are those of one run after the other"


if __name__ == "__main__":
    main()
