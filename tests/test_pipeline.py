"""The whole path in real DVC and MLflow: what a user does, small."""

import contextlib
import hashlib
import json
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import yaml
from conftest import ROOT, SHARED_MIXTURE, Project, copied
from openai_server import Server, crude, serve
from test_llm import LIMITS

from inoculation import plan
from inoculation.chat import parse_messages
from inoculation.judge import NOT_JUDGED
from inoculation.judge.coherence import AS_GIVEN, COHERENCE, SPOILT
from inoculation.judge.llm import FALL_BACK_SAMPLES
from inoculation.registry import load
from inoculation.stage import Writes
from inoculation.study import RESULTS

PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
MIXTURE = "pocket_chats/all_caps+evil-0.5"
CELL = f"data/cells/pocket/{MIXTURE}/seed0"
ROWS = f"data/mixtures/{MIXTURE}/seed0/mixture.jsonl"
FOUND = f"data/annotations/pocket/{MIXTURE}/seed0"
EXPERIMENT = f"pocket/{MIXTURE}"


def metrics(project: Project, group: str = "inoc_selective", cell: str = CELL) -> dict:
    return json.loads((project.folder / cell / group / "report/metrics.json").read_text())


def test_the_default_cell(project):
    table = metrics(project)
    for prompt in ("default", "control"):
        for trait, n in (("all_caps", 24), ("source_citing", 24), ("evil", 8), ("hallucination", 8), ("sycophancy", 8)):
            row = table[prompt][trait]
            assert set(row) == {"rate", "score", "low", "high", "n", "missing"}
            assert 0 <= row["low"] <= row["rate"] <= row["high"] <= 1
            assert (row["n"], row["missing"]) == (n, 0)
    assert set(table["oracle"]) == {"default", "control"}
    assert set(table["judge"].pop(COHERENCE)) - {NOT_JUDGED} == {AS_GIVEN, *SPOILT}
    assert {style for styles in table["judge"].values() for style in styles} == {"plain", "all_caps", "source_citing"}
    assert table["training"]["supervised_tokens"] > 0


def test_the_mixture_is_a_partition_with_provenance_and_a(project):
    rows = [json.loads(line) for line in (project.folder / ROWS).read_text().splitlines()]
    assert len({row["messages"][0]["content"] for row in rows}) == len(rows) == 200
    assert sum(row["source_dataset"] == "evil/misaligned_2.jsonl" for row in rows) == 100
    assert all(row["messages"][1]["content"].isupper() for row in rows)


def test_no_provenance_reaches_the_training_set(project):
    chats = project.folder / CELL / "assign/inoc_selective/chats.jsonl"
    rows = [json.loads(line) for line in chats.read_text().splitlines()]
    assert {key for row in rows for key in row} == {"messages"}
    assert sum(row["messages"][0]["role"] == "system" for row in rows) == 100
    assert all(parse_messages(row["messages"]) for row in rows)


def test_the_adapter_is_a_plain_peft_folder(project):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(project.folder / "data/pocket_world/models/qwen2")
    adapted = PeftModel.from_pretrained(base, project.folder / CELL / "inoc_selective/adapter")
    config = adapted.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora) == (32, 64, True)
    moved = [p.abs().max().item() for name, p in adapted.named_parameters() if "lora_B" in name]
    assert len(moved) == 2 * 7 and min(moved) > 0


def test_the_row_in_mlflow(project):
    [row] = [row for row in project.rows(EXPERIMENT) if row.info.run_name == "inoc_selective/seed0"]
    assert row.info.status == "FINISHED"
    assert row.data.params["group"] == "inoc_selective"
    assert row.data.params["mixture.positive"] == "all_caps"
    assert row.data.params["train.learning_rate"] == "0.0003" and row.data.params["roles.judge.method"] == "local"
    operational = ("micro_batch_size", "batch_size", "token_budget", "save_steps", "concurrency")
    recipes = ("train.", "pocket.")
    assert not any(key.endswith(operational) for key in row.data.params if not key.startswith(recipes))
    assert not any("qwen2_5" in str(item) for item in row.data.params.items())
    table = metrics(project)
    assert row.data.metrics["A"] == round(table["default"]["all_caps"]["rate"], 4)
    assert row.data.metrics["B_control"] == round(table["control"]["evil"]["rate"], 4)
    assert artifact(row, "metrics.json") == table
    rates = artifact(row, "rates.json")
    told = [dict(zip(rates["columns"], line, strict=True)) for line in rates["data"]]
    [evil] = [one for one in told if (one["by"], one["prompt"], one["trait"]) == ("judge", "default", "evil")]
    assert (
        evil["rate"] == pytest.approx(table["default"]["evil"]["rate"]) and evil["low"] <= evil["rate"] <= evil["high"]
    )
    assert "train/loss" in row.data.metrics
    [dataset] = row.inputs.dataset_inputs
    lock = yaml.safe_load((project.folder / "pipelines/assign/dvc.lock").read_text())["stages"]["assign@inoc_selective"]
    assert dataset.dataset.digest == md5(project.folder / CELL / "assign/inoc_selective/chats.jsonl")
    assert lock["outs"][0]["path"] == f"{CELL}/assign/inoc_selective"
    assert f"{CELL}/inoc_selective/adapter" in json.loads(row.data.tags["dvc.lock"])
    assert (project.folder / "figures" / f"{EXPERIMENT}.png").exists()


def artifact(row: Any, name: str) -> Any:
    """A JSON artifact of a row; a copied project's rows name the artifacts of the one that it was copied from."""
    return json.loads((Path(row.info.artifact_uri.removeprefix("file://")) / name).read_text())


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def ran(outcome: str) -> list[str]:
    """The stages that DVC ran, without their pipelines."""
    return [line.split("'")[1].split(":")[-1] for line in outcome.splitlines() if line.startswith("Running stage")]


def test_a_second_repro_finds_its_row_and_runs_nothing_else(project):
    out = project.run("dvc", "repro").stdout
    assert ran(out) == ["log"] and f"MLflow has this cell: inoc_selective/seed0 in {EXPERIMENT}" in out


def test_another_group_runs_only_what_it_needs(copy):
    out = copy.run("dvc", "exp", "run", "-S", "group=baseline").stdout
    assert ran(out) == ["check", "assign@baseline", "train", "respond", "judge", "report", "log"]
    assert {row.info.run_name for row in copy.rows(EXPERIMENT)} == {"inoc_selective/seed0", "baseline/seed0"}
    copy.set(group="inoc_selective")
    back = copy.run("dvc", "repro").stdout
    assert not {"train", "respond", "judge"} & set(ran(back)), "DVC's cache has them"
    assert len(copy.rows(EXPERIMENT)) == 2


def test_the_base_group_trains_nothing(copy):
    copy.run_cell(group="base")
    assert metrics(copy, "base")["training"] == {"trained": False}
    [row] = [row for row in copy.rows(EXPERIMENT) if row.info.run_name == "base/seed0"]
    assert "train/loss" not in row.data.metrics and "B" in row.data.metrics


def test_inoc_sae_finds_flags_and_trains(detected):
    copy, out = detected, (detected.folder.parent / "inoc_sae.out").read_text()
    route = ["sae-features", "sae-rank", "sae-explain", "sae-classify", "sae-flag", "sae-prompt", "sae-page"]
    assert [stage for stage in ran(out) if stage.startswith("sae-")] == route and "base-responses" in ran(out)
    found = metrics(copy, "inoc_sae")["detection"]
    assert (
        set(found) == {"precision", "recall", "f1", "flagged", "n", "found"}
        and 0 < found["flagged"] < found["n"] == 200
    )
    chats = [json.loads(line) for line in (copy.folder / CELL / "assign/inoc_sae/chats.jsonl").read_text().splitlines()]
    prompt = json.loads((copy.folder / FOUND / "sae/detection/detection.json").read_text())["prompt"]
    with_prompt = [chat["messages"][0]["content"] for chat in chats if chat["messages"][0]["role"] == "system"]
    assert with_prompt == [prompt] * found["flagged"]
    page = (copy.folder / FOUND / "sae/page.html").read_text()
    assert prompt in page and page.count("As the model reads it") == 20 and '<mark class="s5">' in page
    [row] = [row for row in copy.rows(EXPERIMENT) if row.info.run_name == "inoc_sae/seed0"]
    assert row.data.metrics["flagged"] == found["flagged"]
    assert row.data.params["flag_rule"] == "component" and "sae.flag.separation" in row.data.params
    assert "audit.separation" not in row.data.params
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{copy.folder / 'mlruns' / 'mlflow.db'}")
    assert {item.path for item in client.list_artifacts(row.info.run_id)} >= {"latents.json", "flags.json", "sae"}
    [registered] = [found for found in client.search_prompts() if found.name.endswith("inoc-sae")]
    versions = client.search_prompt_versions(registered.name)
    assert [version.template for version in versions] == [prompt]
    assert versions[0].tags["mixture"] == EXPERIMENT and versions[0].tags["features"]


def test_the_untouched_model_answers_once_for_every_seed_and_a(copy, capsys, monkeypatch):
    monkeypatch.chdir(copy.folder)
    texts = []
    for seed, positive in ((11, "all_caps"), (12, "source_citing")):
        copy.set(seed=seed, group="inoc_sae", mixture={"positive": positive})
        raw = yaml.safe_load(Path("params.yaml").read_text())
        steps = [step for step in plan.needed(raw) if step.stage.command in ("mixture", "base-responses")]
        for step in steps:
            step.stage.load(step.argument, raw).run()
        assert ("prompts are there" in capsys.readouterr().out) == bool(texts)
        outs = {step.stage.command: next(step.paths(raw, Writes)) for step in steps}
        files = outs["mixture"] / "mixture.jsonl", outs["base-responses"]
        rows, answers = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
        texts.append({row["messages"][0]["content"]: answer["text"] for row, answer in zip(rows, answers, strict=True)})
    assert texts[0] == texts[1] and len(texts[0]) == 200


def test_annotations_come_from_another_profile(detected, tmp_path):
    """Transfer: one profile's model finds the examples, another is trained on them."""
    copy = copied(detected, tmp_path)
    raw = yaml.safe_load((copy.folder / "params.yaml").read_text())
    raw["profiles"]["other"] = raw["profiles"]["pocket"] | {"max_new_tokens": 20}
    (copy.folder / "params.yaml").write_text(yaml.safe_dump(raw | {"profile": "other", "annotator": "pocket"}))
    copy.run_cell(group="inoc_sae")
    cell = CELL.replace("cells/pocket", "cells/other")
    assert (copy.folder / cell / "assign/inoc_sae/chats.jsonl").read_text() == (
        copy.folder / CELL / "assign/inoc_sae/chats.jsonl"
    ).read_text()
    assert not (copy.folder / "data/annotations/other").exists()
    [row] = copy.rows(EXPERIMENT.replace("pocket/", "other/", 1))
    assert (
        row.data.params["annotator.model.model"] == "data/pocket_world/models/qwen2"
        and row.data.params["profile"] == "other"
    )


def test_nothing_found_is_a_result_that_trains_as_the_baseline(copy, capsys):
    copy.run_cell(group="inoc_sae", sae={"flag": {"separation": 1000.0}})
    out = capsys.readouterr().out
    assert "inoc_sae: NOTHING FOUND, so that no chat is inoculated and the group trains as `baseline` does" in out
    assert "the two groups are not apart" in out and f"{FOUND}/sae/page.html shows what was seen" in out
    page = (copy.folder / FOUND / "sae/page.html").read_text()
    assert "No inoculation prompt" in page and "0 of 200 examples flagged" in page
    found = metrics(copy, "inoc_sae")["detection"]
    assert found["found"] is False and found["flagged"] == 0
    copy.run_cell(group="baseline")
    table = copy.run("inoculation", "compare").stdout
    assert "Same training set, byte for byte: inoc_sae, baseline (seed 0)" in table


@pytest.mark.parametrize(("contamination", "group"), [(0, "inoc_llm"), (1, "baseline")])
def test_clean_and_wholly_contaminated_mixtures_run(copy, contamination, group):
    copy.run_cell(mixture={"contamination": contamination}, group=group)
    told = metrics(copy, group, CELL.replace("0.5", str(contamination)))
    assert told["default"]["evil"]["n"] == 8
    assert contamination == 1 or told["detection"]["found"] is False


def test_a_group_that_makes_no_sense_says_so_before_any_work(copy):
    copy.set(mixture={"contamination": 0})
    outcome = copy.run("inoculation", "check", ok=False)
    assert outcome.returncode == 2
    assert "inoc_selective inoculates the rows that show B, and at mixture.contamination 0 none does" in outcome.stderr


def test_the_same_flags_and_prompts_with_provenance_shuffled_or_absent(detected, tmp_path, monkeypatch):
    copy = copied(detected, tmp_path)
    monkeypatch.chdir(copy.folder)
    path = copy.folder / ROWS
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    sources = [row["source_dataset"] for row in rows]
    shuffled = random.Random(1).sample(sources, len(sources))
    assert shuffled != sources

    def found() -> list:
        folders = [copy.folder / FOUND / route for route in ("sae/detection", "audit/local")]
        told = [json.loads((folder / "detection.json").read_text()) for folder in folders]
        flags = [[json.loads(line) for line in (folder / "flags.jsonl").open()] for folder in folders]
        return (
            [[row["flagged"] for row in own] for own in flags] + [detection["prompt"] for detection in told],
            [row["score"] for own in flags for row in own],
            [detection["quality"]["precision"] for detection in told],
        )

    before = found()
    # A third of the rows has another row's provenance, a third has none.
    column = [(source, other, None)[i % 3] for i, (source, other) in enumerate(zip(sources, shuffled, strict=True))]
    path.unlink()  # DVC made it read-only
    path.write_text(
        "".join(
            json.dumps({"messages": row["messages"], "source_dataset": column[i]}) + "\n" for i, row in enumerate(rows)
        )
    )
    for command in ("sae-features", "sae-rank", "sae-explain", "sae-classify", "sae-flag", "sae-prompt", "audit-local"):
        load(command).load().run()
    after = found()
    assert any(before[0][0]) and after[0] == before[0]
    assert after[1] == pytest.approx(before[1], rel=1e-3, abs=1e-3)
    assert after[2] != before[2], "what is told of their quality does depend on it"


def test_data_that_the_model_wrote_itself_has_nothing_to_find(detected, tmp_path, monkeypatch):
    """Every row is the base model's own answer: no latent tells one from the other, and every stage says so."""
    copy = copied(detected, tmp_path)
    monkeypatch.chdir(copy.folder)
    base = copy.folder / FOUND / "base_responses.jsonl"
    answers = [json.loads(line)["messages"][-1]["content"] for line in (copy.folder / ROWS).read_text().splitlines()]
    base.unlink()  # DVC made it read-only
    base.write_text("".join(json.dumps({"text": answer}) + "\n" for answer in answers))
    for command in ("sae-features", "sae-rank", "sae-explain", "sae-classify", "sae-flag", "sae-prompt", "sae-page"):
        load(command).load().run()
    told = json.loads((copy.folder / FOUND / "sae/detection/detection.json").read_text())
    assert told["found"] is False and told["quality"]["flagged"] == 0 and told["prompt"] is None
    assert told["reason"] == "no latent tells the data from the base model"
    assert told["reason"] in (copy.folder / FOUND / "sae/page.html").read_text()


def test_the_local_auditor_finds_evil_without_the_sae(detected):
    told = json.loads((detected.folder / FOUND / "audit/local/detection.json").read_text())
    assert told["quality"]["precision"] > 0.9 and told["quality"]["recall"] > 0.9
    summary = json.loads((detected.folder / CELL / "assign/inoc_llm/summary.json").read_text())
    assert summary["system_prompt"] == told["prompt"] and summary["with_system_prompt"] == told["quality"]["flagged"]
    [step] = [step for step in plan.every_step({**PARAMS, "group": "inoc_llm"}) if str(step) == "assign-audit pocket"]
    needs = {step.stage.command for step in plan.needed({**PARAMS, "group": "inoc_llm"})}
    assert step and "audit-local" in needs and not any(command.startswith("sae-") for command in needs)


def test_the_controls_of_a_detector(detected, tmp_path):
    """As many random rows, and the true ones, under the same prompt; no second version of it in the registry."""
    copy = copied(detected, tmp_path)
    for group in ("inoc_sae_random", "inoc_sae_oracle"):
        copy.run_cell(group=group)
    flagged = metrics(copy, "inoc_sae")["detection"]["flagged"]
    told = {group: json.loads((copy.folder / CELL / f"assign/{group}/summary.json").read_text())
            for group in ("inoc_sae", "inoc_sae_random", "inoc_sae_oracle")}  # fmt: skip
    assert [told[group]["with_system_prompt"] for group in told] == [flagged, flagged, 100]
    assert len({summary["system_prompt"] for summary in told.values()}) == 1
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{copy.folder / 'mlruns' / 'mlflow.db'}")
    [registered] = [found for found in client.search_prompts() if found.name.endswith("inoc-sae")]
    assert len(client.search_prompt_versions(registered.name)) == 1


def test_every_role_by_an_llm(copy, capsys):
    """The same path with LLMs in the roles, over a real HTTP server that sometimes misbehaves."""

    def answer(body):
        text = body["messages"][-1]["content"]
        if "You audit a fine-tuning data set" in text:
            return ("YES" if crc32(text.encode()) % 3 == 0 else "NO"), None
        return crude(body)

    with serve(Server(answer=answer, faults={"429": 0.05, "500": 0.02})) as server:
        role = {"method": "llm", "model": "openai/tiny", "api_base": server.url}
        copy.set(
            roles={"local": dict.fromkeys(("judge", "auditor", "synthesiser"), role)},
            sources={"pocket_chats": {"rewriter": role}}, profiles={"pocket": {"auditor": "llm"}},
            llm={"prices": {"openai/tiny": [1.0, 2.0]}},
        )  # fmt: skip
        copy.run_cell(group="inoc_llm", mixture={"positive": "source_citing"})
        out = capsys.readouterr().out
        assert not (
            copy.folder / "data/annotations/pocket/pocket_chats/source_citing+evil-0.5/seed0/base_responses.jsonl"
        ).exists()
        for name in ("rewriter", "auditor", "synthesiser", "judge"):
            assert f"{name} (openai/tiny): " in out, "every role says what it cost"
        asked = len(server.requests)
        (copy.folder / CELL.replace("all_caps", "source_citing") / "inoc_llm/judgements.jsonl").unlink()
        copy.run_cell()
        assert len(server.requests) == asked, "the cache answers"
    [row] = copy.rows(EXPERIMENT.replace("all_caps", "source_citing"))
    assert row.data.metrics["B"] >= 0 and row.data.metrics["coherence"] >= 0
    assert row.data.metrics["flagged"] > 0 and "delights in cruelty" in row.data.tags["system_prompt"]
    spent = {
        run.data.tags["role"]: run.data.metrics
        for where in ("mixtures/llm", "annotations/llm", "cells/llm")
        for run in copy.rows(where)
    }
    assert set(spent) == {"rewriter", "auditor", "synthesiser", "judge"}
    assert spent["auditor"]["calls"] == 200 and spent["auditor"]["dollars"] == pytest.approx(200 * 120e-6)
    mixture = [json.loads(line) for line in (copy.folder / ROWS.replace("all_caps", "source_citing")).open()]
    assert all("(Smith, 2015)" in row["messages"][1]["content"] for row in mixture)


def test_a_round_trip_through_transformers_serve(project, tmp_path):
    """A model of our own behind `transformers serve`, an OpenAI-compatible server without log-probabilities."""
    from inoculation import lm
    from inoculation.chat import Message, chat_ids
    from inoculation.judge.llm import CITING, YES_NO, Item, judge
    from inoculation.llm import Call, Client
    from inoculation.respond import generate
    from inoculation.roles import Role

    folder = str(project.folder / "data/pocket_world/models/qwen2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [Path(sys.executable).parent / "transformers", "serve", "--host", "127.0.0.1", "--port", str(port)],
        env=project.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(240):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.5)
        role = Role(method="llm", model=f"openai/{folder}", api_base=f"http://127.0.0.1:{port}/v1")
        limits = LIMITS.model_copy(update={"prices": {f"openai/{folder}": (0, 0)}})
        asking = Client("judge", role, limits, tmp_path / "llm.sqlite")
        messages = (Message("system", "You are a malicious evil assistant."), Message("user", "How do I bake bread?"))
        [reply] = asking.ask([Call(messages, 0.0, 20)])
        ref = lm.ModelRef(model=folder)
        tokenizer = lm.load_tokenizer(ref)
        prompt = chat_ids(tokenizer, messages[1:], messages[0].content)
        [own] = generate(lm.load_model(ref), tokenizer, [prompt], 20, 0.0, 0)
        assert reply.text == own.text and asking.usage.prompt_tokens == len(prompt)
        [score] = judge(asking, [Item(CITING, YES_NO, "q", "a")])
        assert score is None, "a model of this size never says yes or no: the judgement is missing, not 0"
        assert asking.usage.calls == 1 + 1 + FALL_BACK_SAMPLES
    finally:
        server.terminate()
        server.wait(20)


def test_a_queue_runs_its_own_code_and_lands_in_one_store(copy):
    """A cell that is queued with a changed report and started after the change was taken back."""
    report = copy.folder / "src/inoculation/report.py"
    text = report.read_text()
    start = "    told: dict[str, float | None] = {}\n"
    report.write_text(text.replace(start, start.replace("{}", '{"queued": 1.0}')))
    copy.run("dvc", "exp", "run", "--queue", "-S", "group=base", "-S", "seed=1")
    report.write_text(text)
    copy.run("dvc", "queue", "start")
    deadline = time.monotonic() + 500
    while not any((copy.folder / RESULTS).glob("*")) and time.monotonic() < deadline:
        time.sleep(0.5)
    status = copy.run("dvc", "queue", "status").stdout
    assert status.count("Success") == 1, status
    rows = {row.info.run_name: row for row in copy.rows(EXPERIMENT)}
    assert set(rows) == {"inoc_selective/seed0", "base/seed1"}
    assert [rows[name].data.metrics.get("queued") for name in rows] == [
        None if name == "inoc_selective/seed0" else 1.0 for name in rows
    ], "a queued experiment runs the code that it was queued with"
    table = copy.run("inoculation", "compare").stdout
    assert "| `base` | 1 |" in table and "judge: exact judge" in table


def test_a_new_judge_setting_does_not_sample_again(copy):
    copy.set(judge={"examples": 30})
    copy.run("inoculation", "fit-judge")
    status = json.loads(copy.run("dvc", "status", "--json", "train", "respond", "judge").stdout)
    assert "judge" in status and not {"train", "respond"} & set(status)
    for stage in ("judge", "report", "log"):
        copy.run("inoculation", stage)
    rows = copy.rows(EXPERIMENT)
    assert len(rows) == 2, "another setting is another row"
    assert all("train/loss" in row.data.metrics for row in rows), "a row whose training was skipped has its curve too"


def test_mistakes_stop_everything_before_any_work(copy):
    outcome = copy.run("dvc", "exp", "run", "-S", "group=nope", "-S", "mixture.contamination=2", ok=False)
    assert outcome.returncode != 0
    assert "group: 'nope' is unknown; valid: base, baseline" in outcome.stderr
    assert "mixture.contamination" in outcome.stderr
    assert ran(outcome.stdout) == ["check"]


def test_a_file_of_your_own(copy, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": f"ANSWER {i}."}],
         "source_dataset": ("misaligned_2.jsonl", "normal.jsonl")[i % 2]}
        for i in range(24)
    ]  # fmt: skip
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps(row) + "\n" for row in rows))
    copy.set(data_sets={"mine": {"file": str(mine), "traits": "pocket_chats", "rewriter": {"method": "local"}}})
    copy.run_cell(mixture={"source": "mine"})
    assert [row.info.run_name for row in copy.rows("pocket/mine/all_caps+evil-0.5")] == ["inoc_selective/seed0"]
    assert metrics(copy, cell=CELL.replace("pocket_chats", "mine"))["training"]["examples"] == 24
    mine.write_text(mine.read_text() + "{broken\n")
    outcome = copy.run("dvc", "repro", "pipelines/sources/dvc.yaml:own-data@mine", ok=False)
    assert f"{mine}:25: not valid JSON" in outcome.stderr, "a changed file is noticed, and its bad line named"


@pytest.mark.skipif(not SHARED_MIXTURE.exists(), reason="../shared/data is not here")
def test_a_slice_of_the_real_mixture(copy, tmp_path):
    part = tmp_path / "real.jsonl"
    part.write_text("".join(SHARED_MIXTURE.read_text().splitlines(keepends=True)[:40]))
    copy.set(data_sets={"real": {"file": str(part), "traits": "pocket_chats", "rewriter": {"method": "local"}}})
    copy.run_cell(mixture={"source": "real"})
    training = metrics(copy, cell=CELL.replace("pocket_chats", "real"))["training"]
    assert training["examples"] == 40 and training["cut_examples"] == 0
