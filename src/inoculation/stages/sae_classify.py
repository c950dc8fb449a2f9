from pathlib import Path
from typing import Annotated

from inoculation.clients import Clients
from inoculation.detect.sae.classes import write_classes
from inoculation.detect.sae.classify import classified
from inoculation.detect.sae.rank import read_ranked
from inoculation.detect.sae.settings import ClassifySettings
from inoculation.files import read_jsonl
from inoculation.paths import ANNOTATOR, SAE
from inoculation.roles import Limits, Role
from inoculation.stage import Param, Reads, Stage, Writes
from inoculation.tracking import usage_logger


class SaeClassify(Stage):
    """Decide which latents are explained by the known trait A."""

    command, pipeline = "sae-classify", "sae"

    positive: Annotated[str, Param("mixture.positive")]
    settings: Annotated[ClassifySettings, Param("sae.classify")]
    llm: Annotated[Limits, Param("llm", tracked=False)]
    classifier: Annotated[Role, Reads(f"{ANNOTATOR}/roles/classifier.json")]
    rank: Annotated[Path, Reads(f"{SAE}/rank")]
    explanations: Annotated[Path, Reads(f"{SAE}/explanations.jsonl")]
    out: Annotated[Path, Writes(f"{SAE}/classes.json")]

    def run(self) -> None:
        clients = Clients(self.llm, usage_logger("annotations/llm", {}, self.llm.tracing))
        ranking = read_ranked(self.rank)
        classes = classified(
            ranking.columns,
            [row["description"] for row in read_jsonl(self.explanations, dict)],
            self.positive,
            self.classifier.method,
            lambda: clients.require("classifier", self.classifier),
            self.settings,
        )
        write_classes(self.out, [latent.latent for latent in ranking.latents], classes)
        counts = {name: classes.chosen.count(name) for name in ("yes", "neutral", "no")}
        print("latents by class: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
        if classes.agreement is not None:
            print(f"the two classifiers agree on {classes.agreement:.0%} of {len(classes.chosen)} latents")
