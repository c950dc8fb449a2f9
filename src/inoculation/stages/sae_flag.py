from pathlib import Path
from typing import Annotated

from inoculation import mixture
from inoculation.detect import Evidence, nothing
from inoculation.detect.language import Language
from inoculation.detect.sae import figures
from inoculation.detect.sae.classes import read_classes
from inoculation.detect.sae.flag import flagged, none, why
from inoculation.detect.sae.rank import read_ranked
from inoculation.detect.sae.settings import FlagRule, FlagSettings
from inoculation.files import write_json, write_jsonl
from inoculation.paths import ANNOTATOR, LANGUAGE, ROWS, SAE
from inoculation.quality import flag_quality
from inoculation.stage import Param, Reads, Stage, Writes


class SaeFlag(Stage):
    """Flag the examples that carry suspicious latents, by both rules; the profile's counts."""

    command, pipeline = "sae-flag", "sae"

    settings: Annotated[FlagSettings, Param("sae.flag")]
    rule: Annotated[FlagRule, Reads(f"{ANNOTATOR}/flag_rule.json")]
    positive: Annotated[str, Param("mixture.positive")]
    language: Annotated[Language, Reads(LANGUAGE)]
    rows: Annotated[Path, Reads(ROWS)]
    rank: Annotated[Path, Reads(f"{SAE}/rank")]
    classes: Annotated[Path, Reads(f"{SAE}/classes.json")]
    out: Annotated[Path, Writes(f"{SAE}/flag")]

    def run(self) -> None:
        rows, ranking = mixture.read_mixture(self.rows), read_ranked(self.rank)
        suspicious = read_classes(self.classes, ranking.latents)
        flags = flagged(ranking, suspicious, self.settings)
        if unfit := nothing(Evidence(rows, [], [], self.positive, self.language.unfit)):
            flags = {name: none(len(rows), unfit.reason) for name in flags}
        chosen, study, component = flags[self.rule], flags["study"], flags["component"]
        write_jsonl(
            self.out / "flags.jsonl",
            (
                {
                    "flagged": bool(chosen.flagged[i]),
                    "score": float(chosen.score[i]),
                    "study": bool(study.flagged[i]),
                    "component": bool(component.flagged[i]),
                    "latents": latents,
                }
                for i, latents in enumerate(why(ranking, suspicious))
            ),
        )
        truth = [row.shows_negative for row in rows]
        write_json(
            self.out / "rules.json",
            {
                "rule": self.rule,
                "found": chosen.found,
                "reason": chosen.reason,
                "threshold": chosen.threshold,
                "separation": chosen.separation,
                "control_share": chosen.control_share,
                "rules": {name: flag_quality(own.flagged.tolist(), truth) for name, own in flags.items()},
            },
        )
        by_study = ranking.by("study")
        figures.sensitivity(
            self.out / "sensitivity.png", ranking.columns.matched_difference[:, by_study],
            [suspicious[i] for i in by_study], component, truth, self.settings.study_top, self.settings.study_hits,
        )  # fmt: skip
        print(f"rule {self.rule}: {int(chosen.flagged.sum())} of {len(rows)} examples flagged; {chosen.reason}")
