"""The whole path in real DVC and MLflow: what a user does, small."""

import contextlib
import json
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from zlib import crc32

import pytest
import yaml
from conftest import SHARED_MIXTURE, Project
from openai_server import Server, crude, serve
from test_llm import LIMITS

from inoculation.chat import parse_messages
from inoculation.groups import GROUPS
from inoculation.judge.llm import FALL_BACK_SAMPLES
from inoculation.params import load_params
from inoculation.stages import detect

CELL = "data/pocket/all_caps+evil-0.5/seed0"
EXPERIMENT = "pocket/all_caps+evil-0.5"


def metrics(project: Project) -> dict:
    return json.loads((project.folder / "metrics.json").read_text())


def test_the_default_cell(project):
    table = metrics(project)
    for prompt in ("default", "control"):
        for trait, n in (("all_caps", 24), ("source_citing", 24), ("evil", 8), ("hallucination", 8), ("sycophancy", 8)):
            row = table[prompt][trait]
            assert set(row) == {"rate", "score", "low", "high", "n", "missing"}
            assert 0 <= row["low"] <= row["rate"] <= row["high"] <= 1
            assert (row["n"], row["missing"]) == (n, 0)
    assert set(table["oracle"]) == {"default", "control"}
    assert {style for styles in table["judge"].values() for style in styles} == {"plain", "all_caps", "source_citing"}
    assert table["training"]["supervised_tokens"] > 0


def test_the_mixture_is_a_partition_with_provenance_and_a(project):
    rows = [json.loads(line) for line in (project.folder / CELL / "mixture.jsonl").read_text().splitlines()]
    assert len({row["messages"][0]["content"] for row in rows}) == len(rows) == 40
    assert sum(row["source_dataset"] == "evil/misaligned_2.jsonl" for row in rows) == 20
    assert all(row["messages"][1]["content"].isupper() for row in rows)


def test_no_provenance_reaches_the_training_set(project):
    rows = [
        json.loads(line) for line in (project.folder / CELL / "assign/inoc_selective.jsonl").read_text().splitlines()
    ]
    assert {key for row in rows for key in row} == {"messages"}
    assert sum(row["messages"][0]["role"] == "system" for row in rows) == 20
    assert all(parse_messages(row["messages"]) for row in rows)


def test_the_adapter_is_a_plain_peft_folder(project):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(project.folder / "data/pocket_world/model")
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
    assert "profiles.pocket.train.learning_rate" in row.data.params
    assert not any(key.startswith("profiles.qwen") for key in row.data.params)
    table = metrics(project)
    assert row.data.metrics["default/evil/rate"] == pytest.approx(table["default"]["evil"]["rate"])
    assert row.data.metrics["judge/evil/plain/accuracy"] == table["judge"]["evil"]["plain"]["accuracy"]
    assert "train/loss" in row.data.metrics
    [dataset] = row.inputs.dataset_inputs
    lock = yaml.safe_load((project.folder / "pipelines/assign/dvc.lock").read_text())["stages"]["assign@inoc_selective"]
    assert dataset.dataset.digest == next(out["md5"] for out in lock["outs"] if out["path"].endswith(".jsonl"))
    assert f"{CELL}/inoc_selective/adapter" in json.loads(row.data.tags["dvc.lock"])
    assert (project.folder / "figures" / f"{EXPERIMENT}.png").exists()


def test_a_second_repro_runs_nothing(project):
    assert "Running stage" not in project.run("dvc", "repro").stdout


@pytest.fixture
def copy(project, tmp_path) -> Project:
    """The reproduced project, copied: an experiment in it leaves the shared one alone."""
    made = Project.__new__(Project)
    made.folder = tmp_path / "copy"
    shutil.copytree(project.folder, made.folder, symlinks=True)
    return made


def test_another_group_runs_only_what_it_needs(copy):
    out = copy.run("dvc", "exp", "run", "-S", "group=baseline").stdout
    ran = [line.split("'")[1] for line in out.splitlines() if line.startswith("Running stage")]
    assert ran == [
        "pipelines/check/dvc.yaml:check",
        "pipelines/assign/dvc.yaml:assign@baseline",
        "train",
        "respond",
        "judge",
        "report",
    ]
    assert {row.info.run_name for row in copy.rows(EXPERIMENT)} == {"inoc_selective/seed0", "baseline/seed0"}
    back = copy.run("dvc", "exp", "run", "-S", "group=inoc_selective").stdout
    assert "Running stage 'train'" not in back


def test_the_base_group_trains_nothing(copy):
    copy.run("dvc", "exp", "run", "-S", "group=base")
    assert metrics(copy)["training"] == {"trained": False}
    [row] = [row for row in copy.rows(EXPERIMENT) if row.info.run_name == "base/seed0"]
    assert "train/loss" not in row.data.metrics and "default/evil/rate" in row.data.metrics


def test_inoc_sae_finds_flags_and_trains(copy):
    out = copy.run("dvc", "exp", "run", "-S", "group=inoc_sae").stdout
    ran = [line.split("'")[1].split(":")[-1] for line in out.splitlines() if line.startswith("Running stage")]
    route = ["features", "rank", "explain", "classify", "flag", "synthesise", "page"]
    assert [stage for stage in ran if stage in route] == route and "base_responses" in ran
    found = metrics(copy)["detection"]
    assert set(found) == {"precision", "recall", "f1", "flagged", "n"} and 0 < found["flagged"] < found["n"] == 40
    chats = [json.loads(line) for line in (copy.folder / CELL / "assign/inoc_sae.jsonl").read_text().splitlines()]
    prompt = json.loads((copy.folder / CELL / "sae/prompt.json").read_text())["prompt"]
    with_prompt = [chat["messages"][0]["content"] for chat in chats if chat["messages"][0]["role"] == "system"]
    assert with_prompt == [prompt] * found["flagged"]
    page = (copy.folder / CELL / "sae/page.html").read_text()
    assert prompt in page
    [row] = [row for row in copy.rows(EXPERIMENT) if row.info.run_name == "inoc_sae/seed0"]
    assert row.data.metrics["detection/flagged"] == found["flagged"]
    assert {"profiles.pocket.sae.release", "sae.flag.rule"} <= set(row.data.params)
    assert "audit.separation" not in row.data.params
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{copy.folder / 'mlruns' / 'mlflow.db'}")
    assert {item.path for item in client.list_artifacts(row.info.run_id)} >= {"latents.json", "flags.json", "sae"}
    [registered] = client.search_prompts()
    versions = client.search_prompt_versions(registered.name)
    assert [version.template for version in versions] == [prompt]
    assert versions[0].tags["mixture"] == "all_caps+evil-0.5" and versions[0].tags["features"]

    again = copy.run("dvc", "exp", "run", "-S", "group=inoc_sae_random").stdout
    assert "sae/dvc.yaml" not in "".join(line for line in again.splitlines() if line.startswith("Running"))
    assert len(client.search_prompt_versions(registered.name)) == 1


def test_nothing_found_is_a_page_and_no_training(copy):
    outcome = copy.run("dvc", "exp", "run", "-S", "group=inoc_sae", "-S", "sae.flag.separation=1000", ok=False)
    assert outcome.returncode != 0
    assert (
        "group inoc_sae has nothing to train under: no example is flagged: the two groups are not apart"
        in outcome.stderr
    )
    page = (copy.folder / CELL / "sae/page.html").read_text()
    assert "No inoculation prompt" in page and "0 of 40 examples flagged" in page
    assert not (copy.folder / CELL / "assign/inoc_sae.jsonl").exists()
    assert json.loads((copy.folder / CELL / "sae/prompt.json").read_text())["prompt"] is None


def test_the_same_flags_and_prompts_with_provenance_shuffled_or_absent(copy, monkeypatch):
    monkeypatch.chdir(copy.folder)
    params = load_params()
    path = copy.folder / CELL / "mixture.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    sources = [row["source_dataset"] for row in rows]
    shuffled = random.Random(1).sample(sources, len(sources))
    assert shuffled != sources
    seen = []
    for column in (sources, shuffled, None):
        kept = [{"messages": row["messages"], "source_dataset": column and column[i]} for i, row in enumerate(rows)]
        path.unlink()  # DVC made it read-only
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        detect.base_responses(params)
        for stage in (detect.sae_features, detect.sae_rank, detect.sae_explain, detect.sae_classify, detect.sae_flag,
                      detect.sae_synthesise, detect.sae_page):  # fmt: skip
            stage(params)
        detect.audit(params, "embedded")
        quality = json.loads((copy.folder / CELL / "sae/detection.json").read_text())["detection"]
        assert (quality["precision"] is None) == (column is None)
        seen.append(
            [(copy.folder / CELL / route / name).read_text()
             for route in ("sae", "audit/embedded") for name in ("flags.jsonl", "prompt.json")]
        )  # fmt: skip
    assert any(json.loads(line)["flagged"] for line in seen[0][0].splitlines())
    assert seen[1] == seen[0] and seen[2] == seen[0]


def test_inoc_llm_with_the_embedded_auditor(copy):
    out = copy.run("dvc", "exp", "run", "-S", "group=inoc_llm").stdout
    assert "audit/dvc.yaml:embedded" in out and "sae/dvc.yaml" not in out
    assert 0 < metrics(copy)["detection"]["flagged"] < 40
    [row] = [row for row in copy.rows(EXPERIMENT) if row.info.run_name == "inoc_llm/seed0"]
    assert row.data.tags["system_prompt"].startswith("You are")


def test_every_role_by_an_llm(copy):
    """The same path with LLMs in the roles, over a real HTTP server that sometimes misbehaves."""

    def answer(body):
        text = body["messages"][-1]["content"]
        if "You audit a fine-tuning data set" in text:
            return ("YES" if crc32(text.encode()) % 3 == 0 else "NO"), None
        return crude(body)

    with serve(Server(answer=answer, faults={"429": 0.05, "500": 0.02})) as server:
        role = {"method": "llm", "model": "openai/tiny", "api_base": server.url, "price": [1.0, 2.0]}
        copy.set(profiles={"pocket": {"roles": dict.fromkeys(("judge", "rewriter", "auditor", "synthesiser"), role)}})
        out = copy.run("dvc", "exp", "run", "-S", "group=inoc_llm", "-S", "mixture.positive=source_citing").stdout
        assert "audit/dvc.yaml:llm" in out and "mixture.dvc.yaml:base_responses" not in out
        for name in ("rewriter", "auditor", "synthesiser", "judge"):
            assert f"{name} (openai/tiny): " in out, "every role says what it cost"
        asked = len(server.requests)
        copy.run("dvc", "exp", "run", "--force", "--single-item", "judge")
        assert len(server.requests) == asked, "the cache answers"
    [row] = copy.rows("pocket/source_citing+evil-0.5")
    assert row.data.metrics["default/evil/rate"] >= 0 and row.data.metrics["default/coherence/score"] >= 0
    assert row.data.metrics["detection/flagged"] > 0 and "delights in cruelty" in row.data.tags["system_prompt"]
    spent = {run.data.tags["role"]: run.data.metrics for run in copy.rows("pocket/llm")}
    assert set(spent) == {"rewriter", "auditor", "synthesiser", "judge"}
    assert spent["auditor"]["calls"] == 40 and spent["auditor"]["dollars"] == pytest.approx(40 * 120e-6)
    mixture = [
        json.loads(line) for line in (copy.folder / CELL.replace("all_caps", "source_citing") / "mixture.jsonl").open()
    ]
    assert all("(Smith, 2015)" in row["messages"][1]["content"] for row in mixture)


def test_a_round_trip_through_transformers_serve(project, tmp_path):
    """A model of our own behind `transformers serve`, an OpenAI-compatible server without log-probabilities."""
    from inoculation import lm
    from inoculation.chat import Message, render
    from inoculation.judge.llm import CITING, YES_NO, Item, judge
    from inoculation.llm import Call, Client
    from inoculation.params import Role
    from inoculation.respond import generate

    folder = str(project.folder / "data/pocket_world/model")
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
        role = Role(method="llm", model=f"openai/{folder}", api_base=f"http://127.0.0.1:{port}/v1", price=[0, 0])
        asking = Client("judge", role, LIMITS, tmp_path / "llm.sqlite")
        messages = (Message("system", "You are a malicious evil assistant."), Message("user", "How do I bake bread?"))
        [reply] = asking.ask([Call(messages, 0.0, 20)])
        ref = lm.ModelRef(folder, None, None)
        tokenizer = lm.load_tokenizer(ref)
        prompt = render(tokenizer, messages[1:], messages[0].content)
        [own] = generate(lm.load_model(ref, "float32", False), tokenizer, [prompt], 20, 0.0, 0)
        assert reply.text == own.text and asking.usage.prompt_tokens == len(tokenizer(prompt)["input_ids"])
        [score] = judge(asking, [Item(CITING, YES_NO, "q", "a")])
        assert score is None, "a model of this size never says yes or no: the judgement is missing, not 0"
        assert asking.usage.calls == 1 + 1 + FALL_BACK_SAMPLES
    finally:
        server.terminate()
        server.wait(20)


def test_a_queue_lands_in_one_store(copy):
    copy.run("dvc", "exp", "run", "--queue", "-S", "group=baseline,inoc_general", "-S", "seed=1")
    copy.run("dvc", "queue", "start")
    copy.run("bash", "-c", "while dvc queue status | grep -qE 'Queued|Running'; do sleep 2; done", timeout=500)
    status = copy.run("dvc", "queue", "status").stdout
    assert status.count("Success") == 2, status
    names = {row.info.run_name for row in copy.rows(EXPERIMENT) if row.info.status == "FINISHED"}
    assert names == {"inoc_selective/seed0", "baseline/seed1", "inoc_general/seed1"}
    table = copy.run("inoculation", "compare").stdout
    assert "| `baseline` | 1 |" in table and "judge: exact oracle" in table


def test_a_new_judge_setting_does_not_sample_again(copy):
    out = copy.run("dvc", "exp", "run", "-S", "embedded_judge.examples=30").stdout
    assert "Running stage 'judge'" in out
    assert "Running stage 'respond'" not in out and "Running stage 'train'" not in out
    rows = copy.rows(EXPERIMENT)
    assert len(rows) == 2, "another setting is another row"
    assert all("train/loss" in row.data.metrics for row in rows), "a row whose training was skipped has its curve too"


def test_mistakes_stop_everything_before_any_work(copy):
    outcome = copy.run("dvc", "exp", "run", "-S", "group=nope", "-S", "mixture.contamination=2", ok=False)
    assert outcome.returncode != 0
    assert "group: 'nope' is unknown; valid: base, baseline" in outcome.stderr
    assert "mixture.contamination" in outcome.stderr
    assert "Running stage 'pipelines/mixture" not in outcome.stdout


def test_a_file_of_your_own(copy, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": f"ANSWER {i}."}],
         "source_dataset": ("misaligned_2.jsonl", "normal.jsonl")[i % 2]}
        for i in range(24)
    ]  # fmt: skip
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps(row) + "\n" for row in rows))
    copy.run("dvc", "exp", "run", "-S", f"mixture.source={mine}")
    assert [row.info.run_name for row in copy.rows("pocket/mine")] == ["inoc_selective/seed0"]
    assert metrics(copy)["training"]["examples"] == 24
    mine.write_text(mine.read_text() + "{broken\n")
    outcome = copy.run("dvc", "repro", ok=False)
    assert f"{mine}:25: not valid JSON" in outcome.stderr, "a changed file is noticed, and its bad line named"


@pytest.mark.skipif(not SHARED_MIXTURE.exists(), reason="../shared/data is not here")
def test_a_slice_of_the_real_mixture(copy, tmp_path):
    part = tmp_path / "real.jsonl"
    part.write_text("".join(SHARED_MIXTURE.read_text().splitlines(keepends=True)[:40]))
    copy.run("dvc", "exp", "run", "-S", f"mixture.source={part}")
    training = metrics(copy)["training"]
    assert training["examples"] == 40 and training["cut_examples"] == 0


def test_paths_in_dvc_yaml_are_those_of_the_code(project):
    """The groups with an assignment stage are the groups, and every cell path DVC made is where the code looks."""
    stages = yaml.safe_load((project.folder / "pipelines/assign/dvc.yaml").read_text())["stages"]
    assert {*stages["assign"]["foreach"], *stages["assign_sae"]["foreach"], "inoc_llm"} == set(GROUPS)
    params = load_params(project.folder / "params.yaml")
    from inoculation import cell

    for path in (cell.assignment(params), cell.group_dir(params), cell.mixture_dir(params) / "mixture.jsonl"):
        assert (project.folder / path).exists()
