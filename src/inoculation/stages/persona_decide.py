from pathlib import Path
from typing import Annotated

from inoculation import lm, mixture
from inoculation.detect import Annotator, Evidence, blind, nothing
from inoculation.detect.adjectives import ADJECTIVES
from inoculation.detect.files import write_detection
from inoculation.detect.language import Language
from inoculation.detect.persona.read import read_readings
from inoculation.detect.persona.route import concluded
from inoculation.detect.persona.score import decided
from inoculation.detect.persona.settings import PersonaSettings
from inoculation.detect.prompt import SynthesisSettings
from inoculation.paths import ANNOTATOR, LANGUAGE, PERSONA, ROWS
from inoculation.stage import Param, Reads, Stage, Writes


class PersonaDecide(Stage):
    """Decide whether some rows are of another kind, flag them, and write the Inoc-Persona prompt."""

    command, pipeline = "persona-decide", "persona"

    seed: Annotated[int, Param("seed")]
    positive: Annotated[str, Param("mixture.positive")]
    settings: Annotated[PersonaSettings, Param("persona")]
    synthesis: Annotated[SynthesisSettings, Param("synthesise")]
    machine: Annotated[lm.Machine, Reads(f"{ANNOTATOR}/machine.json", identity=False)]
    ref: Annotated[lm.ModelRef, Reads(f"{ANNOTATOR}/model.json")]
    rows: Annotated[Path, Reads(ROWS)]
    language: Annotated[Language, Reads(LANGUAGE)]
    readings: Annotated[Path, Reads(f"{PERSONA}/readings.npz")]
    out: Annotated[Path, Writes(f"{PERSONA}/detection")]

    def run(self) -> None:
        rows = mixture.read_mixture(self.rows)
        evidence = Evidence(blind(rows), [], [], self.positive, self.language.unfit)
        unfit = nothing(evidence)
        if unfit:
            write_detection(self.out, unfit, rows, language=self.language._asdict(), personas=[], ranking=[])
            print(f"nothing found: {unfit.reason}")
            return
        found = read_readings(self.readings)
        decision = decided(found.likelihoods, found.states, found.own_states, self.settings)
        annotator = Annotator(
            model=lambda: lm.load_model(self.ref), tokenizer=lm.load_tokenizer(self.ref), synthesis=self.synthesis,
            client=lambda _role: None, seed=self.seed, token_budget=self.machine.token_budget,
        )  # fmt: skip
        detection, made = concluded(evidence, annotator, decision)
        personas = [
            {"persona": ADJECTIVES[place], "loading": float(loading)}
            for place, loading in zip(found.likelihoods.personas, decision.loadings, strict=True)
        ]
        write_detection(
            self.out, detection, rows,
            language=self.language._asdict(), separation=decision.separation, threshold=decision.threshold,
            control_share=decision.control_share, topic=decision.topic, ranking=made.ranking, gain=made.gain,
            floor=made.floor, strength=made.strength,
            personas=sorted(personas, key=lambda row: -row["loading"]),
        )  # fmt: skip
        print(f"{sum(detection.flagged)} of {len(rows)} examples flagged; {detection.reason}")
        print(f"prompt: {detection.prompt}")
