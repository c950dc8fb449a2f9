from pathlib import Path
from typing import Annotated

from inoculation import lm, mixture
from inoculation.detect import Annotator, Evidence, blind, nothing
from inoculation.detect.language import Language
from inoculation.detect.persona.read import likelihoods
from inoculation.detect.persona.settings import PersonaSettings
from inoculation.detect.prompt import SynthesisSettings
from inoculation.detect.sae import figures
from inoculation.detect.sae.classes import read_classes
from inoculation.detect.sae.features import read_features, varying
from inoculation.detect.sae.flag import Flags, flagged, none, why
from inoculation.detect.sae.guided import GUIDED, guided
from inoculation.detect.sae.rank import NO_LATENT, read_ranked
from inoculation.detect.sae.settings import FlagRule, FlagSettings
from inoculation.files import write_json, write_jsonl
from inoculation.paths import ANNOTATOR, BASE_RESPONSES, LANGUAGE, ROWS, SAE
from inoculation.quality import flag_quality
from inoculation.respond import read_texts
from inoculation.stage import Param, Reads, Stage, Writes


class SaeFlag(Stage):
    """Flag the examples that carry suspicious latents, by every rule; the profile's counts."""

    command, pipeline = "sae-flag", "sae"

    seed: Annotated[int, Param("seed")]
    settings: Annotated[FlagSettings, Param("sae.flag")]
    persona: Annotated[PersonaSettings, Param("persona")]
    synthesis: Annotated[SynthesisSettings, Param("synthesise")]
    machine: Annotated[lm.Machine, Reads(f"{ANNOTATOR}/machine.json", identity=False)]
    ref: Annotated[lm.ModelRef, Reads(f"{ANNOTATOR}/model.json")]
    rule: Annotated[FlagRule, Reads(f"{ANNOTATOR}/flag_rule.json")]
    positive: Annotated[str, Param("mixture.positive")]
    language: Annotated[Language, Reads(LANGUAGE)]
    rows: Annotated[Path, Reads(ROWS)]
    base: Annotated[Path, Reads(BASE_RESPONSES)]
    features: Annotated[Path, Reads(f"{SAE}/features.parquet")]
    rank: Annotated[Path, Reads(f"{SAE}/rank")]
    classes: Annotated[Path, Reads(f"{SAE}/classes.json")]
    out: Annotated[Path, Writes(f"{SAE}/flag")]

    def run(self) -> None:
        rows, ranking = mixture.read_mixture(self.rows), read_ranked(self.rank)
        suspicious = read_classes(self.classes, ranking.latents)
        unfit = nothing(Evidence(rows, [], [], self.positive, self.language.unfit))
        if reason := unfit.reason if unfit else "" if ranking.latents else NO_LATENT:
            flags = {name: none(len(rows), reason) for name in ("study", "component", self.rule)}
        else:
            flags = flagged(ranking, suspicious, self.settings)
            if self.rule == "guided":
                flags["guided"] = self._guided(rows)
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

    def _guided(self, rows: list[mixture.Row]) -> Flags:
        """By what personas do to the responses' likelihood, which is read here."""
        evidence = Evidence(blind(rows), read_texts(self.base, len(rows)), [], self.positive, self.language.unfit)
        if unfit := nothing(evidence):
            return none(len(rows), unfit.reason)
        annotator = Annotator(
            model=lambda: lm.load_model(self.ref), tokenizer=lm.load_tokenizer(self.ref), synthesis=self.synthesis,
            client=lambda _role: None, seed=self.seed, token_budget=self.machine.token_budget,
        )  # fmt: skip
        told = likelihoods(evidence, annotator, self.persona, annotator.model())
        return guided(
            *varying(lambda: read_features(self.features), GUIDED), told, self.persona, self.settings.guided_separation
        )
