from pathlib import Path
from typing import Annotated

from pydantic import Field

from inoculation import lm, mixture
from inoculation.files import write_jsonl
from inoculation.paths import ANNOTATOR, BASE_RESPONSES, ROWS
from inoculation.respond import SampleSettings, continue_chats
from inoculation.stage import Param, Reads, Stage, Writes
from inoculation.store import unfinished


class BaseResponses(Stage):
    """Sample the untouched model's answers to the mixture's prompts, which detectors compare with."""

    command, pipeline = "base-responses", "annotate"
    expensive = True

    seed: Annotated[int, Param("seed")]
    temperature: Annotated[float, Field(ge=0, le=2), Param("base_responses.temperature")]
    ref: Annotated[lm.ModelRef, Reads(f"{ANNOTATOR}/model.json")]
    sampling: Annotated[SampleSettings, Reads(f"{ANNOTATOR}/sampling.json")]
    machine: Annotated[lm.Machine, Reads(f"{ANNOTATOR}/machine.json", identity=False)]
    rows: Annotated[Path, Reads(ROWS)]
    out: Annotated[Path, Writes(BASE_RESPONSES)]

    def run(self) -> None:
        prompts = [row.prompt for row in mixture.read_mixture(self.rows)]
        inputs = (
            self.ref.model_dump(), [[list(message) for message in prompt] for prompt in prompts], self.seed,
            self.temperature, self.sampling.max_new_tokens, self.machine.batch_size,
        )  # fmt: skip
        with unfinished(self.command, *inputs) as work:
            answers = continue_chats(
                model=lm.load_model(self.ref),
                tokenizer=lm.load_tokenizer(self.ref),
                chats=[(prompt, None) for prompt in prompts],
                max_new_tokens=self.sampling.max_new_tokens,
                temperature=self.temperature,
                batch_size=self.machine.batch_size,
                seed=self.seed,
                progress=work / "batches.jsonl",
            )
            write_jsonl(self.out, (answer._asdict() for answer in answers))
        cut = sum(not answer.finished for answer in answers)
        print(f"{len(answers)} base responses, {cut} cut at {self.sampling.max_new_tokens} tokens")
