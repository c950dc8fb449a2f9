from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from inoculation import cluster, lm, mixture
from inoculation.clients import Clients
from inoculation.detect import Evidence, blind
from inoculation.detect.control import ControlSettings, control_responses
from inoculation.detect.sae.encoder import LoadedSae, PinnedSae, load_sae, reader
from inoculation.detect.sae.features import pooled, write_features
from inoculation.detect.sae.settings import FeatureSettings
from inoculation.paths import ANNOTATOR, ANNOTATOR_SAE, BASE_RESPONSES, ROWS, SAE, SOURCE
from inoculation.respond import read_texts
from inoculation.roles import Limits, Role
from inoculation.stage import Param, Reads, Stage, Writes
from inoculation.tracking import usage_logger

if TYPE_CHECKING:
    import torch


def _reader(ref: lm.ModelRef, sae: PinnedSae) -> "tuple[torch.nn.Module, LoadedSae]":
    return reader(load_sae(sae.release, sae.id, lm.device()), lm.load_model(ref))


class SaeFeatures(Stage):
    """Pool the mean latents of target, base and control responses, sparse."""

    command, pipeline = "sae-features", "sae"
    expensive = True

    seed: Annotated[int, Param("seed")]
    address: Annotated[str, Param("cluster.address", tracked=False)]
    positive: Annotated[str, Param("mixture.positive")]
    settings: Annotated[FeatureSettings, Param("sae.features")]
    control: Annotated[ControlSettings, Param("control")]
    machine: Annotated[lm.Machine, Reads(f"{ANNOTATOR}/machine.json", identity=False)]
    llm: Annotated[Limits, Param("llm", tracked=False)]
    rewriter: Annotated[Role, Reads(f"{SOURCE}/rewriter.json")]
    ref: Annotated[lm.ModelRef, Reads(f"{ANNOTATOR}/model.json")]
    sae: Annotated[PinnedSae, Reads(f"{ANNOTATOR_SAE}/sae.json")]
    rows: Annotated[Path, Reads(ROWS)]
    base: Annotated[Path, Reads(BASE_RESPONSES)]
    out: Annotated[Path, Writes(f"{SAE}/features.parquet")]

    def run(self) -> None:
        rows = blind(mixture.read_mixture(self.rows))
        base = read_texts(self.base, len(rows))
        clients = Clients(self.llm, usage_logger("annotations/llm", {"seed": self.seed}, self.llm.tracing))
        rewriter = clients.get("rewriter", self.rewriter) if self.positive == "source_citing" else None
        control = control_responses(rows, base, self.positive, self.control.examples, self.seed, rewriter)
        load = partial(_reader, self.ref.model_copy(update={"load_in_4bit": False}), self.sae)
        workers = cluster.workers(self.address, load)
        pieces = pooled(
            Evidence(rows, base, control, self.positive),
            None if workers else load(),
            lm.load_tokenizer(self.ref),
            self.settings,
            self.machine.token_budget,
            workers,
        )
        write_features(self.out, pieces)
