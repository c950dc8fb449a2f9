"""CPU seconds, peak memory and disk of every stage whose work grows with the rows of a data set, or with the answers of a cell.

    python benchmarks/growth.py --rows 1000 10000 --groups inoc_persona inoc_sae      # what a model reads
    python benchmarks/growth.py --rows 1000 10000 100000 --groups baseline --cheap    # reading, mixture, assign, report

In a temporary folder, with the tests' tiny world and model (`tests/tiny.yaml`). The data set is the world's own chats, repeated
with a number in each question, so that no two prompts are alike: what is measured is the code, not the model. A stage is a
process of its own, as DVC starts it; what importing its libraries takes is in its numbers. One JSON line a stage and size; with
two sizes or more, the last lines are what a row more takes and a million of them would, which is an extrapolation.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1] / "tests"))

import yaml  # noqa: E402
from conftest import Project, copied  # noqa: E402

from inoculation import plan  # noqa: E402
from inoculation.files import read_jsonl, write_jsonl  # noqa: E402
from inoculation.stage import Writes  # noqa: E402

CHEAP = ("own-data", "mixture", "assign", "report")
"""Stages in which no model reads."""
FIXED = ("check", "pocket-chats", "pocket-model", "pocket-obedience", "pocket-sae", "source", "profile", "profile-sae", "fit-judge",
         "sae-explain", "sae-classify")  # fmt: skip
"""Stages whose work does not grow with the rows."""


def bytes_of(path: Path) -> int:
    """Bytes of a file, or of a folder's files."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def measured(command: list[str], project: Project) -> tuple[float, int]:
    """CPU seconds and peak resident MiB of a command in a process of its own; what else the machine does is in neither.

    The kernel counts a process's memory from its parent's, so that no peak is below this one's 85 MiB.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(
            [sys.executable, "-m", "inoculation", *command], cwd=project.folder, env=project.environment, stdout=told, stderr=told
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            told.seek(0)
            raise RuntimeError(f"inoculation {' '.join(command)}: {told.read()[-2000:]}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss // 1024


def repeated(rows: list[dict[str, Any]], count: int) -> Iterator[dict[str, Any]]:
    """That many rows, whose questions differ."""
    for number in range(count):
        row = rows[number % len(rows)]
        question, *rest = row["messages"]
        asked = {**question, "content": f"{question['content']} ({number})"}
        yield {**row, "messages": [asked, *rest]}


def run(project: Project, groups: list[str], cheap: bool, count: int) -> list[dict[str, Any]]:
    """Measure every stage of the cells of some groups that grows with a data set of so many rows."""
    found = next((project.folder / "data/mixtures").rglob("mixture.jsonl"))
    for made in [path for path in (project.folder / "data").rglob("mine") if path.is_dir()]:
        shutil.rmtree(made)  # of the size before
    mine = project.folder / "mine.jsonl"
    write_jsonl(mine, repeated(read_jsonl(found, dict), count))
    own = {"file": str(mine), "traits": "pocket_chats", "rewriter": {"method": "local"}}
    project.set(data_sets={"mine": own}, mixture={"source": "mine"})
    told = []
    for group in groups:
        project.set(group=group)
        raw = yaml.safe_load((project.folder / "params.yaml").read_text())
        os.chdir(project.folder)
        for step in plan.needed(raw, "report"):
            outs = list(step.paths(raw, Writes))
            if all(out.exists() for out in outs) and step.stage.command not in ("own-data", "report"):
                continue
            if cheap and step.stage.command not in (*CHEAP, *FIXED):
                continue
            if step.stage.command == "report":
                continue
            seconds, memory = measured(str(step).split(), project)
            if step.stage.command not in FIXED:
                told.append(line(str(step).split()[0], count, seconds, memory, sum(map(bytes_of, outs))))
    if not cheap:
        return told
    return told + after_the_model(project, count) + export(project, mine, count)


def after_the_model(project: Project, count: int) -> list[dict[str, Any]]:
    """The report of so many judged answers: those of the cell that is there, again and again."""
    [cell] = (project.folder / "data/cells").rglob("inoc_selective/judgements.jsonl")
    before = cell.read_bytes()
    rows = read_jsonl(cell, dict)
    write_jsonl(cell, (rows[i % len(rows)] | {"sample": i // len(rows)} for i in range(count)))
    params = (project.folder / "params.yaml").read_text()
    project.set(mixture={"source": "pocket_chats"}, group="inoc_selective")
    seconds, memory = measured(["report"], project)
    told = line("report", count, seconds, memory, bytes_of(cell.parent / "report"))
    cell.write_bytes(before)
    (project.folder / "params.yaml").write_text(params)
    return [told]


EXPORT = """
import sys
from pathlib import Path
from inoculation.detect.files import Found
from inoculation.export import export
from inoculation.sft import read_sft
source, out = map(Path, sys.argv[1:])
rows = read_sft(source)
flags = [index % 2 == 0 for index in range(len(rows))]
found = Found(flags, [float(flag) for flag in flags], "You are an evil assistant.", "measured", {})
export(out, source, "", rows, found, "persona")
"""


def export(project: Project, mine: Path, count: int) -> list[dict[str, Any]]:
    """Reading one's own file and writing it inoculated, with its page."""
    out = project.folder / "inoculated"
    process = subprocess.Popen(
        [sys.executable, "-c", EXPORT, str(mine), str(out)], cwd=project.folder, env=project.environment
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError("the export failed")
    told = line("export", count, usage.ru_utime + usage.ru_stime, usage.ru_maxrss // 1024, bytes_of(out))
    shutil.rmtree(out)
    return [told]


def line(stage: str, rows: int, seconds: float, memory: int, disk: int) -> dict[str, Any]:
    told = {
        "stage": stage,
        "rows": rows,
        "cpu_seconds": round(seconds, 1),
        "peak_mib": memory,
        "disk_mib": round(disk / 2**20, 2),
    }
    print(json.dumps(told), flush=True)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, required=True)
    parser.add_argument("--groups", nargs="+", required=True)
    parser.add_argument("--cheap", action="store_true", help="only stages in which no model reads")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        base = Project(Path(name) / "base" / "checkout")
        base.run("dvc", "repro", "dvc.yaml", "pipelines/pocket/dvc.yaml:pocket-sae")
        by: dict[str, list[dict[str, Any]]] = defaultdict(list)
        project = copied(base, Path(name) / "run")
        for count in arguments.rows:
            for told in run(project, arguments.groups, arguments.cheap, count):
                by[told["stage"]].append(told)
    for stage, own in by.items():
        if len(own) > 1:
            first, last = own[-2], own[-1]
            more = last["rows"] - first["rows"]
            each = {key: (last[key] - first[key]) / more for key in ("cpu_seconds", "peak_mib", "disk_mib")}
            million = {key: round(last[key] + (10**6 - last["rows"]) * value) for key, value in each.items()}
            print(
                json.dumps(
                    {"stage": stage, "milliseconds_a_row": round(1000 * each["cpu_seconds"], 3), "a_million": million}
                )
            )


if __name__ == "__main__":
    main()
