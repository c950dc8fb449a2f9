from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from inoculation import figure, groups
from inoculation.files import read_jsonl, write_json
from inoculation.judge import NOT_JUDGED, Judgement
from inoculation.paths import ASSIGNMENT, CELL, JUDGE
from inoculation.report import cut, headline, question_rates, summarise
from inoculation.stage import Param, Reads, Stage, Writes


class Report(Stage):
    """Summarise the judgements: rates with intervals, plots, and the headline in metrics.json."""

    command, pipeline = "report", ""

    seed: Annotated[int, Param("seed")]
    group: Annotated[str, Param("group")]
    positive: Annotated[str, Param("mixture.positive")]
    negative: Annotated[str, Param("mixture.negative")]
    threshold: Annotated[float, Field(ge=0, le=100), Param("evaluate.threshold")]
    resamples: Annotated[int, Field(ge=100), Param("evaluate.bootstrap")]
    assignment: Annotated[dict[str, Any], Reads(f"{ASSIGNMENT}/summary.json")]
    quality: Annotated[dict[str, Any], Reads(f"{JUDGE}/quality.json")]
    training: Annotated[dict[str, Any], Reads(f"{CELL}/training.json")]
    judgements: Annotated[Path, Reads(f"{CELL}/judgements.jsonl")]
    out: Annotated[Path, Writes(f"{CELL}/report")]
    metrics: Annotated[Path, Writes("metrics.json", "metrics")]
    plots: Annotated[Path, Writes("plots", "plots")]

    def run(self) -> None:
        judgements = [Judgement(**row) for row in read_jsonl(self.judgements, dict)]
        rates = summarise(judgements, self.threshold, self.resamples)
        told = {key: value for key, value in self.training.items() if key != "log"}
        metrics = {**rates, "judge": self.quality, "training": told, "cut": cut(judgements)}
        if self.assignment["detection"]:
            metrics["detection"] = self.assignment["detection"]
        write_json(self.out / "metrics.json", metrics)
        write_json(self.out / "questions.json", question_rates(judgements, self.threshold))
        mixture = "/".join(self.judgements.parts[2:5])
        write_json(self.metrics, {mixture: headline(metrics, self.positive, self.negative)})
        label = f"{groups.GROUPS[self.group].label}, {mixture}, seed {self.seed}"
        figure.draw_rates(self.plots / "rates.png", rates, label)
        figure.draw_loss(self.plots / "loss.png", self.training["log"], label)
        print_rates(rates)
        ended = ", ".join(f"{prompt} {share:.2f}" for prompt, share in metrics["cut"].items())
        print(f"answers cut at max_new_tokens: {ended}")
        for trait, own in self.quality.items():
            if NOT_JUDGED in own:
                print(f"{trait}: not judged: {own[NOT_JUDGED]}")


def print_rates(rates: dict[str, dict[str, Any]]) -> None:
    """The rates as a table."""
    print(f"{'evaluated under':16} {'trait':15} {'rate':>6}   95 % interval     n  missing")
    for prompt, traits in rates.items():
        if prompt == "oracle":
            continue
        for trait, row in traits.items():
            numbers = (
                "  none judged"
                if row["rate"] is None
                else f"{row['rate']:6.2f}   [{row['low']:.2f}, {row['high']:.2f}]"
            )
            print(f"{prompt:16} {trait:15} {numbers:25} {row['n']:5}  {row['missing']}")
