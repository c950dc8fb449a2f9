from functools import partial
from pathlib import Path
from typing import Annotated

from inoculation import cluster, lm, mixture
from inoculation.detect import Annotator, Evidence, blind, nothing
from inoculation.detect.language import Language
from inoculation.detect.persona.read import readings, write_readings
from inoculation.detect.persona.settings import PersonaSettings
from inoculation.detect.prompt import SynthesisSettings
from inoculation.paths import ANNOTATOR, BASE_RESPONSES, LANGUAGE, PERSONA, ROWS
from inoculation.respond import read_texts
from inoculation.stage import Param, Reads, Stage, Writes


class PersonaRead(Stage):
    """Read every response under character prompts: likelihoods and hidden states."""

    command, pipeline = "persona-read", "persona"
    expensive = True

    seed: Annotated[int, Param("seed")]
    address: Annotated[str, Param("cluster.address", tracked=False)]
    positive: Annotated[str, Param("mixture.positive")]
    settings: Annotated[PersonaSettings, Param("persona")]
    synthesis: Annotated[SynthesisSettings, Param("synthesise")]
    machine: Annotated[lm.Machine, Reads(f"{ANNOTATOR}/machine.json", identity=False)]
    ref: Annotated[lm.ModelRef, Reads(f"{ANNOTATOR}/model.json")]
    rows: Annotated[Path, Reads(ROWS)]
    base: Annotated[Path, Reads(BASE_RESPONSES)]
    language: Annotated[Language, Reads(LANGUAGE)]
    out: Annotated[Path, Writes(f"{PERSONA}/readings.npz")]

    def run(self) -> None:
        rows = blind(mixture.read_mixture(self.rows))
        evidence = Evidence(rows, read_texts(self.base, len(rows)), [], self.positive, self.language.unfit)
        if unfit := nothing(evidence):
            print(f"NOTHING IS READ: {unfit.reason}")
            write_readings(self.out, None)
            return
        annotator = Annotator(
            model=lambda: lm.load_model(self.ref), tokenizer=lm.load_tokenizer(self.ref), synthesis=self.synthesis,
            client=lambda _role: None, seed=self.seed, token_budget=self.machine.token_budget,
            workers=cluster.workers(self.address, partial(lm.load_model, self.ref)),
        )  # fmt: skip
        write_readings(self.out, readings(evidence, annotator, self.settings))
