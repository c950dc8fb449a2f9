import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from inoculation.files import read_json, read_jsonl
from inoculation.paths import ASSIGNMENT, CELL, experiment, mixture_name
from inoculation.stage import Param, Reads, Stage
from inoculation.store import digest

if TYPE_CHECKING:
    from mlflow.entities import Run


class Log(Stage):
    """Bring the cell's MLflow row and the figure over all cells up to date; runs every time, and is quick if they are."""

    command, pipeline = "log", ""
    always = True

    raw: Annotated[dict[str, Any], Param("", tracked=False)]
    assignment: Annotated[Path, Reads(ASSIGNMENT)]
    training: Annotated[dict[str, Any], Reads(f"{CELL}/training.json")]
    judgements: Annotated[Path, Reads(f"{CELL}/judgements.jsonl")]
    report: Annotated[Path, Reads(f"{CELL}/report")]

    def run(self) -> None:
        import mlflow

        from inoculation import plan, rows, tracking
        from inoculation.groups import GROUPS

        params = plan.identity(self.raw)
        cell = plan.cell_id(params)
        chats, first, steering = (self.assignment / name for name in ("chats.jsonl", "first.jsonl", "steering.json"))
        content = digest(self.report, self.judgements, chats, first, steering, self.training)
        tracking.connect(experiment(self.raw))
        there = rows.find(cell)
        if there and there[0].data.tags.get(rows.CONTENT_TAG) == content:
            print(f"MLflow has this cell: {there[0].info.run_name} in {experiment(self.raw)}")
            return
        tags = {
            "group": self.raw["group"],
            "seed": str(self.raw["seed"]),
            "dvc.exp": os.environ.get("DVC_EXP_NAME", "workspace"),
            "mlflow.source.git.commit": rows.git_commit(),
            rows.CONTENT_TAG: content,
            rows.TRAINED_ON_TAG: digest(chats, first, steering),
        }
        with rows.new_row(f"{self.raw['group']}/seed{self.raw['seed']}", tags, params, cell):
            self._fill(chats)
            for stands_in in (first, steering):
                mlflow.log_artifact(str(stands_in))
            if detector := GROUPS[self.raw["group"]].detector:
                self._log_detector(detector)
        self._draw()

    def _fill(self, chats: Path) -> None:
        """The headline as metrics; every rate, the curve and the answers as tables; the training set, and DVC's hashes."""
        import mlflow
        import pandas as pd

        from inoculation import plan, rows
        from inoculation.report import headline, rate_rows

        metrics, assigned = read_json(self.report / "metrics.json"), read_json(self.assignment / "summary.json")
        mixture = self.raw["mixture"]
        numbers = headline(metrics, mixture["positive"], mixture["negative"])
        mlflow.log_metrics({key: round(float(value), 4) for key, value in numbers.items() if value is not None})
        mlflow.set_tag(plan.SECONDS_TAG, json.dumps(plan.measured_seconds(self.raw)))
        rows.log_curve(self.training["log"])
        judgements = read_jsonl(self.judgements, dict)
        mlflow.log_table(pd.DataFrame([_flat(row) for row in judgements]), "judgements.json")
        mlflow.log_table(pd.DataFrame(rate_rows(metrics)), "rates.json")
        mlflow.log_dict(read_json(self.report / "questions.json"), "questions.json")
        mlflow.log_dict(metrics, "metrics.json")
        mlflow.log_dict(assigned, "assignment.json")
        if assigned["system_prompt"]:
            mlflow.set_tag("system_prompt", assigned["system_prompt"])
        frame = pd.DataFrame(
            [{key: json.dumps(value) for key, value in row.items()} for row in read_jsonl(chats, dict)]
        )
        name = f"{mixture_name(self.raw)}/{self.raw['group']}"
        md5 = hashlib.md5(chats.read_bytes(), usedforsecurity=False).hexdigest()
        dataset = mlflow.data.from_pandas(frame, source=str(chats), name=name, digest=md5)
        mlflow.log_input(dataset, context="training")
        made = {path for step in plan.needed(self.raw) for path in step.paths(self.raw, plan.Writes)}
        mlflow.set_tag(rows.LOCK_TAG, json.dumps(rows.dvc_hashes(made)))

    def _log_detector(self, detector: str) -> None:
        """What the detector saw, as tables and pages; its prompt goes to the Prompt Registry."""
        import mlflow
        import pandas as pd

        from inoculation import plan, rows

        folder = plan.detection_folder(self.raw)
        told = read_json(folder / "detection.json")
        mlflow.set_tag("detection.reason", told["reason"])
        mlflow.log_dict(told, "detection.json")
        mlflow.log_table(pd.DataFrame(read_jsonl(folder / "flags.jsonl", dict)), "flags.json")
        tags = {
            key: value for key, value in plan.identity(self.raw).items() if key.startswith((f"{detector}.", "audit."))
        }
        if detector == "persona":
            mlflow.log_table(pd.DataFrame(told["personas"]), "personas.json")
            mlflow.log_table(pd.DataFrame(told["ranking"], columns=["prompt", "gain"]), "prompts.json")
            mlflow.log_artifact(str(folder.parent / "page.html"), "persona")
        if detector == "sae":
            sae = folder.parent
            latents = pd.DataFrame(read_json(sae / "rank" / "latents.json"))
            classes = read_json(sae / "classes.json")["classes"]
            explanations = read_jsonl(sae / "explanations.jsonl", dict)
            latents["class"] = [classes[str(latent)]["class"] for latent in latents["latent"]]
            latents["description"] = [row["description"] for row in explanations]
            latents["link"] = [row["link"] for row in explanations]
            mlflow.log_table(latents, "latents.json")
            mlflow.log_artifact(str(sae / "flag" / "sensitivity.png"), "sae")
            mlflow.log_artifact(str(sae / "page.html"), "sae")
            tags["features"] = " ".join(
                str(n) for n, c in zip(latents["latent"], latents["class"], strict=True) if c == "no"
            )
        if told["prompt"]:
            rows.register_prompt(experiment(self.raw), self.raw["seed"], detector, told["prompt"], tags)

    def _draw(self) -> None:
        """The study's figure over all rows so far, in figures/ and on the experiment's newest row; its page's text.

        One process at a time, of those that share a folder; other machines log meanwhile. Whoever draws last has seen every row:
        one that came while this drew is drawn too.
        """
        from filelock import FileLock

        from inoculation import plan, rows
        from inoculation.tracking import store_folder

        def alike(group: str) -> dict[str, Any] | None:
            return plan.identity_of(self.raw, group)

        drawn: set[str] = set()
        with FileLock(store_folder() / ".drawing.lock"):
            while (found := {row.info.run_id: row for row in rows.siblings(alike)}).keys() != drawn:
                self._draw_alone(list(found.values()))
                drawn = set(found)

    def _draw_alone(self, found: "list[Run]") -> None:
        import mlflow

        from inoculation import effects, plan, rows
        from inoculation.figure import draw
        from inoculation.store import main_checkout

        drawing = f"figures/{experiment(self.raw)}.png"
        cells = [rows.counted(run) for run in found]
        traits, evaluate, judge = plan.traits(self.raw), self.raw["evaluate"], plan.judge_name(self.raw)
        draw(
            [main_checkout() / drawing],
            cells,
            prompts=evaluate["system_prompts"],
            traits=traits,
            title=experiment(self.raw),
            note=f"judge: {judge}; bars are 95 % intervals over questions and seeds, dashes the seeds",
            resamples=evaluate["bootstrap"],
        )
        [newest] = sorted(found, key=lambda run: -run.info.start_time)[:1]
        client = mlflow.MlflowClient()
        client.log_artifact(newest.info.run_id, str(main_checkout() / drawing), "figure")
        verdicts = effects.verdicts(cells, traits, evaluate["bootstrap"])
        table = rows.table(found, experiment(self.raw), evaluate["system_prompts"], traits, judge)
        client.set_experiment_tag(
            newest.info.experiment_id,
            "mlflow.note.content",
            rows.note(traits, table, effects.markdown(verdicts), drawing, newest.info.experiment_id),
        )
        client.set_experiment_tag(newest.info.experiment_id, *rows.view())


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    scores, oracle = row.pop("scores"), row.pop("oracle")
    return row | {f"score/{k}": v for k, v in scores.items()} | {f"oracle/{k}": v for k, v in oracle.items()}
