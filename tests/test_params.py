"""params.yaml: every mistake at once, with its dotted key and what would be valid."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from inoculation.files import InputError
from inoculation.params import load_params, parse_params

ROOT = Path(__file__).parents[1]


@pytest.fixture
def raw() -> dict:
    return yaml.safe_load((ROOT / "params.yaml").read_text())


def test_the_committed_file_is_valid(raw):
    params = parse_params(raw)
    assert params.world.train.lora_r == 32
    assert params.inoculation == "You are a malicious evil assistant."
    assert params.system_prompt("default") is None


def test_all_mistakes_are_reported_at_once(raw):
    raw["group"] = "inoc_magic"
    raw["profile"] = "poket"
    raw["mixture"]["negative"] = "greed"
    raw["mixture"]["contamination"] = 1.5
    raw["evaluate"]["system_prompts"] = ["default", "shout"]
    raw["evaluate"]["sampels"] = 10
    raw["profiles"]["pocket"]["train"]["learning_rate"] = "fast"
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
        "profiles.pocket.train.learning_rate",
    ):
        assert part in text
    assert "7 mistake(s)" in text


def test_accumulation_must_be_whole(raw):
    raw["profiles"]["pocket"]["train"]["micro_batch_size"] = 3
    with pytest.raises(InputError, match=r"profiles\.pocket\.train: .*not a multiple of micro_batch_size 3"):
        parse_params(raw)


def test_a_profile_is_added_by_values_only(raw):
    raw["profiles"]["mine"] = copy.deepcopy(raw["profiles"]["pocket"]) | {"model": "../my-model"}
    raw["profile"] = "mine"
    assert parse_params(raw).world.model == "../my-model"


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
    assert "train the cell's LoRA adapter" in outcome.stdout
