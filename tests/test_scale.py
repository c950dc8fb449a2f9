"""More than one process: a training on two says what one says, whatever dies is told and continued; who gets which GPU."""

import json
import multiprocessing
import os
import random
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT, WORDS, random_model
from launched import fail, refuse, say

from inoculation import lm
from inoculation.chat import Message
from inoculation.cli import _gpus
from inoculation.files import InputError
from inoculation.launch import launch
from inoculation.mixture import Row, TrainingChat
from inoculation.params import parse_params
from inoculation.preventative import Steering
from inoculation.train import TrainSettings, train

SETTINGS = TrainSettings(
    lora_r=4, lora_alpha=8, lora_dropout=0.0, learning_rate=3e-3, epochs=3, batch_size=8, warmup_steps=2, weight_decay=0.01,
    max_length=256, optimizer="adamw_torch", bf16=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def ref(tmp_path_factory) -> lm.ModelRef:
    """A random model of two blocks."""
    folder = tmp_path_factory.mktemp("model")
    random_model(folder)
    return lm.ModelRef(model=str(folder))


def chats(count: int) -> list[TrainingChat]:
    """Of very different lengths: a mean over chats, or over processes, is not one over tokens."""
    rng = random.Random(0)
    return [
        TrainingChat(
            "Be kind." if i % 3 else None,
            Row(
                (Message("user", f"what? {i}"), Message("assistant", " ".join(rng.choices(WORDS, k=1 + i * i % 47)))),
                None,
            ),
        )
        for i in range(count)
    ]


@pytest.mark.skipif("SOAK" not in os.environ, reason="a quarter of a minute: make soak-ray")
def test_the_first_process_alone_is_heard_and_what_goes_wrong_is_told():
    heard = []
    assert launch(2, say, "!", on_log=lambda *said: heard.append(said)) == "02!" and heard == [(1, {"rank": 0.0})]
    with pytest.raises(InputError, match="^word: valid: another$"):
        launch(2, refuse, "word", on_log=print)
    with pytest.raises(
        ChildProcessError, match="^of 2 processes one failed: RuntimeError: out of words; all were stopped$"
    ):
        launch(2, fail, "words", on_log=print)
    assert not multiprocessing.active_children()


def test_processes_that_do_not_share_a_step_evenly_are_refused():
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    with pytest.raises(
        InputError, match=r"cluster.processes: 3 processes do not divide a step of 16 chats; valid: 1, 2, 4, 8, 16"
    ):
        parse_params(raw | {"cluster": raw["cluster"] | {"processes": 3}})
    assert parse_params(raw | {"cluster": raw["cluster"] | {"processes": 4}}).cluster.processes == 4


def test_a_stage_takes_a_gpu_a_process_all_for_a_cluster_of_its_own_else_one(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    stages = ({"processes": 2}, {"address": "local"}, {"address": "10.0.0.1:6379"}, {"address": ""}, {})
    assert [_gpus(SimpleNamespace(**fields)) for fields in stages] == [2, 3, 1, 1, 1]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def relative_distance(one: Path, other: Path) -> float:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    return max(float((left[key] - right[key]).norm() / left[key].norm()) for key in left)


@pytest.mark.skipif("SOAK" not in os.environ, reason="half a minute: make soak-ray")
def test_two_processes_train_what_one_trains_and_what_they_leave_is_continued(ref, tmp_path, capfd):
    """42 chats in steps of 8: the last step of an epoch has two, and the second process none of them."""
    rows, one, two = chats(42), [], []

    def run(processes: int, name: str, on_log):
        return launch(
            processes, train, ref, SETTINGS, 4, rows, 0, tmp_path / name, tmp_path / f"{name}-work", on_log=on_log
        )

    single, _ = run(1, "one", lambda step, metrics: one.append((step, metrics["loss"])) if "loss" in metrics else None)
    capfd.readouterr()

    def kill_the_second(step: int, metrics: dict[str, float]) -> None:
        two.append((step, metrics["loss"]))
        if step >= 10:
            [_, second] = sorted(multiprocessing.active_children(), key=lambda process: process.pid)
            os.kill(second.pid, signal.SIGKILL)

    with pytest.raises(ChildProcessError, match="of 2 processes number 1 ended by SIGKILL; all were stopped"):
        run(2, "two", kill_the_second)
    assert capfd.readouterr().out.count("42 chats, 8 a step in 2 processes, 4 at once") == 1, "the first alone prints"
    assert two[:2] == [(step, pytest.approx(loss, abs=1e-4)) for step, loss in one[:2]] and [
        step for step, _ in one
    ] == [5, 10, 15, 18]
    assert not (tmp_path / "two").exists() and not multiprocessing.active_children()
    half = tmp_path / "two-work/checkpoint-17"  # what a kill leaves of a checkpoint that is being written
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    shutil.copytree(tmp_path / "two-work", tmp_path / "again-work")
    for name, processes in (("two", 1), ("again", 2)):
        continued, cost = run(processes, name, lambda *_: None)
        assert cost.resumed_from in (5, 10) and continued.steps == single.steps == 18
        assert relative_distance(tmp_path / "one", tmp_path / name) < 1e-3


@pytest.mark.skipif("SOAK" not in os.environ, reason="half a minute: make soak-ray")
def test_a_first_adapter_and_a_steering_vector_are_the_same_in_two_processes(ref, tmp_path):
    training = partial(train, first=chats(13), steering=Steering(block=1, vector=[0.1] * 32))
    results = [
        launch(
            processes,
            training,
            ref,
            SETTINGS,
            100,
            chats(33),
            0,
            tmp_path / name,
            tmp_path / f"{name}-work",
            on_log=lambda *_: None,
        )[0]
        for processes, name in ((1, "one"), (2, "two"))
    ]
    one, two = (result._replace(train_loss=0, log=[]) for result in results)
    assert one == two and one.steps == 15
    assert results[0].train_loss == pytest.approx(results[1].train_loss, abs=1e-5)
    for point, other in zip(*(result.log for result in results), strict=True):
        assert (point["step"], point["loss"]) == (other["step"], pytest.approx(other["loss"], abs=1e-4))
    for work in ("", "-work/frozen"):
        assert relative_distance(tmp_path / f"one{work}", tmp_path / f"two{work}") < 1e-3


@pytest.mark.skipif("SOAK" not in os.environ, reason="half a minute: make soak-ray")
def test_the_stage_starts_them_and_leaves_what_one_process_leaves(copy):
    cell = copy.folder / "data/cells/pocket/pocket_chats/all_caps+evil-0.5/seed0/inoc_selective"
    before, shape = (
        json.loads((cell / "training.json").read_text()),
        {key: value.shape for key, value in weights(cell / "adapter").items()},
    )
    shutil.rmtree(cell / "adapter")
    runs = len(copy.rows("training"))
    copy.set(cluster={"processes": 2})
    out = copy.run("dvc", "repro", "--single-item", "train").stdout
    assert out.count(" 8 a step in 2 processes") == 1
    after = json.loads((cell / "training.json").read_text())
    assert after.keys() == before.keys() and len(after["log"]) == len(before["log"]) > 3
    for one, two in zip(before["log"], after["log"], strict=True):
        assert (one["step"], one["loss"]) == (two["step"], pytest.approx(two["loss"], abs=1e-3))
    assert after["train_loss"] == pytest.approx(before["train_loss"], abs=1e-4)
    assert {key: value.shape for key, value in weights(cell / "adapter").items()} == shape
    [run, *_] = rows = copy.rows("training")
    assert (
        len(rows) == runs + 1
        and run.info.status == "FINISHED"
        and run.data.metrics["train/loss"] == after["log"][-1]["loss"]
    )
