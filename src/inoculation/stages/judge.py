from collections.abc import Container
from pathlib import Path
from typing import Annotated, Any

from inoculation import cluster, traits
from inoculation.clients import Clients
from inoculation.files import read_json, read_jsonl, write_jsonl
from inoculation.judge import Judgement
from inoculation.judge.coherence import COHERENCE
from inoculation.judge.exact import ExactJudge
from inoculation.paths import CELL, JUDGE
from inoculation.roles import Limits, Role
from inoculation.stage import Param, Reads, Stage, Writes
from inoculation.tracking import usage_logger

Scores = list[dict[str, float | None]]
"""One a response: trait -> 0..100, None for a missing judgement."""


def says_anything(text: str) -> bool:
    """Whether an answer has a letter: of one without, a judge's word is that of its intercept, the same for all of them."""
    return any(map(str.isalpha, text))


def nothing_said(trait: str, learned: Container[str] | None) -> dict[str, float | None]:
    """The scores of an answer without a letter: none, and that it is not coherent; of what is judged (None: everything)."""
    scores: dict[str, float | None] = {trait: None, "source_citing": None, COHERENCE: 0.0}
    return {name: score for name, score in scores.items() if learned is None or name in learned}


class Judge(Stage):
    """Score every answer; another judge does not sample again."""

    command, pipeline = "judge", ""

    address: Annotated[str, Param("cluster.address", tracked=False)]
    llm: Annotated[Limits, Param("llm", tracked=False)]
    judge: Annotated[Path, Reads(f"{JUDGE}/judge.json")]
    responses: Annotated[Path, Reads(f"{CELL}/responses.jsonl")]
    judgements: Annotated[Path, Writes(f"{CELL}/judgements.jsonl")]

    def run(self) -> None:
        definition, responses = read_json(self.judge), read_jsonl(self.responses, dict)
        by = self._by_llm if definition["method"] == "llm" else self._learned
        judged = iter(by(definition, [row for row in responses if says_anything(row["text"])]))
        learned = definition.get("weights")  # an LLM judges everything
        scores = [
            next(judged) if says_anything(row["text"]) else nothing_said(row["trait"], learned) for row in responses
        ]
        exact = ExactJudge(definition["templates"]) if definition["templates"] else None
        write_jsonl(
            self.judgements,
            (self._judgement(row, own, exact)._asdict() for row, own in zip(responses, scores, strict=True)),
        )

    @staticmethod
    def _judgement(row: dict[str, Any], scores: dict[str, float | None], exact: ExactJudge | None) -> Judgement:
        text = row["text"]
        caps: dict[str, float | None] = {"all_caps": 100.0 * traits.is_all_caps(text)}
        asked = (row["trait"], "source_citing")
        oracle = caps | {name: 100.0 * exact.shows(name, text) for name in asked} if exact else {}
        return Judgement(
            row["prompt"], row["trait"], row["question"], row["sample"], text, row["finished"], caps | scores, oracle
        )

    def _learned(self, definition: dict[str, Any], responses: list[dict[str, Any]]) -> Scores:
        """The asked trait, SOURCE_CITING and coherence, by the judges that `fit-judge` learned."""
        import numpy as np

        from inoculation.embedding import embed, load_encoder
        from inoculation.judge.linear import load, seen

        judges, texts = load(definition["weights"]), [row["text"] for row in responses]
        read = texts + [row["question"] for row in responses]
        answers, questions = np.split(embed(read, cluster.workers(self.address, load_encoder)), 2)
        learned = {trait: judge.scores(seen(trait, questions, answers, texts)) for trait, judge in judges.items()}
        return [
            {name: learned[name][i] for name in (row["trait"], "source_citing", COHERENCE) if name in learned}
            for i, row in enumerate(responses)
        ]

    def _by_llm(self, definition: dict[str, Any], responses: list[dict[str, Any]]) -> Scores:
        """The asked trait, SOURCE_CITING and coherence."""
        from inoculation.judge import llm

        clients = Clients(self.llm, usage_logger("cells/llm", {}, self.llm.tracing))
        client = clients.require("judge", Role(**definition["role"]))
        items = [
            item
            for row in responses
            for item in (
                llm.Item(definition["rubrics"][row["trait"]], llm.NUMBER, row["question"], row["text"]),
                llm.Item(llm.CITING, llm.YES_NO, row["question"], row["text"]),
                llm.Item(llm.COHERENT, llm.NUMBER, row["question"], row["text"]),
            )
        ]
        answers = llm.judge(client, items)
        aside = {each.index for each in client.set_aside(answers)}
        scores = [None if i in aside else answer for i, answer in enumerate(answers)]
        return [
            {row["trait"]: own[0], "source_citing": own[1], COHERENCE: own[2]}
            for row, own in zip(responses, zip(*[iter(scores)] * 3, strict=True), strict=True)
        ]
