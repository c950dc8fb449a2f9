"""Stages run on what they declare and on nothing else: dvc.yaml, the import graph, files that are opened, checkouts."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Annotated

import pytest
import yaml
from conftest import ROOT
from test_pipeline import CELL, EXPERIMENT, ran

from inoculation import pipelines, plan, rows
from inoculation.files import InputError
from inoculation.params import put
from inoculation.registry import STAGES, load, summaries
from inoculation.stage import Each, Param, Reads, Stage, Writes

HANDING_OVER = {
    "inoculation.cli",
    "inoculation.registry",
    "inoculation.commands",
    "inoculation.__main__",
    "inoculation.timings",
    "inoculation.store",
    "inoculation.gpus",
    "inoculation.quiet",
}
"""Modules that only find a stage, start it on its GPUs, and note how long it took (and where the checkout is that keeps that)."""


PINNED = {
    "model.json": Path("data/pocket_world/models/qwen2"),
    "sae.json": Path("data/pocket_world/sae"),
    "corpora.json": Path("data/pocket_world/chats"),
}
"""Settings that hold the digest of a folder: who reads the one depends on the other's content."""


@pytest.fixture(scope="module")
def raw() -> dict:
    return yaml.safe_load((ROOT / "params.yaml").read_text())


def test_the_dvc_files_are_those_of_the_declarations():
    for path, text in pipelines.render().items():
        assert (ROOT / path).read_text() == text, f"{path} is not what `inoculation pipelines` writes; run it"
    made = {ROOT / path for path in pipelines.render()}
    assert made == {ROOT / "dvc.yaml", *ROOT.glob("pipelines/*/dvc.yaml")}


def test_help_says_what_the_stages_say():
    told = summaries()
    assert list(told) == list(STAGES)
    for command in STAGES:
        stage = load(command)
        assert told[command].text == stage.summary() and stage.command == command
        assert told[command].argument == (stage.each.argument if stage.each else None)


def test_the_table_of_stale_stages_in_the_docs_is_current():
    assert pipelines.stale() in (ROOT / "docs/staleness.md").read_text()


def test_every_stage_opens_and_imports_only_what_it_declares(project, detected):
    """Of every command that ran for the default cell, inoc_sae and inoc_llm: files opened and modules imported."""
    graph, seen = pipelines.import_graph(), set()
    for owner in (project, detected):
        for record in owner.records():
            command, *argument = record["command"]
            if command not in STAGES:
                continue
            seen.add(command)
            params = yaml.safe_load((owner.folder / "params.yaml").read_text()) | {"group": "inoc_selective"}
            stage = load(command)
            modules = {
                re.sub(r"\.__init__$", "", path.removeprefix("src/").removesuffix(".py").replace("/", "."))
                for path in pipelines.code(stage, graph)
            }
            if command in ("check", "log"):
                continue  # they look at every stage, and run every time that anything could have changed
            # An expensive one asks once more whether the rest of the cell is possible, which imports every stage.
            if not stage.expensive:
                extra = set(record["modules"]) - modules - HANDING_OVER
                assert not extra, f"{command} imports {extra} and does not depend on it"
            declared = set()
            for group in ("inoc_selective", "inoc_sae", "inoc_llm"):
                step = plan.Step(stage, argument[0] if argument else None)
                for kind in (Reads, Writes):
                    declared |= set(step.paths(params | {"group": group}, kind))
            declared |= {PINNED[path.name] for path in declared if path.name in PINNED}
            for name in record["opened"]:
                path = Path(name)
                unfinished = any(part.startswith(".") for part in path.parts)
                if path.parts[0] in ("data", "hub", "plots") and not unfinished:
                    own = any(made in (path, *path.parents) or path in made.parents for made in declared)
                    assert own, f"{command} opens {path}"
    assert seen >= {"pocket-chats", "pocket-model", "pocket-sae", "source", "profile", "mixture", "fit-judge", "base-responses",
                    "sae-features", "sae-rank", "sae-explain", "sae-classify", "sae-flag", "sae-prompt", "sae-page",
                    "audit-local", "assign", "assign-sae", "assign-audit", "train", "respond", "judge", "report"}  # fmt: skip


def test_what_a_module_makes_stale(copy):
    """A change in the report does not train again; one in a detector touches no group without it; one in LoRA's code trains."""

    def changed(module: str) -> set[str]:
        path = copy.folder / "src/inoculation" / module
        text = path.read_text()
        path.write_text(text + "\n# changed\n")
        out = copy.run("dvc", "repro", "--dry").stdout
        path.write_text(text)
        return set(ran(out))

    assert changed("report.py") == {"report", "log"}
    assert changed("detect/sae/flag.py") == {"log", "check"}, "no detector is in this cell"
    assert "train" in changed("train.py") and "respond" not in changed("train.py")


def test_a_changed_rubric_judges_again_and_does_not_sample_again(copy):
    """With an LLM as judge the rubric is in the judge's definition, which the judge stage reads; the questions are apart."""
    copy.set(roles={"local": {"judge": {"method": "llm", "model": "openai/x", "api_base": "http://127.0.0.1:9"}}},
             llm={"prices": {"openai/x": [0, 0]}})  # fmt: skip
    copy.run("dvc", "repro", "pipelines/judge/dvc.yaml:fit-judge")
    before = (copy.folder / CELL / "judge/judge.json").read_text()
    evaluation = copy.folder / "data/pocket_world/chats/trait_data_eval/evil.json"
    told = json.loads(evaluation.read_text())
    evaluation.unlink()
    evaluation.write_text(json.dumps(told | {"eval_prompt": "Evil? {question} {answer}"}))
    for stage in ("source pocket_chats", "fit-judge"):
        copy.run("inoculation", *stage.split())
    assert (copy.folder / CELL / "judge/judge.json").read_text() != before
    status = copy.run("dvc", "status", "--json", "judge", "respond").stdout
    assert "judge/judge.json" in status and "questions.json" not in status and '"respond"' not in status


def test_a_stage_says_all_that_is_wrong_with_its_parameters(raw):
    class Some(Stage):
        """Some stage."""

        command, pipeline = "some", ""
        seed: Annotated[int, Param("seed")]
        samples: Annotated[int, Param("evaluate.samples")]
        path: Annotated[Path, Reads("data/${profile}/${no.such}")]

    broken = raw | {"seed": "x"}
    with pytest.raises(InputError) as error:
        Some.load(raw=broken)
    assert "seed" in str(error.value) and "no.such is missing" in str(error.value)
    with pytest.raises(InputError, match="group 'nope' is unknown; valid: base, baseline"):
        load("assign").load("nope", raw)


def test_each_names_come_from_params(raw):
    class Many(Stage):
        """Many stages."""

        command, pipeline = "many", ""
        each = Each("name", "${profiles}")
        name: str
        model: Annotated[Path, Reads("${item.model}")]
        out: Annotated[Path, Writes("data/${key}")]

    stage = Many.load("qwen2_5_7b", raw)
    assert (stage.name, stage.model, stage.out) == ("qwen2_5_7b", Path("hub/qwen2_5_7b.yaml"), Path("data/qwen2_5_7b"))


def test_the_identity_holds_what_changes_results_and_nothing_else(project, monkeypatch):
    monkeypatch.chdir(project.folder)
    params = yaml.safe_load((project.folder / "params.yaml").read_text())
    known = plan.identity(params)
    for change in (
        {"save_steps": 7}, {"cluster": params["cluster"] | {"processes": 2}}, {"llm": params["llm"] | {"concurrency": 3, "budget": 1}},
        {"sae": params["sae"] | {"latents": 77}}, {"audit": params["audit"] | {"separation": 9}},
    ):  # fmt: skip
        assert plan.identity(params | change) == known, "of no influence on this cell"
    for change in ({"seed": 1}, {"group": "baseline"}, {"judge": {"examples": 99, "folds": 4}}):
        assert plan.identity(params | change) != known
    assert not any("machine" in key for key in known)


def test_the_identity_is_what_params_say_whatever_is_pinned(copy, monkeypatch):
    """Else cells of another rank are taken for done, and a second machine finds none of those that are."""
    monkeypatch.chdir(copy.folder)
    params = yaml.safe_load((copy.folder / "params.yaml").read_text())
    logged = {row.data.tags[rows.CELL_TAG] for row in copy.rows(EXPERIMENT)}
    known = plan.cell_id(plan.identity(params))
    assert known in logged
    names = {known}
    for change in (
        {"train.pocket.lora_r": 5},
        {"profiles.pocket.max_new_tokens": 5},
        {"profiles.pocket.dtype": "float16"},
    ):
        other = deepcopy(params)
        put(other, change)
        names.add(plan.cell_id(plan.identity(other)))
    assert len(names) == 4 and logged & names == {known}
    shutil.move("data/profiles", "elsewhere")
    assert plan.cell_id(plan.identity(params)) == known, "and where nothing is pinned yet"
    shutil.move(params["profiles"]["pocket"]["model"], "elsewhere")
    with pytest.raises(InputError, match="no such file or folder"):
        plan.identity(params)


# ---- whose code runs


def test_a_checkout_runs_its_own_code_or_refuses(copy):
    """Imported from elsewhere (PYTHONPATH says so): started again with the folder's own package."""
    elsewhere = {**copy.environment, "PYTHONPATH": str(ROOT / "src")}
    report = copy.folder / "src/inoculation/stages/report.py"
    report.write_text(report.read_text().replace("print(f\"{'evaluated under'", 'print("MARK", f"{\'evaluated under\''))
    command = [sys.executable, "-m", "inoculation", "report"]
    outcome = subprocess.run(command, cwd=copy.folder, env=elsewhere, capture_output=True, text=True)
    assert outcome.returncode == 0 and "MARK" in outcome.stdout, outcome.stderr
    (copy.folder / "src/inoculation/cli.py").unlink()
    outcome = subprocess.run(command, cwd=copy.folder, env=elsewhere, capture_output=True, text=True)
    assert outcome.returncode == 1 and "this checkout's stages must run its own code" in outcome.stderr


# ---- unfinished work

WORKER = """
import sys, time
from inoculation import store
from inoculation.store import unfinished
if sys.argv[3:]:
    store._code = lambda: sys.argv[3:]
with unfinished("answers", "the same work") as folder:
    progress = folder / "batches"
    done = progress.read_text().split() if progress.exists() else []
    for batch in range(len(done), 5):
        with progress.open("a") as log:
            log.write(f"{sys.argv[1]}{batch} ")
        print("step", flush=True)
        time.sleep(float(sys.argv[2]))
    print(progress.read_text())
"""


def worker(folder: Path, name: str, pause: float, *code: str) -> subprocess.Popen:
    environment = {**os.environ, "DVC_ROOT": str(folder)}
    command = [sys.executable, "-c", WORKER, name, str(pause), *code]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_two_workers_at_the_same_work_do_it_once(tmp_path):
    first = worker(tmp_path, "a", 0.2)
    assert first.stdout.readline() == "step\n"
    second = worker(tmp_path, "b", 0.0)
    told = second.communicate(timeout=30)[0]
    assert "another process is at the same work" in told and told.splitlines()[-1].split() == [
        f"a{i}" for i in range(5)
    ]
    assert first.wait(10) == 0
    third = worker(tmp_path, "c", 0.0).communicate(timeout=30)[0]
    assert third.splitlines()[-1].split() == [f"c{i}" for i in range(5)], "finished work is gone"


def test_a_killed_worker_is_continued(tmp_path):
    first = worker(tmp_path, "a", 5)
    assert first.stdout.readline() == "step\n"
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = worker(tmp_path, "b", 0).communicate(timeout=30)[0]
    assert second.splitlines()[-1].split() == ["a0", "b1", "b2", "b3", "b4"]


def test_another_codes_unfinished_work_is_not_continued(tmp_path):
    """Two commits in one queue would else have the results of whichever came first."""
    first = worker(tmp_path, "a", 5, "one commit")
    assert first.stdout.readline() == "step\n"
    second = worker(tmp_path, "b", 0, "another").communicate(timeout=30)[0]
    assert second.splitlines()[-1].split() == [f"b{i}" for i in range(5)]
    first.kill()
    first.wait()


def test_work_that_a_killed_process_waited_for_is_not_kept(tmp_path):
    first = worker(tmp_path, "a", 0.5)
    assert first.stdout.readline() == "step\n"
    second = worker(tmp_path, "b", 0)
    assert "another process" in second.stdout.readline()
    second.kill()
    second.wait()
    assert first.wait(20) == 0
    assert not [path.name for path in (tmp_path / ".cache/work").iterdir() if not path.name.endswith(".lock")]


# ---- GPUs

STAGE = """
import os, sys
from pathlib import Path
from inoculation import gpus
with gpus.some(Path(sys.argv[1]), int(sys.argv[2])):
    print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
    sys.stdin.read()
"""


def stage_on(gpus: str, locks: Path, wanted: int = 1) -> tuple[subprocess.Popen, str]:
    """A process that is at a stage until its input ends, and the GPUs that it got."""
    command = [sys.executable, "-c", STAGE, str(locks), str(wanted)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus}
    started = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return started, started.stdout.readline().strip()


def test_stages_that_run_at_once_spread_over_the_gpus(tmp_path):
    first, second, third, fourth = running = [stage_on("2,3", tmp_path) for _ in range(4)]
    assert [name for _, name in running] == ["2", "3", "2", "3"]
    second[0].kill()
    second[0].wait()
    fifth = stage_on("2,3", tmp_path)
    assert fifth[1] == "3", "what a killed one held is free"
    third[0].communicate()
    first[0].communicate()
    sixth = stage_on("2,3", tmp_path)
    assert sixth[1] == "2"
    for process, _ in (fourth, fifth, sixth):
        process.communicate()


def test_a_training_on_two_gpus_takes_two_that_are_free(tmp_path):
    alone = stage_on("0,1,2", tmp_path)
    two = stage_on("0,1,2", tmp_path, wanted=2)
    assert (alone[1], two[1]) == ("0", "1,2")
    more = stage_on("0,1,2", tmp_path, wanted=2)
    assert more[1] == "0,1", "each a GPU of its own, shared with those that were first"
    next_ = stage_on("0,1,2", tmp_path)
    assert next_[1] == "2"
    for process, _ in (alone, two, more, next_):
        process.communicate()
    refused, _ = stage_on("0,1,2", tmp_path, wanted=4)
    assert refused.wait(30) == 1
    assert stage_on("", tmp_path, wanted=2)[1] == "", "none: a CPU does it"


# ---- before anything expensive


def test_all_that_is_missing_is_listed_before_any_work(copy):
    copy.set(
        roles={
            "local": {
                "judge": {"method": "llm", "model": "gpt-4.1-mini"},
                "auditor": {"method": "llm", "model": "openai/x"},
            }
        },
        profiles={"pocket": {"auditor": "llm", "corpora": "hub/own-corpora.yaml"}},
    )
    copy.set(group="inoc_llm")
    outcome = copy.run("inoculation", "check", ok=False)
    assert outcome.returncode == 2
    for part in ("role judge: gpt-4.1-mini needs OPENAI_API_KEY", "role auditor: the price of 'openai/x' is unknown"):
        assert part in outcome.stderr, outcome.stderr
    assert "synthesiser" not in outcome.stderr, "which needs no LLM here"
    copy.run("git", "checkout", "params.yaml")
    copy.set(data_sets={"mine": {"file": "../no.jsonl", "traits": "pocket_chats", "rewriter": {"method": "local"}}})
    copy.set(mixture={"source": "mine"})
    outcome = copy.run("inoculation", "check", ok=False)
    assert "own-data mine: ../no.jsonl: no such file or folder" in outcome.stderr
    copy.run("git", "checkout", "params.yaml")
    copy.set(annotator="pocket_llama", group="inoc_sae")
    outcome = copy.run("inoculation", "check", ok=False)
    assert "profiles.pocket_llama.sae: data/pocket_world/sae is trained on" in outcome.stderr
    copy.set(group="inoc_persona")
    copy.run("inoculation", "check")


def test_the_plan_says_what_will_run_and_what_it_takes(copy):
    copy.set(group="baseline")
    told = copy.run("inoculation", "plan").stdout
    assert [line.split()[0] for line in told.splitlines()[1:] if line.startswith("  ")] == [
        "check", "assign", "train", "respond", "judge", "report", "log",
    ]  # fmt: skip
    assert re.search(r"train +\d+ s", told) and "nothing is missing" in told
    assert "measured on this machine" in told


# ---- rows


def test_a_batch_size_is_no_other_experiment(copy):
    before = copy.rows(EXPERIMENT)
    copy.set(profiles={"pocket": {"machine": {"batch_size": 7}}}, save_steps=3)
    shutil.rmtree(copy.folder / "data/profiles")
    (copy.folder / CELL / "inoc_selective/responses.jsonl").unlink()
    (copy.folder / CELL / "inoc_selective/judgements.jsonl").unlink()
    copy.run_cell()
    rows = copy.rows(EXPERIMENT)
    assert len(rows) == len(before) == 1 and rows[0].info.run_id != before[0].info.run_id, (
        "the new row replaces the old one"
    )
    assert "| `inoc_selective` | 1 |" in copy.run("inoculation", "compare").stdout


def test_a_row_that_is_lost_comes_back(copy):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{copy.folder / 'mlruns' / 'mlflow.db'}")
    [row] = copy.rows(EXPERIMENT)
    client.delete_run(row.info.run_id)
    copy.run_cell()
    [again] = copy.rows(EXPERIMENT)
    results = [
        {key: value for key, value in each.data.metrics.items() if "seconds" not in key} for each in (row, again)
    ]
    assert results[0] == results[1] and again.data.params == row.data.params


def test_the_old_row_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    import mlflow

    from inoculation import rows, tracking

    tracking.connect("e")
    with rows.new_row("a", {}, {"group": "baseline", "seed": 0}, "cell"):
        mlflow.log_metric("A", 1.0)
    with pytest.raises(RuntimeError), rows.new_row("a", {}, {"group": "baseline", "seed": 0}, "cell"):
        raise RuntimeError
    [kept] = rows.find("cell")
    assert kept.data.metrics == {"A": 1.0}
    with rows.new_row("a", {}, {"group": "baseline", "seed": 0}, "cell"):
        mlflow.log_metric("A", 2.0)
    [kept] = rows.find("cell")
    assert kept.data.metrics == {"A": 2.0}


def test_a_moved_checkout_keeps_its_artifacts(tmp_path, monkeypatch):
    from inoculation import tracking

    old, new = tmp_path / "old", tmp_path / "new"
    monkeypatch.setenv("DVC_ROOT", str(old))
    old.mkdir()
    import mlflow

    with tracking.run("e", "r") as run:
        mlflow.log_text("hello", "a.txt")
    shutil.move(old, new)
    monkeypatch.setenv("DVC_ROOT", str(new))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # MLflow's own doing; another process begins without it
    tracking.connect("e")
    found = mlflow.MlflowClient().get_run(run.info.run_id)
    assert mlflow.artifacts.load_text(f"{found.info.artifact_uri}/a.txt") == "hello"
    assert str(old) not in found.info.artifact_uri


def test_a_failure_of_the_machine_keeps_its_traceback(copy):
    plots = copy.folder / "plots"
    plots.rename(copy.folder / "moved")
    plots.write_text("in the way")
    outcome = copy.run("inoculation", "report", ok=False)
    assert outcome.returncode == 1 and "nothing was left half-written. Traceback: " in outcome.stderr
    assert "Traceback (most recent call last)" in Path(outcome.stderr.strip().rsplit("Traceback: ")[-1]).read_text()


def test_a_note_of_timings_that_is_cut_or_cannot_be_written_fails_no_stage(tmp_path, monkeypatch):
    from inoculation import timings

    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    timings.note("train", "pocket", 2.0)
    with timings.path().open("a") as out:
        out.write('{"step": "train", "prof')  # killed while it wrote
    timings.note("respond", "pocket", 3.0)
    assert [row["step"] for row in timings.noted()] == ["train", "respond"]
    timings.path().unlink()
    timings.path().mkdir()
    timings.note("judge", "pocket", 4.0)


def test_a_terminated_stage_leaves_no_temporary_file(copy):
    """SIGTERM while it writes: the old output stays, and nothing beside it."""
    report = copy.folder / "src/inoculation/report.py"
    report.write_text(report.read_text() + "\n\nimport time, os\nfrom inoculation import files\n"
                      "_write = files.Path.write_text\n"
                      "files.Path.write_text = lambda *a, **k: (_write(*a, **k), print('writing', flush=True), time.sleep(60))\n")  # fmt: skip
    before = sorted((copy.folder / CELL).rglob("*"))
    process = subprocess.Popen(
        ["inoculation", "report"], cwd=copy.folder, env=copy.environment, stdout=subprocess.PIPE, text=True
    )
    while "writing" not in (line := process.stdout.readline()):
        assert line, "the report ended before it wrote"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert sorted((copy.folder / CELL).rglob("*")) == before


def test_metrics_diff_compares_the_headline_of_one_mixture(copy):
    table = json.loads((copy.folder / "metrics.json").read_text())
    assert list(table) == [EXPERIMENT]
    assert {"A", "B", "C", "A_control", "B_control"} <= set(table[EXPERIMENT]) and len(table[EXPERIMENT]) <= 12


def test_plots_open_without_a_network(copy):
    copy.run("dvc", "plots", "show")
    page = (copy.folder / "dvc_plots/index.html").read_text()
    assert "<img" in page and "http" not in re.sub(r"http://www\.w3\.org\S*", "", page)
