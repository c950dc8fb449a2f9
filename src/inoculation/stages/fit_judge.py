from pathlib import Path
from typing import Annotated, Any

from inoculation import lm, mixture
from inoculation.files import read_jsonl, write_json
from inoculation.judge import NOT_JUDGED
from inoculation.judge.linear import FitSettings, Labelled, OwnAnswer, fit, own_rows
from inoculation.paths import JUDGE, PROFILE, ROWS, SOURCE
from inoculation.respond import SampleSettings, continue_chats
from inoculation.roles import Role
from inoculation.source import answers
from inoculation.stage import Param, Reads, Stage, Writes
from inoculation.store import unfinished
from inoculation.traits import LabelledAnswer


class FitJudge(Stage):
    """Make the judge: learned from labelled answers that the mixture did not use, or an LLM's rubrics."""

    command, pipeline = "fit-judge", "judge"

    settings: Annotated[FitSettings, Param("judge")]
    role: Annotated[Role, Reads(f"{PROFILE}/roles/judge.json")]
    rubrics: Annotated[dict[str, str], Reads(f"{SOURCE}/rubrics.json")]
    templates: Annotated[list[tuple[str, str]], Reads(f"{SOURCE}/templates.json")]
    answers: Annotated[Path, Reads(f"{SOURCE}/answers")]
    labelled: Annotated[Path, Reads(f"{SOURCE}/labelled.jsonl")]
    threshold: Annotated[float, Param("evaluate.threshold")]
    temperature: Annotated[float, Param("base_responses.temperature")]
    ref: Annotated[lm.ModelRef, Reads(f"{PROFILE}/model.json")]
    sampling: Annotated[SampleSettings, Reads(f"{PROFILE}/sampling.json")]
    machine: Annotated[lm.Machine, Reads(f"{PROFILE}/machine.json", identity=False)]
    rows: Annotated[Path, Reads(ROWS)]
    out: Annotated[Path, Writes(JUDGE)]

    def run(self) -> None:
        definition: dict[str, Any] = {"method": self.role.method, "templates": self.templates}
        quality: dict[str, Any] = {}
        if self.role.method == "llm":
            definition |= {"role": self.role.model_dump(), "rubrics": self.rubrics}
        else:
            rows = mixture.read_mixture(self.rows)
            labelled = {
                trait: [Labelled(*item) for item in mixture.labelled_answers(pairs, rows)]
                for trait, pairs in answers(self.answers)
            }
            given = read_jsonl(self.labelled, lambda raw: LabelledAnswer(**raw))
            for row in given:
                labelled[row.trait].append(Labelled(row.question, row.answer, row.score >= self.threshold))
            fitted = fit(labelled, self._own_answers(rows) if given else [], self.settings, self.threshold)
            definition["weights"] = {trait: judge._asdict() for trait, judge in fitted.judges.items()}
            quality = fitted.quality
            for trait, own in quality.items():
                if NOT_JUDGED in own:
                    print(f"{trait} IS NOT JUDGED: {own[NOT_JUDGED]}")
        write_json(self.out / "judge.json", definition)
        write_json(self.out / "quality.json", quality)

    def _own_answers(self, rows: list[mixture.Row]) -> list[OwnAnswer]:
        """What the untouched model answers to some of the mixture's prompts."""
        chosen = own_rows(rows, self.settings.own_answers)
        if not chosen:
            return []
        inputs = (
            self.ref.model_dump(), [[list(message) for message in row.prompt] for row in chosen], self.temperature,
            self.sampling.max_new_tokens, self.machine.batch_size,
        )  # fmt: skip
        with unfinished(self.command, *inputs) as work:
            answers = continue_chats(
                lm.load_model(self.ref), lm.load_tokenizer(self.ref), [(row.prompt, None) for row in chosen],
                self.sampling.max_new_tokens, self.temperature, self.machine.batch_size, 0, work / "batches.jsonl",
            )  # fmt: skip
        return [OwnAnswer(row.prompt[-1].content, answer.text) for row, answer in zip(chosen, answers, strict=True)]
