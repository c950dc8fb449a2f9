"""Where everything is: path templates, `${...}` filled from params.yaml by DVC and by `stage` alike.

    data/sources/<source>/                    trait data or your own file, verified
    data/profiles/<profile>/                  a profile, pinned: model, settings, roles
    data/saes/<profile>/                      its SAE and corpora, pinned
    data/mixtures/<MIXTURE>/                  the training rows, for every profile
    data/annotations/<annotator>/<MIXTURE>/   what detectors found in them, by one profile's model
    data/cells/<profile>/<MIXTURE>/           judge, and for each group: training chats, adapter, answers, scores

where MIXTURE is <source>/<positive>+<negative>-<contamination>/seed<seed>.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inoculation.stage import resolve

CHECKED = "data/params_checked"
"""Left by the check, and read by every stage that needs no other stage: nothing runs on an invalid params.yaml."""

POCKET = "data/pocket_world"
POCKET_MODEL = f"{POCKET}/models/qwen2"
"""Its own; the others are for transfer."""
SOURCE = "data/sources/${mixture.source}"
MIXTURE_KEY = "${mixture.source}/${mixture.positive}+${mixture.negative}-${mixture.contamination}/seed${seed}"
MIXTURE = f"data/mixtures/{MIXTURE_KEY}"
ROWS = f"{MIXTURE}/mixture.jsonl"

PROFILE = "data/profiles/${profile}"
ANNOTATOR = "data/profiles/${annotator}"
ANNOTATOR_SAE = "data/saes/${annotator}"
ANNOTATIONS = f"data/annotations/${{annotator}}/{MIXTURE_KEY}"
BASE_RESPONSES = f"{ANNOTATIONS}/base_responses.jsonl"
LANGUAGE = f"{ANNOTATIONS}/language.json"
PERSONA = f"{ANNOTATIONS}/persona"
SAE = f"{ANNOTATIONS}/sae"
AUDIT = f"{ANNOTATIONS}/audit"

CELLS = f"data/cells/${{profile}}/{MIXTURE_KEY}"
JUDGE = f"{CELLS}/judge"
ASSIGNMENT = f"{CELLS}/assign/${{group}}"
CELL = f"{CELLS}/${{group}}"


def mixture_name(raw: Mapping[str, Any]) -> str:
    """A mixture's name for a person, without the seed, e.g. `pocket_chats/all_caps+evil-0.5`."""
    return str(Path(resolve(MIXTURE_KEY, raw)).parent)


def experiment(raw: Mapping[str, Any]) -> str:
    """The MLflow experiment of a cell: its profile and mixture."""
    return f"{resolve('${profile}', raw)}/{mixture_name(raw)}"
