import sys
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field

from inoculation import lm, train
from inoculation.files import atomic, write_json
from inoculation.launch import launch
from inoculation.mixture import read_training_chats
from inoculation.paths import ASSIGNMENT, CELL, PROFILE
from inoculation.preventative import Steering
from inoculation.stage import Param, Reads, Stage, Writes
from inoculation.store import unfinished


class Train(Stage):
    """Train the cell's LoRA adapter on the response tokens of the group's training chats."""

    command, pipeline = "train", ""
    expensive = True

    seed: Annotated[int, Param("seed")]
    save_steps: Annotated[int, Field(ge=1), Param("save_steps", tracked=False)]
    processes: Annotated[int, Field(ge=1), Param("cluster.processes", identity=False)]
    settings: Annotated[train.TrainSettings, Reads(f"{PROFILE}/train.json")]
    ref: Annotated[lm.ModelRef, Reads(f"{PROFILE}/model.json")]
    chats: Annotated[Path, Reads(f"{ASSIGNMENT}/chats.jsonl")]
    first: Annotated[Path, Reads(f"{ASSIGNMENT}/first.jsonl")]
    steering: Annotated[Steering | None, Reads(f"{ASSIGNMENT}/steering.json")]
    adapter: Annotated[Path, Writes(f"{CELL}/adapter")]
    record: Annotated[Path, Writes(f"{CELL}/training.json")]

    def run(self) -> None:
        chats = read_training_chats(self.chats)
        if not chats:  # the group `base`
            with atomic(self.adapter / "NONE") as note:
                note.write_text("The group `base` is the untouched model: it has no adapter.\n")
            write_json(self.record, {"trained": False, "log": []})
            return
        from inoculation import tracking

        name = "/".join(self.record.parts[2:-1])
        steering = self.steering and self.steering.model_dump()
        inputs = (self.chats, self.first, steering, self.ref.model_dump(), self.settings.model_dump(), self.seed)
        training = partial(train.train, first=read_training_chats(self.first), steering=self.steering)
        with unfinished(self.command, *inputs) as work, tracking.progress("training", name) as show:

            def on_log(step: int, metrics: dict[str, float]) -> None:
                show({f"train/{key}": value for key, value in metrics.items()}, step)

            result, cost = launch(
                self.processes, training, self.ref, self.settings, self.save_steps, chats, self.seed, self.adapter, work,
                on_log=on_log,
            )  # fmt: skip
            write_json(self.record, {"trained": True, **result._asdict()})
            show({f"train/{key}": value for key, value in cost._asdict().items()})
        if result.cut_examples:
            print(
                f"warning: {result.cut_examples} of {result.examples} examples were longer than "
                f"max_length {self.settings.max_length} tokens and lost their end",
                file=sys.stderr,
            )
