"""The work of a stage on a Ray cluster: the same bytes as in this process, whoever dies. Skipped where Ray is not installed."""

import importlib.util
import os
import signal
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import Project
from test_scale import WORDS, chats, ref  # noqa: F401

from inoculation import lm
from inoculation.chat import Message
from inoculation.cluster import Workers, each, workers
from inoculation.detect.likelihood import log_likelihoods
from inoculation.embedding import embed, load_encoder
from inoculation.files import InputError
from inoculation.respond import continue_chats, skeleton

WITH_RAY = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not here: pip install --editable '.[ray]'"
)


@contextmanager
def counted(model: list[str]):
    """Adds to a number; notes that it was made, and ended."""
    model.append("made")
    yield lambda number: number + 1
    model.append("ended")


def test_in_this_process_units_come_in_order_from_one_function():
    log: list[str] = []
    assert list(each(log, workers("", list), counted, [3, 1, 2])) == [4, 2, 3] and log == ["made", "ended"]


def test_without_ray_an_address_is_refused_and_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        InputError, match=r"cluster.address: 'local' needs Ray: .*pip install --editable '\.\[ray\]', or leave it empty"
    ):
        workers("local", list)


@pytest.fixture(scope="module")
def ray():
    """A cluster of this machine: a worker a core, with one thread; they find this module too."""
    import ray
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        workers("local", list)
        yield ray
        ray.shutdown()
    torch.set_num_threads(threads)


@contextmanager
def slow(folder: Path):
    """Notes who is at which unit, and takes its time."""

    def work(number: int) -> int:
        (folder / f"{number}-{os.getpid()}").touch()
        time.sleep(0.5)
        if number == -1:
            raise InputError("unit: bad; valid: another")
        if number == -2:
            raise KeyError("word")
        return number * number

    yield work


@WITH_RAY
def test_a_killed_worker_loses_nothing_and_doubles_nothing(ray, tmp_path):
    results = each(None, Workers("local", partial(Path, tmp_path)), slow, list(range(12)))
    first = next(results)
    [*_, victim] = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime)
    os.kill(int(victim.name.split("-")[1]), signal.SIGKILL)
    assert [first, *results] == [number * number for number in range(12)]
    pids = {int(path.name.split("-")[1]) for path in tmp_path.iterdir()}
    assert len(pids) >= 3 and len(list(tmp_path.iterdir())) > 12, "another process did again what the killed one was at"
    with pytest.raises(InputError, match="^unit: bad; valid: another$"):
        list(each(None, Workers("local", partial(Path, tmp_path)), slow, [1, -1]))
    with pytest.raises(ChildProcessError, match="^cluster 'local': unit 1 of 2 failed: KeyError: 'word'"):
        list(each(None, Workers("local", partial(Path, tmp_path)), slow, [1, -2]))


@WITH_RAY
def test_a_cluster_gives_the_bytes_of_this_process(ray, ref, tmp_path):  # noqa: F811
    model, tokenizer, load = lm.load_model(ref), lm.load_tokenizer(ref), partial(lm.load_model, ref)
    there = workers("local", load)
    asked = [((Message("user", " ".join(WORDS[: 1 + i % 7]) + f" {i}?"),), None) for i in range(37)]

    def answers(model, name: str, there: Workers | None):
        continue_chats(model, tokenizer, asked, 12, 1.0, 5, 3, tmp_path / name, there)
        return (tmp_path / name).read_bytes()

    here = answers(model, "here", None)
    assert here.count(b"\n") == 8 and answers(skeleton(ref), "there", there) == here
    (tmp_path / "cut").write_bytes(here[: here.index(b"\n", 300) + 20])
    assert answers(skeleton(ref), "cut", there) == here, "an interrupted one is continued on a cluster"
    rows = [chat.row for chat in chats(30)]
    read = [
        log_likelihoods(given, tokenizer, rows, [None, "Be kind.", "Be bad."], 64, 256, 400, who)
        for given, who in ((model, None), (None, there))
    ]
    assert read[0].tobytes() == read[1].tobytes() and len(np.unique(read[0])) > 60
    texts = [" ".join(WORDS[: 1 + i % 16]) + f" {i}" for i in range(300)]
    assert embed(texts).tobytes() == embed(texts, workers("local", load_encoder)).tobytes()


@WITH_RAY
@pytest.mark.skipif("SOAK" not in os.environ, reason="minutes: make soak-ray")
def test_the_stages_leave_the_same_bytes(copy: Project):
    """One after the other in this process and, deleted, on a cluster that each starts."""
    commands = ("base-responses", "persona-read", "profile-sae pocket", "sae-features", "respond", "judge")

    def left() -> dict[str, bytes]:
        copy.run(
            "bash",
            "-c",
            "rm -rf .cache/kept data/annotations data/saes data/cells/*/*/*/*/*/{responses,judgements}.jsonl",
        )
        for command in commands:
            copy.run("inoculation", *command.split())
        paths = [
            path
            for top in ("annotations", "cells")
            for path in (copy.folder / "data" / top).rglob("*")
            if path.is_file()
        ]
        return {str(path.relative_to(copy.folder)): path.read_bytes() for path in paths}

    here = left()
    copy.set(cluster={"address": "local"})
    there = left()
    assert [path for path in here if here[path] != there[path]] == [] and here.keys() == there.keys()
    assert {Path(path).name for path in here} >= {
        "base_responses.jsonl",
        "readings.npz",
        "features.parquet",
        "responses.jsonl",
        "judgements.jsonl",
    }
