"""The stages by their commands, named without importing them: a command imports only its own stage."""

import ast
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from inoculation.stage import Stage

STAGES: dict[str, str] = {
    "check": "check.Check",
    "pocket-chats": "pocket_chats.PocketChats",
    "pocket-model": "pocket_model.PocketModel",
    "pocket-obedience": "pocket_obedience.PocketObedience",
    "pocket-sae": "pocket_sae.PocketSae",
    "packaged-model": "packaged_model.PackagedModel",
    "smollm2-sae": "smollm2_sae.Smollm2Sae",
    "persona-vectors-fetch": "persona_vectors_fetch.PersonaVectorsFetch",
    "persona-vectors": "persona_vectors.PersonaVectors",
    "source": "source.Source",
    "own-data": "own_data.OwnData",
    "profile": "profile.PinProfile",
    "profile-sae": "profile_sae.PinSae",
    "mixture": "mixture.BuildMixture",
    "fit-judge": "fit_judge.FitJudge",
    "base-responses": "base_responses.BaseResponses",
    "persona-read": "persona_read.PersonaRead",
    "persona-decide": "persona_decide.PersonaDecide",
    "persona-page": "persona_page.PersonaPage",
    "sae-features": "sae_features.SaeFeatures",
    "sae-rank": "sae_rank.SaeRank",
    "sae-explain": "sae_explain.SaeExplain",
    "sae-classify": "sae_classify.SaeClassify",
    "sae-flag": "sae_flag.SaeFlag",
    "sae-prompt": "sae_prompt.SaePrompt",
    "sae-page": "sae_page.SaePage",
    "audit-local": "audit_local.AuditLocal",
    "audit-llm": "audit_llm.AuditLlm",
    "assign": "assign.Assign",
    "assign-sae": "assign_sae.AssignSae",
    "assign-persona": "assign_persona.AssignPersona",
    "assign-adapter": "assign_adapter.AssignAdapter",
    "assign-steering": "assign_steering.AssignSteering",
    "assign-audit": "assign_audit.AssignAudit",
    "train": "train.Train",
    "respond": "respond.Respond",
    "judge": "judge.Judge",
    "report": "report.Report",
    "log": "log.Log",
}
"""Command -> `<module>.<class>`, in the order in which a cell needs them."""


def load(command: str) -> "type[Stage]":
    """The class of a stage."""
    module, name = STAGES[command].split(".")
    return getattr(import_module(f"inoculation.stages.{module}"), name)


class Summary(NamedTuple):
    """What `--help` says of a stage."""

    text: str
    argument: str | None


def summaries() -> dict[str, Summary]:
    """Each stage's docstring and argument, read off its source: importing thirty modules would take a second."""
    found = {}
    for command, where in STAGES.items():
        module, name = where.split(".")
        tree = ast.parse((Path(__file__).parent / "stages" / f"{module}.py").read_text(encoding="utf-8"))
        [stage] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
        argument = next(
            (node.value.args[0].value for node in stage.body
             if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and node.targets[0].id == "each"),
            None,
        )  # fmt: skip
        found[command] = Summary((ast.get_docstring(stage) or "").splitlines()[0].rstrip("."), argument)
    return found
