from pathlib import Path
from typing import Annotated

from inoculation import lm, mixture, tracking
from inoculation.clients import Clients
from inoculation.detect import Annotator, Evidence, blind, nothing
from inoculation.detect.audit import AuditSettings, detect
from inoculation.detect.control import ControlSettings, control_responses
from inoculation.detect.files import write_detection
from inoculation.detect.language import Language
from inoculation.detect.prompt import SynthesisSettings
from inoculation.paths import ANNOTATOR, AUDIT, BASE_RESPONSES, LANGUAGE, ROWS, SOURCE
from inoculation.respond import read_texts
from inoculation.roles import Limits, Role
from inoculation.stage import Param, Reads, Stage, Writes


class AuditLocal(Stage):
    """Audit every example by a statistic on sentence embeddings of responses and base responses."""

    command, pipeline = "audit-local", "audit"

    seed: Annotated[int, Param("seed")]
    positive: Annotated[str, Param("mixture.positive")]
    settings: Annotated[AuditSettings, Param("audit")]
    synthesis: Annotated[SynthesisSettings, Param("synthesise")]
    control: Annotated[ControlSettings, Param("control")]
    machine: Annotated[lm.Machine, Reads(f"{ANNOTATOR}/machine.json", identity=False)]
    llm: Annotated[Limits, Param("llm", tracked=False)]
    rewriter: Annotated[Role, Reads(f"{SOURCE}/rewriter.json")]
    synthesiser: Annotated[Role, Reads(f"{ANNOTATOR}/roles/synthesiser.json")]
    ref: Annotated[lm.ModelRef, Reads(f"{ANNOTATOR}/model.json")]
    rows: Annotated[Path, Reads(ROWS)]
    base: Annotated[Path, Reads(BASE_RESPONSES)]
    language: Annotated[Language, Reads(LANGUAGE)]
    out: Annotated[Path, Writes(f"{AUDIT}/local")]

    def run(self) -> None:
        rows = mixture.read_mixture(self.rows)
        clients = Clients(self.llm, tracking.usage_logger("annotations/llm", {"seed": self.seed}, self.llm.tracing))
        writer = clients.get("synthesiser", self.synthesiser)
        base = read_texts(self.base, len(rows))
        annotator = Annotator(
            model=lambda: lm.load_model(self.ref), tokenizer=lm.load_tokenizer(self.ref), synthesis=self.synthesis,
            client=lambda role: writer if role == "synthesiser" else None, seed=self.seed, token_budget=self.machine.token_budget,
        )  # fmt: skip
        evidence = Evidence(blind(rows), base, [], self.positive, self.language.unfit)
        if nothing(evidence) is None:  # a rewriter may cost
            rewriter = clients.get("rewriter", self.rewriter) if self.positive == "source_citing" else None
            control = control_responses(rows, base, self.positive, self.control.examples, self.seed, rewriter)
            evidence = evidence._replace(control=control)
        detection = detect(evidence, annotator, self.settings)
        write_detection(self.out, detection, rows)
        print(
            f"{sum(detection.flagged)} of {len(rows)} examples flagged; {detection.reason}; prompt: {detection.prompt}"
        )
