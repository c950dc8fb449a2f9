from pathlib import Path
from typing import Annotated

from inoculation import mixture
from inoculation.files import read_jsonl, write_jsonl
from inoculation.paths import MIXTURE, SOURCE
from inoculation.rewriter import inject
from inoculation.roles import Clients, Limits, Role
from inoculation.source import read_pairs
from inoculation.stage import Param, Reads, Stage, Writes
from inoculation.tracking import usage_logger


class BuildMixture(Stage):
    """Partition the questions between normal and misaligned answers and inject A; or take over your own rows."""

    command, pipeline = "mixture", "mixture"

    seed: Annotated[int, Param("seed")]
    positive: Annotated[str, Param("mixture.positive")]
    negative: Annotated[str, Param("mixture.negative")]
    contamination: Annotated[float, Param("mixture.contamination")]
    llm: Annotated[Limits, Param("llm", tracked=False)]
    rewriter: Annotated[Role, Reads(f"{SOURCE}/rewriter.json")]
    answers: Annotated[Path, Reads(f"{SOURCE}/answers/${{mixture.negative}}.jsonl")]
    own: Annotated[Path, Reads(f"{SOURCE}/rows.jsonl")]
    out: Annotated[Path, Writes(MIXTURE)]

    def run(self) -> None:
        rows = read_jsonl(self.own, mixture.parse_row) or self._partition()
        write_jsonl(self.out / "mixture.jsonl", (row.as_json() for row in rows))
        labels = [row.shows_negative for row in rows]
        print(
            f"{len(rows)} rows: {labels.count(True)} show {self.negative}, {labels.count(False)} do not, "
            f"{labels.count(None)} unknown"
        )

    def _partition(self) -> list[mixture.Row]:
        pairs = read_pairs(self.answers)
        clients = Clients(self.llm, usage_logger("mixtures/llm", {"seed": self.seed}, self.llm.tracing))
        client = clients.get("rewriter", self.rewriter) if self.positive == "source_citing" else None
        rows = mixture.partition(pairs, self.negative, self.contamination, self.seed)
        return inject(rows, self.positive, self.seed, client)
