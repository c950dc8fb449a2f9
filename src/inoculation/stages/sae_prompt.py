from pathlib import Path
from typing import Annotated

from inoculation import lm, mixture, tracking
from inoculation.clients import Clients
from inoculation.detect import Detection, Evidence, blind
from inoculation.detect.files import write_detection
from inoculation.detect.prompt import Synthesis, SynthesisSettings, written
from inoculation.detect.sae.classes import read_classes
from inoculation.detect.sae.rank import read_latents
from inoculation.detect.sae.settings import FlagRule
from inoculation.files import read_json, read_jsonl
from inoculation.paths import ANNOTATOR, ROWS, SAE
from inoculation.roles import Limits, Role
from inoculation.stage import Param, Reads, Stage, Writes


class SaePrompt(Stage):
    """Write the Inoc-SAE prompt from the suspicious latents, and conclude the detection."""

    command, pipeline = "sae-prompt", "sae"

    seed: Annotated[int, Param("seed")]
    positive: Annotated[str, Param("mixture.positive")]
    settings: Annotated[SynthesisSettings, Param("synthesise")]
    machine: Annotated[lm.Machine, Reads(f"{ANNOTATOR}/machine.json", identity=False)]
    llm: Annotated[Limits, Param("llm", tracked=False)]
    synthesiser: Annotated[Role, Reads(f"{ANNOTATOR}/roles/synthesiser.json")]
    ref: Annotated[lm.ModelRef, Reads(f"{ANNOTATOR}/model.json")]
    rule: Annotated[FlagRule, Reads(f"{ANNOTATOR}/flag_rule.json")]
    rows: Annotated[Path, Reads(ROWS)]
    rank: Annotated[Path, Reads(f"{SAE}/rank")]
    explanations: Annotated[Path, Reads(f"{SAE}/explanations.jsonl")]
    classes: Annotated[Path, Reads(f"{SAE}/classes.json")]
    flags: Annotated[Path, Reads(f"{SAE}/flag")]
    out: Annotated[Path, Writes(f"{SAE}/detection")]

    def run(self) -> None:
        clients = Clients(self.llm, tracking.usage_logger("annotations/llm", {"seed": self.seed}, self.llm.tracing))
        writer = clients.get("synthesiser", self.synthesiser)
        rows, told = mixture.read_mixture(self.rows), read_json(self.flags / "rules.json")
        marks = read_jsonl(self.flags / "flags.jsonl", dict)
        flags, scores = [row["flagged"] for row in marks], [row["score"] for row in marks]
        made = Synthesis(None, None, [])
        if told["found"]:
            made = written(
                Evidence(blind(rows), [], [], self.positive), flags, scores, self._descriptions(), writer,
                lambda: lm.load_model(self.ref), lm.load_tokenizer(self.ref), self.settings, self.machine.token_budget,
                self.seed,
            )  # fmt: skip
        reason = f"{told['reason']}; prompt: {made.reason}" if told["found"] else told["reason"]
        detection = Detection(told["found"], reason, flags, scores, made.prompt, made.marked)
        write_detection(
            self.out, detection, rows, rules=told, ranking=made.ranking, gain=made.gain, floor=made.floor,
            strength=made.strength,
        )  # fmt: skip
        print(f"prompt: {made.prompt}" if made.prompt else f"no prompt: {reason}")

    def _descriptions(self) -> list[str]:
        """Of the suspicious latents."""
        latents = read_latents(self.rank)
        suspicious = read_classes(self.classes, latents)
        return [
            row["description"]
            for row, no, latent in zip(read_jsonl(self.explanations, dict), suspicious, latents, strict=True)
            if no and row["description"] and latent.in_ranking(self.rule)
        ]
