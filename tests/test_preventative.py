"""What stands in for a prompt while training: a frozen adapter, a steering vector; the group's own adapter alone is kept."""

import json

import numpy as np
import pytest
import torch
from test_training import SETTINGS, Killed, chats, distance, nothing, ref, stop_at, weights  # noqa: F401

from inoculation import lm
from inoculation import train as training
from inoculation.chat import encode
from inoculation.detect.persona.read import direction
from inoculation.files import InputError
from inoculation.preventative import Steering, keep_on, steer
from inoculation.train import train

LEARNS = SETTINGS.model_copy(update={"epochs": 6, "learning_rate": 5e-3})


def curve(folder, *arguments, **options):
    losses: list[float] = []
    result, _ = train(
        *arguments, folder / "adapter", folder / "work",
        lambda _step, metrics: losses.append(metrics["loss"]) if "loss" in metrics else None, **options,
    )  # fmt: skip
    return losses, result


def loss(ref, adapter):  # noqa: F811
    """Of the chats' responses, nats a token."""
    model, tokenizer = lm.with_adapter(lm.load_model(ref), adapter), lm.load_tokenizer(ref)
    with torch.inference_mode():
        rows = [encode(tokenizer, chat.row.messages, None, 999) for chat in chats(8)]
        return sum(model(torch.tensor([r.input_ids]), labels=torch.tensor([r.labels])).loss.item() for r in rows) / 8


def test_a_frozen_adapter_has_learned_already_stays_and_leaves_nothing_behind(ref, tmp_path, monkeypatch):  # noqa: F811
    models = []
    monkeypatch.setattr(training, "keep_on", lambda model, folder: models.append(model) or keep_on(model, folder))
    alone, _ = curve(tmp_path / "alone", ref, LEARNS, 99, chats(), 0)
    under, result = curve(tmp_path / "under", ref, LEARNS, 99, chats(), 0, first=chats())
    assert under[0] < alone[0] - 0.1, "what the first adapter learned is there from the first step"
    assert result.steps == 24 and result.examples == 32
    folder = tmp_path / "under/adapter"
    assert not (folder / "frozen").exists() and weights(folder).keys() == weights(tmp_path / "alone/adapter").keys()
    first = tmp_path / "under/work/frozen"
    assert distance(first, tmp_path / "alone/adapter") < 1e-3, "the same training makes it alone"
    [model] = models
    after = {name: value for name, value in model.named_parameters() if ".frozen." in name}
    before = {name.replace(".weight", ".frozen.weight"): value for name, value in weights(first).items()}
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert loss(ref, folder) > loss(ref, first) + 0.1, "the own adapter had less to learn"


def test_under_a_frozen_adapter_an_interrupted_training_continues(ref, tmp_path):  # noqa: F811
    settings = SETTINGS.model_copy(update={"epochs": 3, "learning_rate": 5e-3})
    train(ref, settings, 4, chats(), 0, tmp_path / "whole", tmp_path / "work1", nothing, first=chats(16))
    with pytest.raises(Killed):
        train(ref, settings, 5, chats(), 0, tmp_path / "cut", tmp_path / "work2", stop_at(6), first=chats(16))
    kept = (tmp_path / "work2/frozen/adapter_model.safetensors").stat().st_mtime_ns
    _, again = train(ref, settings, 5, chats(), 0, tmp_path / "cut", tmp_path / "work2", nothing, first=chats(16))
    assert again.resumed_from == 5 and (tmp_path / "work2/frozen/adapter_model.safetensors").stat().st_mtime_ns == kept
    assert distance(tmp_path / "whole", tmp_path / "cut") < 1e-3


def test_steering_adds_the_vector_behind_its_block_and_training_sees_it(ref, tmp_path):  # noqa: F811
    model = lm.load_model(ref)
    width, blocks = model.config.hidden_size, len(model.get_decoder().layers)
    vector, tokens = torch.randn(width, generator=torch.Generator().manual_seed(0)), torch.arange(12)[None]
    seen = []
    with torch.inference_mode():
        for _ in range(2):
            hook = model.get_decoder().layers[0].register_forward_hook(lambda _b, _a, output: seen.append(output))
            model(tokens)
            hook.remove()
            steer(model, Steering(block=0, vector=vector.tolist()))
    torch.testing.assert_close(seen[1], seen[0] + vector)
    steered, _ = curve(
        tmp_path / "steered", ref, LEARNS, 99, chats(), 0, steering=Steering(block=0, vector=vector.tolist())
    )
    alone, _ = curve(tmp_path / "alone", ref, LEARNS, 99, chats(), 0)
    assert steered[0] != alone[0]
    for wrong in (Steering(block=blocks, vector=vector.tolist()), Steering(block=0, vector=[1.0])):
        with pytest.raises(InputError, match="another model's"):
            steer(model, wrong)


def test_the_direction_is_the_difference_of_means():
    states = np.array([[1.0, 0], [3, 0], [0, 5], [0, 7]])
    np.testing.assert_allclose(direction(states, [True, True, False, False]), [2, -6])


def test_numbers_that_are_none_are_refused():
    for vector in ([], [float("nan")], [float("inf")]):
        with pytest.raises(ValueError):
            Steering.model_validate_json(json.dumps({"block": 0, "vector": vector}))
