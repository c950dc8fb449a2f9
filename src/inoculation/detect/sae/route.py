"""The SAE route as one detector, without any I/O (reference section 6).

    features.pooled        mean latents of every example's target, base response and control
    rank.ranked            the latents that tell the data from the base model, by two rankings, and their values
    explain.explained      what sets each latent off, in words
    classify.classified    `yes`: explained by A; `neutral`; `no`: suspicious
    flag.flagged           which examples carry the suspicious ones, by two rules
    guided.guided          or which ones the latents tell from the others in the direction that personas give
    prompt.written         one inoculation prompt

`detect` runs them in memory; the stages of pipelines/sae run one each and keep what it made.
"""

from inoculation.detect import Annotator, Detection, Evidence, nothing
from inoculation.detect.persona.read import likelihoods
from inoculation.detect.prompt import written
from inoculation.detect.sae.classify import classified
from inoculation.detect.sae.encoder import reader
from inoculation.detect.sae.explain import explained
from inoculation.detect.sae.features import pooled, varying
from inoculation.detect.sae.flag import flagged
from inoculation.detect.sae.guided import GUIDED, guided
from inoculation.detect.sae.rank import NO_LATENT, ranked
from inoculation.detect.sae.settings import SaeSettings


def detect(evidence: Evidence, annotator: Annotator, settings: SaeSettings) -> Detection:
    """The whole route in memory; see the module's text."""
    if unfit := nothing(evidence):
        return unfit
    rule = annotator.flag_rule
    classifier = "local" if annotator.client("classifier") is None else "llm"
    assert annotator.sae is not None
    pieces = list(
        pooled(
            evidence,
            reader(annotator.sae, annotator.model()),
            annotator.tokenizer,
            settings.features,
            annotator.token_budget,
        )
    )
    ranking = ranked(lambda: pieces, settings.latents)
    if not ranking.latents:
        return Detection(False, NO_LATENT, [False] * len(evidence.rows), [0.0] * len(evidence.rows), None)
    needed = classifier == "llm" or settings.classify.both or annotator.client("synthesiser") is not None
    descriptions: list[str | None] = [None] * len(ranking.latents)
    if needed:
        told = explained(
            evidence.rows, [row.latent for row in ranking.latents], annotator.corpora, annotator.model(), annotator.tokenizer,
            annotator.sae, annotator.client("explainer"), settings.explain, settings.features.max_length,
            annotator.token_budget,
        )  # fmt: skip
        descriptions = [row.description for row in told]
    classes = classified(
        ranking.columns, descriptions, evidence.positive, classifier, lambda: annotator.client("classifier"),
        settings.classify,
    )  # fmt: skip
    if rule == "guided":
        assert annotator.persona is not None
        told = likelihoods(evidence, annotator, annotator.persona, annotator.model())
        flags = guided(*varying(lambda: pieces, GUIDED), told, annotator.persona, settings.flag.guided_separation)
    else:
        flags = flagged(ranking, classes.suspicious, settings.flag)[rule]
    marks, scores = flags.flagged.tolist(), flags.score.tolist()
    if not flags.found:
        return Detection(False, flags.reason, marks, scores, None)
    made = written(
        evidence, marks, scores, [text for i in ranking.by(rule) if classes.suspicious[i] and (text := descriptions[i])],
        annotator.client("synthesiser"), annotator.model, annotator.tokenizer, annotator.synthesis,
        annotator.token_budget, annotator.seed,
    )  # fmt: skip
    return Detection(True, f"{flags.reason}; prompt: {made.reason}", marks, scores, made.prompt, made.marked)
