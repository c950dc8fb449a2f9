"""The detectors by name, each with its part of params.yaml; not a benchmark, but what three of them share."""

from inoculation.detect import Annotator, Detection, Evidence, audit
from inoculation.detect.persona import route as persona
from inoculation.detect.sae import route as sae
from inoculation.groups import DETECTORS
from inoculation.params import Params

ROUTES = {"persona": persona.detect, "sae": sae.detect, "audit": audit.detect}
assert set(ROUTES) == set(DETECTORS)


def detect(name: str, evidence: Evidence, annotator: Annotator, params: Params) -> Detection:
    """What a detector says, with the values of params.yaml."""
    return ROUTES[name](evidence, annotator, getattr(params, name))
