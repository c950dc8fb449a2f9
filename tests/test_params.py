"""params.yaml: every mistake at once, with its dotted key and what would be valid."""

import copy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from inoculation import plan
from inoculation.files import InputError
from inoculation.hub import reachable
from inoculation.params import load_params, parse_params

ROOT = Path(__file__).parents[1]


@pytest.fixture
def raw() -> dict:
    return yaml.safe_load((ROOT / "params.yaml").read_text())


def test_the_committed_file_is_valid(raw):
    params = parse_params(raw)
    assert params.train["study"].lora_r == 32
    assert params.negative_traits["evil"].inoculation == "You are a malicious evil assistant."


def test_all_mistakes_are_reported_at_once(raw):
    raw["group"] = "inoc_magic"
    raw["profile"] = "poket"
    raw["mixture"]["negative"] = "greed"
    raw["mixture"]["contamination"] = 1.5
    raw["evaluate"]["system_prompts"] = ["default", "shout"]
    raw["evaluate"]["sampels"] = 10
    raw["train"]["pocket"]["learning_rate"] = "fast"
    raw["profiles"]["pocket"]["roles"] = "gods"
    with pytest.raises(InputError) as error:
        parse_params(raw)
    text = str(error.value)
    for part in (
        "group: 'inoc_magic' is unknown; valid: base, baseline",
        "profile: 'poket' is unknown; valid: pocket",
        "mixture.negative: 'greed' is unknown; valid: evil, hallucination, sycophancy",
        "mixture.contamination",
        "evaluate.system_prompts.1: 'shout'",
        "evaluate.sampels: unknown parameter",
        "train.pocket.learning_rate",
        "profiles.pocket.roles: 'gods' is unknown; valid: local, study",
    ):
        assert part in text
    assert "8 mistake(s)" in text


def test_answers_under_a_groups_own_prompt_alone_are_refused(raw):
    raw["evaluate"]["system_prompts"] = ["own"]
    with pytest.raises(InputError, match="own alone, which groups without a prompt have not"):
        parse_params(raw)


def test_evaluation_prompts_are_bs_own_too(raw):
    raw["evaluate"]["system_prompts"] = ["default", "inoculation", "own", "negated", "unrelated"]
    parse_params(raw)
    raw["negative_traits"]["evil"]["probes"] = {"own": "x", "control": "y"}
    with pytest.raises(InputError) as error:
        parse_params(raw)
    for part in ("3 mistake(s)", "system_prompts.3: 'negated'", "evil.probes.own: the name", "evil.probes.control"):
        assert part in str(error.value)


def test_personas_are_chosen_among_the_characters_that_are_tried(raw):
    raw["synthesise"]["adjectives"], raw["persona"]["personas"] = 24, 26
    with pytest.raises(
        InputError, match=r"persona\.personas: 26 are more than the 24 characters of synthesise\.adjectives"
    ):
        parse_params(raw)


def test_traits_do_not_share_a_judge(raw):
    raw["negative_traits"] |= {"coherence": {"folder": "x", "evaluation": "x", "inoculation": "X."}}
    raw["negative_traits"]["sycophancy"] |= {"evaluation": "evil"}
    with pytest.raises(InputError) as caught:
        parse_params(raw)
    for told in ("negative_traits.coherence: the name is reserved", "negative_traits.evil.evaluation: 'evil' is another",
                 "negative_traits.sycophancy.evaluation: 'evil' is another"):  # fmt: skip
        assert told in str(caught.value)


def test_what_could_only_fail_later_is_a_mistake(raw):
    raw["seed"] = 2**32
    with pytest.raises(InputError, match="seed: "):
        parse_params(raw)
    raw["seed"] = 2**32 - 1
    raw["pocket"]["models"]["qwen2"] |= {"kv_heads": 4, "hidden_size": 30}
    raw["pocket"]["sae"] |= {"block": 4, "k": 5000, "batch_size": 10**6, "seed": 2**32}
    raw["synthesise"]["adjectives"] = 600
    raw["profiles"]["pocket"]["auditor"] = "llm"
    with pytest.raises(InputError) as error:
        parse_params(raw)
    for part in (
        "pocket.models.qwen2.hidden_size: 30 is no even number for each of 6 heads",
        "pocket.models.qwen2.kv_heads: 4 do not divide 6 heads",
        "pocket.sae.block: 4, and pocket.models.qwen2 has blocks 0-3",
        "pocket.sae.k: 5000 are more than its 2048 latents",
        "pocket.sae.batch_size: 1000000 are more than its 300000 tokens",
        f"pocket.sae.seed: {2**32}; valid: 0 to {2**32 - 1}",
        "synthesise.adjectives: 600 are more than the list's 545",
        "profiles.pocket.auditor: llm, and the auditor of roles.local is local",
        "8 mistake(s)",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("profile", ["qwen2_5_7b", "llama3_1_8b", "gemma3_4b"])
def test_models_of_a_hub_that_cannot_be_reached_are_named_before_any_work(profile, raw, monkeypatch, tmp_path):
    def unknown(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    raw |= {"profile": profile, "annotator": profile, "group": "inoc_sae"}
    raw["mixture"]["source"] = "persona_vectors"
    model = yaml.safe_load((ROOT / raw["profiles"][profile]["model"]).read_text())["model"]
    reachable.cache_clear()
    problems = plan.missing(raw)
    reachable.cache_clear()
    assert any(f"{model} is not in the hub's cache, and the hub cannot be reached" in problem for problem in problems)
    assert any("OPENAI_API_KEY" in problem for problem in problems)


def test_packages_with_weights_that_are_not_installed_are_named_before_any_work(raw, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where no model was made
    raw |= {"profile": "qwen_coder", "annotator": "smollm2", "group": "inoc_persona"}
    raw["packaged"]["qwen_coder"]["pieces"][0]["package"] = "no_such_package_at_all"
    told = [problem for problem in plan.missing(raw) if "packaged-model qwen_coder" in problem]
    assert told == [
        "packaged-model qwen_coder: the package no_such_package_at_all is not installed; run `make qwen_coder`"
    ]


def test_what_brings_a_model_or_sae_that_only_the_cache_has(raw, monkeypatch, tmp_path):
    """A queued experiment made it in a copy of the checkout: rows of such a cell were left out without a word."""
    monkeypatch.chdir(tmp_path)
    model = (
        "data/pocket_world/models/qwen2 is not here; `dvc repro pipelines/pocket/dvc.yaml:pocket-model@qwen2` brings it"
    )
    sae = "data/pocket_world/sae is not here; `dvc repro pipelines/pocket/dvc.yaml:pocket-sae` brings it"
    assert [told.split(" from ")[0] for told in plan.absent(raw, "baseline")] == [model]
    assert sorted(told.split(" from ")[0] for told in plan.absent(raw, "inoc_sae")) == sorted([model, sae])


def test_of_another_models_sae_it_is_said_that_it_is_not_what_it_lacks(raw, monkeypatch):
    monkeypatch.chdir(ROOT)
    raw |= {"profile": "qwen_coder", "annotator": "qwen_coder", "group": "inoc_sae"}
    told = [problem for problem in plan.missing(raw) if "sae" in problem or "corpora" in problem]
    assert (
        len(told) == 1 and "data/smollm2/sae is trained on data/smollm2/model, not on data/qwen_coder/model" in told[0]
    )


@pytest.mark.parametrize("value", [[], [[]], 5, {"a": []}])
@pytest.mark.parametrize("key", ["evaluation", "probes", "folder"])
def test_a_trait_with_a_value_of_another_kind_is_a_mistake_and_no_crash(raw, key, value):
    """Found by fuzzing: `evaluation: []` was a TypeError."""
    for trait in raw["negative_traits"].values():
        trait[key] = copy.deepcopy(value)
    with pytest.raises(InputError, match=f"negative_traits.evil.{key}"):
        parse_params(raw)


def test_a_profile_is_added_by_values_only(raw):
    raw["profiles"]["mine"] = copy.deepcopy(raw["profiles"]["pocket"]) | {"model": "../my-model"}
    raw["profile"] = "mine"
    assert parse_params(raw).profiles["mine"].model == "../my-model"


@pytest.mark.parametrize(
    ("text", "message"), [("- a\n", "a mapping is expected"), ("a: [", "not valid YAML")], ids=["list", "syntax"]
)
def test_not_a_mapping(tmp_path, text, message):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_params(path)


def test_the_command_exits_with_2_and_no_traceback(tmp_path, raw):
    raw["group"] = "nope"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    outcome = subprocess.run(
        [sys.executable, "-c", "from inoculation.cli import main; main()", "check"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert outcome.returncode == 2
    assert "group: 'nope' is unknown" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert not (tmp_path / "data").exists()


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['inoculation', '--help']\n"
        "from inoculation.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'mlflow', 'litellm', 'pandas', 'sklearn', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    assert "Train the cell's LoRA adapter" in outcome.stdout


@pytest.mark.parametrize(
    ("key", "value"), [("seed", 1.0), ("seed", True), ("seed", "1"), ("both", "yes"), ("both", 1), ("lora_alpha", "64")]
)
def test_a_value_of_another_type_is_refused(raw, key, value):
    """`-S seed=1.0` would name another folder than `-S seed=1` and give the same cell."""
    places = {"seed": (raw, ""), "both": (raw["sae"]["classify"], "sae.classify."),
              "lora_alpha": (raw["train"]["pocket"], "train.pocket.")}  # fmt: skip
    place, path = places[key]
    place[key] = value
    raw["pocket"]["models"]["qwen2"]["steps"] = 10.0
    with pytest.raises(InputError) as error:
        parse_params(raw)
    assert f"{path}{key}: Input should be a valid" in str(error.value) and repr(value) in str(error.value)
    assert "pocket.models.qwen2.steps: Input should be a valid integer (given: 10.0)" in str(error.value)
    assert "2 mistake(s)" in str(error.value)


def test_keys_given_twice_are_listed_with_their_lines(tmp_path):
    lines = (ROOT / "params.yaml").read_text().splitlines()
    threshold = next(i for i, line in enumerate(lines) if line.startswith("  threshold:"))
    lines.insert(threshold + 1, "  threshold: 60")
    lines += ["seed: 1.0"]
    path = tmp_path / "params.yaml"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError) as error:
        load_params(path)
    seed = next(i for i, line in enumerate(lines) if line.startswith("seed:"))
    assert f"line {threshold + 2}: evaluate.threshold is given already in line {threshold + 1}" in str(error.value)
    assert f"line {len(lines)}: seed is given already in line {seed + 1}" in str(error.value)
    assert "2 mistake(s)" in str(error.value)


def test_numbers_are_read_as_dvc_writes_them(tmp_path, raw):
    """`-S ...learning_rate=1e-05`: a number to DVC (YAML 1.2), a text to plain PyYAML (YAML 1.1)."""
    text = (ROOT / "params.yaml").read_text()
    path = tmp_path / "params.yaml"
    path.write_text(text.replace("learning_rate: 3.0e-4", "learning_rate: 3e-05"))
    assert load_params(path).train["pocket"].learning_rate == 3e-5
    assert load_params(ROOT / "params.yaml") == parse_params(raw)


@pytest.mark.parametrize(("content", "message"), [(b"a: \xff", "not valid YAML"), (b"[" * 100_000, "not valid YAML")])
def test_a_file_that_is_no_text_or_too_deep(tmp_path, content, message):
    (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_params(tmp_path / "params.yaml")
