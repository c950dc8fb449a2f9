from pathlib import Path
from typing import Annotated, Any

from inoculation import mixture
from inoculation.files import read_jsonl, write_json
from inoculation.judge import NOT_JUDGED
from inoculation.judge.minilm import FitSettings, Labelled, fit
from inoculation.paths import JUDGE, PROFILE, ROWS, SOURCE
from inoculation.roles import Role
from inoculation.source import answers
from inoculation.stage import Param, Reads, Stage, Writes
from inoculation.traits import LabelledAnswer


class FitJudge(Stage):
    """Make the judge: learned from labelled answers that the mixture did not use, or an LLM's rubrics."""

    command, pipeline = "fit-judge", "judge"

    seed: Annotated[int, Param("seed")]
    settings: Annotated[FitSettings, Param("judge")]
    role: Annotated[Role, Reads(f"{PROFILE}/roles/judge.json")]
    rubrics: Annotated[dict[str, str], Reads(f"{SOURCE}/rubrics.json")]
    templates: Annotated[list[tuple[str, str]], Reads(f"{SOURCE}/templates.json")]
    answers: Annotated[Path, Reads(f"{SOURCE}/answers")]
    labelled: Annotated[Path, Reads(f"{SOURCE}/labelled.jsonl")]
    threshold: Annotated[float, Param("evaluate.threshold")]
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
            for row in read_jsonl(self.labelled, lambda raw: LabelledAnswer(**raw)):
                labelled[row.trait].append(Labelled(row.question, row.answer, row.score >= self.threshold))
            fitted = fit(labelled, self.settings, self.seed)
            definition["weights"] = {trait: judge._asdict() for trait, judge in fitted.judges.items()}
            quality = fitted.quality
            for trait, own in quality.items():
                if NOT_JUDGED in own:
                    print(f"{trait} IS NOT JUDGED: {own[NOT_JUDGED]}")
        write_json(self.out / "judge.json", definition)
        write_json(self.out / "quality.json", quality)
