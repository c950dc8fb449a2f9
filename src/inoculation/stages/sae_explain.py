from pathlib import Path
from typing import Annotated

from inoculation import lm, mixture
from inoculation.clients import Clients
from inoculation.detect import blind
from inoculation.detect.sae.corpora import Corpora
from inoculation.detect.sae.encoder import PinnedSae, load_sae
from inoculation.detect.sae.explain import explained, write_explanations
from inoculation.detect.sae.rank import read_latents
from inoculation.detect.sae.settings import ExplainSettings
from inoculation.paths import ANNOTATOR, ANNOTATOR_SAE, ROWS, SAE
from inoculation.roles import Limits, Role
from inoculation.stage import Param, Reads, Stage, Writes
from inoculation.tracking import usage_logger


class SaeExplain(Stage):
    """Find the strongest contexts of each latent, and describe it."""

    command, pipeline = "sae-explain", "sae"

    settings: Annotated[ExplainSettings, Param("sae.explain")]
    max_length: Annotated[int, Param("sae.features.max_length")]
    machine: Annotated[lm.Machine, Reads(f"{ANNOTATOR}/machine.json", identity=False)]
    llm: Annotated[Limits, Param("llm", tracked=False)]
    explainer: Annotated[Role, Reads(f"{ANNOTATOR}/roles/explainer.json")]
    ref: Annotated[lm.ModelRef, Reads(f"{ANNOTATOR}/model.json")]
    sae: Annotated[PinnedSae, Reads(f"{ANNOTATOR_SAE}/sae.json")]
    corpora: Annotated[Corpora, Reads(f"{ANNOTATOR_SAE}/corpora.json")]
    rows: Annotated[Path, Reads(ROWS)]
    rank: Annotated[Path, Reads(f"{SAE}/rank")]
    out: Annotated[Path, Writes(f"{SAE}/explanations.jsonl")]

    def run(self) -> None:
        clients = Clients(self.llm, usage_logger("annotations/llm", {}, self.llm.tracing))
        explainer = clients.get("explainer", self.explainer)
        sae = load_sae(self.sae.release, self.sae.id, lm.device())
        explanations = explained(
            blind(mixture.read_mixture(self.rows)),
            [latent.latent for latent in read_latents(self.rank)],
            self.corpora.read(self.settings.corpus),
            lm.load_model(self.ref.model_copy(update={"load_in_4bit": False})),
            lm.load_tokenizer(self.ref),
            sae,
            explainer,
            self.settings,
            self.max_length,
            self.machine.token_budget,
        )
        write_explanations(self.out, explanations, sae.neuronpedia)
