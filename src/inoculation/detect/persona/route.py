"""The persona route as one detector, without any I/O; the stages of pipelines/persona run the same steps and keep each."""

from inoculation.detect import Annotator, Detection, Evidence, nothing
from inoculation.detect.persona.read import readings
from inoculation.detect.persona.score import Decision, decided
from inoculation.detect.persona.settings import PersonaSettings
from inoculation.detect.prompt import Synthesis, written


def detect(evidence: Evidence, annotator: Annotator, settings: PersonaSettings) -> Detection:
    """The whole route in memory; see the package's text."""
    if unfit := nothing(evidence):
        return unfit
    found = readings(evidence, annotator, settings)
    decision = decided(found.likelihoods, found.states, found.own_states, settings)
    return concluded(evidence, annotator, decision)[0]


def concluded(evidence: Evidence, annotator: Annotator, decision: Decision) -> tuple[Detection, Synthesis]:
    """The decision with its prompt."""
    marks, scores = decision.flagged.tolist(), decision.score.tolist()
    if not decision.found:
        return Detection(False, decision.reason, marks, scores, None), Synthesis(None, None, [])
    made = written(
        evidence, marks, scores, [], None, annotator.model, annotator.tokenizer, annotator.synthesis, annotator.token_budget,
        annotator.seed,
    )  # fmt: skip
    reason = f"{decision.reason}; prompt: {made.reason}"
    return Detection(True, reason, marks, scores, made.prompt, made.marked), made
