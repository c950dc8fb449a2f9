from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from inoculation import cluster, lm
from inoculation.files import write_jsonl
from inoculation.paths import ASSIGNMENT, CELL, PROFILE, SOURCE
from inoculation.respond import SampleSettings, evaluation_prompts, requests, respond, skeleton
from inoculation.roles import Limits
from inoculation.server import ServerSettings, serving
from inoculation.stage import Param, Reads, Stage, Writes
from inoculation.store import unfinished
from inoculation.traits import NegativeTrait

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _model(ref: lm.ModelRef, adapter: Path | None) -> "PreTrainedModel":
    return lm.with_adapter(lm.load_model(ref), adapter)


class Respond(Stage):
    """Sample answers to the held-out questions under every evaluation system prompt."""

    command, pipeline = "respond", ""
    expensive = True

    seed: Annotated[int, Param("seed")]
    address: Annotated[str, Param("cluster.address", tracked=False)]
    prompts: Annotated[dict[str, str], Param("prompts")]
    negative: Annotated[NegativeTrait, Param("negative_traits.${mixture.negative}")]
    system_prompts: Annotated[list[str], Param("evaluate.system_prompts")]
    count: Annotated[int, Field(ge=2), Param("evaluate.questions")]
    samples: Annotated[int, Field(ge=1), Param("evaluate.samples")]
    temperature: Annotated[float, Field(gt=0, le=2), Param("evaluate.temperature")]
    ref: Annotated[lm.ModelRef, Reads(f"{PROFILE}/model.json")]
    sampling: Annotated[SampleSettings, Reads(f"{PROFILE}/sampling.json")]
    machine: Annotated[lm.Machine, Reads(f"{PROFILE}/machine.json", identity=False)]
    server: Annotated[ServerSettings, Reads(f"{PROFILE}/server.json", identity=False)]
    limits: Annotated[Limits, Param("llm", tracked=False)]
    assignment: Annotated[dict[str, Any], Reads(f"{ASSIGNMENT}/summary.json")]
    questions: Annotated[dict[str, list[str]], Reads(f"{SOURCE}/questions.json")]
    adapter: Annotated[Path, Reads(f"{CELL}/adapter")]
    responses: Annotated[Path, Writes(f"{CELL}/responses.jsonl")]

    def run(self) -> None:
        adapter = self.adapter if (self.adapter / "adapter_config.json").exists() else None  # the group `base` has none
        asked = {trait: questions[: self.count] for trait, questions in self.questions.items()}
        systems = evaluation_prompts(
            self.system_prompts, self.prompts, self.negative, self.assignment["system_prompt"] if adapter else None
        )
        wanted = requests(asked, list(systems), self.samples)
        weights = sorted(adapter.glob("adapter_*")) if adapter else []
        inputs = (
            self.ref.model_dump(), *weights, wanted, systems, self.temperature, self.sampling.max_new_tokens,
            self.machine.batch_size, self.seed, bool(self.server.api_base),
        )  # fmt: skip
        load = partial(_model, self.ref, adapter)
        at = (self.server.api_base, self.ref, adapter, self.limits, self.machine.batch_size)
        with unfinished(self.command, *inputs) as work, serving(*at) as served:
            workers = None if served else cluster.workers(self.address, load)
            answers = respond(
                model=skeleton(self.ref) if workers else load(),
                tokenizer=lm.load_tokenizer(self.ref),
                wanted=wanted,
                system_prompts=systems,
                max_new_tokens=self.sampling.max_new_tokens,
                temperature=self.temperature,
                batch_size=self.machine.batch_size,
                seed=self.seed,
                progress=work / "batches.jsonl",
                workers=workers,
                served=served,
            )
            write_jsonl(
                self.responses,
                ({**request._asdict(), **answer._asdict()} for request, answer in zip(wanted, answers, strict=True)),
            )
        cut = sum(not answer.finished for answer in answers)
        print(f"{len(answers)} answers, {cut} of them cut off at {self.sampling.max_new_tokens} tokens")
