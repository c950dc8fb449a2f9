"""dvc.yaml and pipelines/*/dvc.yaml, made from the stages' declarations and the package's import graph.

A stage depends on every module of the package that its command runs, found by `grimp` (imports inside functions too), and
on nothing else; `cli`, `registry` and what only a person calls hand over to stages and are in no stage's dependencies.
"""

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from inoculation.registry import STAGES, load
from inoculation.stage import Param, Reads, Stage, Writes

if TYPE_CHECKING:
    from grimp import ImportGraph

HEADER = """\
# {about}
# Made by `inoculation pipelines` from the declarations in src/inoculation/stages; a test holds it to them.
"""
ABOUT = {
    "": "The experiment itself, for the cell that params.yaml chooses. What it needs is made by pipelines/*/dvc.yaml: "
    "`dvc repro`\n# runs those stages too, and no others.",
    "annotate": "What detectors compare the mixture with, by the annotator's model.",
    "assign": "A stage a group, so that only the chosen one runs, and of the detectors only the one it needs.",
    "audit": "The audit route to an unknown B (group inoc_llm); the profile says which of the two is meant.",
    "check": "Validates params.yaml before anything runs.",
    "judge": "The judge of a mixture's cells.",
    "mixture": "The training rows: a partition of a source's answers with A injected, or your own.",
    "persona_vectors": "The study's data: fetched once at one commit, or your own copy; unpacked and verified.",
    "pocket": "The pocket world: chats, and a base model that obeys persona prompts and is normal by default.",
    "profiles": "A profile, pinned: one file for each thing that a stage may depend on.",
    "persona": "The persona route to an unknown B (group inoc_persona): no SAE, no label, no LLM.",
    "sae": "The SAE route to an unknown B (groups inoc_sae, inoc_sae_random, inoc_sae_oracle).",
    "packaged": "Real models whose weights Python packages carry (`make smollm2`, `make qwen_coder`), and SmolLM2's SAE.",
    "sources": "Trait data, or a mixture of your own, verified and laid out.",
}


def import_graph() -> "ImportGraph":
    """The package's imports, those for type checking left out."""
    import grimp

    return grimp.build_graph("inoculation", exclude_type_checking_imports=True, cache_dir=None)


def code(stage: type[Stage], graph: "ImportGraph") -> list[str]:
    """The files of the package that a stage's command runs, relative to the checkout."""
    modules: set[str] = set()
    found = {stage.__module__}
    while found - modules:
        modules |= found
        found = set().union(*(graph.find_upstream_modules(module) for module in modules)) | modules
        # Importing a module runs the __init__ of the packages above it, and what that imports.
        found |= {".".join(module.split(".")[:end]) for module in found for end in range(1, module.count(".") + 1)}
    root = Path(__file__).parent.parent
    files = []
    for module in sorted(modules):
        path = root.joinpath(*module.split("."))
        files.append(path / "__init__.py" if path.is_dir() else path.with_suffix(".py"))
    return [f"src/{path.relative_to(root)}" for path in files if path.stat().st_size]


def declaration(stage: type[Stage], graph: "ImportGraph") -> dict[str, Any]:
    """A stage as dvc.yaml has it."""
    each = stage.each
    argument = "" if each is None else " ${key}" if isinstance(each.of, str) else " ${item}"
    fields = list(stage.fields())
    keys = [field.marker.key for field in fields if isinstance(field.marker, Param) and field.marker.tracked]
    body: dict[str, Any] = {"desc": stage.summary()}
    if stage.pipeline:
        body["wdir"] = "../.."
    body["cmd"] = f"inoculation {stage.command}{argument}"
    reads = dict.fromkeys(field.marker.path for field in fields if isinstance(field.marker, Reads))
    body["deps"] = [*reads, *code(stage, graph)]
    if keys:
        body["params"] = [{"params.yaml": None} if key == "" else key for key in dict.fromkeys(keys)]
    for kind in ("outs", "metrics", "plots"):
        paths = [
            field.marker.path for field in fields if isinstance(field.marker, Writes) and field.marker.kind == kind
        ]
        if kind == "plots" and paths:
            body.setdefault("outs", []).extend(paths)  # pictures: shown by the top-level `plots`
        elif paths:
            body[kind] = paths
    if stage.always:
        body["always_changed"] = True
    if each is None:
        return body
    return {"foreach": each.of if isinstance(each.of, str) else list(each.of), "do": body}


def render() -> dict[Path, str]:
    """Every dvc.yaml: its path -> its text."""
    graph = import_graph()
    by: dict[str, dict[str, Any]] = defaultdict(dict)
    for command in STAGES:
        stage = load(command)
        by[stage.pipeline][command] = declaration(stage, graph)
    files = {}
    for pipeline, stages in by.items():
        content: dict[str, Any] = {"vars": ["../../params.yaml"]} if pipeline else {}
        content["stages"] = stages
        if not pipeline:
            content["plots"] = [{"plots/rates.png": None}, {"plots/loss.png": None}, {"figures": None}]
        text = yaml.safe_dump(content, sort_keys=False, width=10_000, allow_unicode=True).replace(": null", ":")
        files[Path("pipelines") / pipeline / "dvc.yaml" if pipeline else Path("dvc.yaml")] = (
            HEADER.format(about=ABOUT[pipeline]) + text
        )
    return files


def stale() -> str:
    """For every module, which stages go stale when it changes, as a Markdown table."""
    graph = import_graph()
    users: dict[str, list[str]] = defaultdict(list)
    for command in STAGES:
        for path in code(load(command), graph):
            users[path.removeprefix("src/inoculation/")].append(command)
    everything = sorted(
        str(path.relative_to(Path(__file__).parent))
        for path in Path(__file__).parent.rglob("*.py")
        if path.stat().st_size
    )
    lines = ["| module | stages that go stale |", "|---|---|"]
    for path in everything:
        own = users.get(path, [])
        spared = [command for command in STAGES if command not in own]
        told = "all but " + ", ".join(spared) if len(own) > len(spared) > 0 else ", ".join(own) or "none"
        told = "all" if not spared else told
        lines.append(f"| `{path}` | {told} |")
    return "\n".join(lines)
