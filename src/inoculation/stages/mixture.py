from pathlib import Path
from typing import Annotated

from inoculation import mixture
from inoculation.clients import Clients
from inoculation.files import InputError, read_jsonl, write_jsonl
from inoculation.paths import MIXTURE, SOURCE
from inoculation.rewriter import inject
from inoculation.roles import Limits, Role
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
        own = read_jsonl(self.own, mixture.parse_row)
        rows, aside = (own, []) if own else self._partition()
        write_jsonl(self.out / "mixture.jsonl", (row.as_json() for row in rows))
        write_jsonl(self.out / "set_aside.jsonl", aside)
        labels = [row.shows_negative for row in rows]
        print(
            f"{len(rows)} rows: {labels.count(True)} show {self.negative}, {labels.count(False)} do not, "
            f"{labels.count(None)} unknown"
            + (f"; {len(aside)} could not be given A and were left out" if aside else "")
        )

    def _partition(self) -> tuple[list[mixture.Row], list[dict[str, str]]]:
        """The rows, and those that could not be given A."""
        clients = Clients(self.llm, usage_logger("mixtures/llm", {"seed": self.seed}, self.llm.tracing))
        client = clients.get("rewriter", self.rewriter) if self.positive == "source_citing" else None
        pairs = read_pairs(self.answers)
        if not pairs:
            raise InputError(
                f"{self.answers}: no answers to make a mixture of: this source only says what to judge for; "
                "choose another mixture.source, or enter your own file in data_sets"
            )
        rows = mixture.partition(pairs, self.negative, self.contamination, self.seed)
        injected = inject(rows, self.positive, self.seed, client)
        failed = {each.index: each.reason for each in client.aside} if client else {}
        aside = [
            {"question": rows[i].prompt[-1].content, "reason": failed.get(i, f"no rule makes it show {self.positive}")}
            for i, row in enumerate(injected)
            if row is None
        ]
        return [row for row in injected if row is not None], aside
