from pathlib import Path
from typing import Annotated

from inoculation import lm, mixture, tracking
from inoculation.clients import Clients
from inoculation.detect import Annotator, Evidence, blind
from inoculation.detect.audit import AuditSettings, detect
from inoculation.detect.files import write_detection
from inoculation.detect.prompt import SynthesisSettings
from inoculation.paths import ANNOTATOR, AUDIT, ROWS
from inoculation.roles import Limits, Role
from inoculation.stage import Param, Reads, Stage, Writes


class AuditLlm(Stage):
    """Audit every example by an LLM that reads it."""

    command, pipeline = "audit-llm", "audit"

    seed: Annotated[int, Param("seed")]
    positive: Annotated[str, Param("mixture.positive")]
    settings: Annotated[AuditSettings, Param("audit")]
    synthesis: Annotated[SynthesisSettings, Param("synthesise")]
    machine: Annotated[lm.Machine, Reads(f"{ANNOTATOR}/machine.json", identity=False)]
    llm: Annotated[Limits, Param("llm", tracked=False)]
    auditor: Annotated[Role, Reads(f"{ANNOTATOR}/roles/auditor.json")]
    synthesiser: Annotated[Role, Reads(f"{ANNOTATOR}/roles/synthesiser.json")]
    ref: Annotated[lm.ModelRef, Reads(f"{ANNOTATOR}/model.json")]
    rows: Annotated[Path, Reads(ROWS)]
    out: Annotated[Path, Writes(f"{AUDIT}/llm")]

    def run(self) -> None:
        rows = mixture.read_mixture(self.rows)
        clients = Clients(self.llm, tracking.usage_logger("annotations/llm", {"seed": self.seed}, self.llm.tracing))
        playing = {
            "auditor": clients.require("auditor", self.auditor),
            "synthesiser": clients.get("synthesiser", self.synthesiser),
        }
        annotator = Annotator(
            model=lambda: lm.load_model(self.ref), tokenizer=lm.load_tokenizer(self.ref), synthesis=self.synthesis,
            client=playing.get, seed=self.seed, token_budget=self.machine.token_budget,
        )  # fmt: skip
        detection = detect(Evidence(blind(rows), [], [], self.positive), annotator, self.settings)
        write_detection(self.out, detection, rows)
        print(
            f"{sum(detection.flagged)} of {len(rows)} examples flagged; {detection.reason}; prompt: {detection.prompt}"
        )
