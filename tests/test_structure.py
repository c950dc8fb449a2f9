"""The package's structure: who may import whom. docs/structure.md shows the same layers."""

import re

from conftest import ROOT
from grimp import Layer

from inoculation.pipelines import code, import_graph
from inoculation.registry import load

LAYERS = [
    {"__main__"}, {"cli"}, {"commands"}, {"study", "study_page", "sweep", "inoculate", "export", "review"}, {"stages"}, {"plan", "params", "pipelines"}, {"profile", "pocket"}, {"rows", "figure"},
    {"detect", "train", "report", "clients", "effects"}, {"source", "rewriter", "groups", "sft"}, {"mixture", "judge", "persona_vectors", "preventative"},
    {"llm", "respond", "traits"}, {"registry", "paths", "chat", "lm", "decode", "server", "quality", "embedding", "intervals"}, {"stage", "tracking", "citations", "memory", "graphed"},
    {"roles", "store", "timings", "gpus", "files", "hub", "gguf_model", "attention", "launch", "epoch", "cluster", "quiet"},
]  # fmt: skip
"""From the top: a module imports from its own layer and those below it, and never upwards."""


def test_no_import_points_up():
    layers = [Layer(*names, independent=False) for names in LAYERS]
    graph = import_graph()
    illegal = graph.find_illegal_dependencies_for_layers(layers=layers, containers={"inoculation"})
    assert not illegal, [(found.importer, found.imported) for found in illegal]
    rooms = {module.split(".")[1] for module in graph.modules if "." in module}
    assert rooms == set.union(*LAYERS), "every module has its layer"


def test_the_layers_in_the_docs_are_these():
    text = (ROOT / "docs/structure.md").read_text()
    drawn = [
        set(re.findall(r"`(\w+)`", line.split("|")[2])) for line in text.splitlines() if re.match(r"\| \d+ \|", line)
    ]
    assert drawn == LAYERS


def test_nothing_imports_the_pocket_world_but_its_own_stages():
    """Its parameters' schema is part of params.yaml's."""
    graph = import_graph()
    importers = {
        importer
        for module in graph.modules
        if module.startswith("inoculation.pocket")
        for importer in graph.find_modules_that_directly_import(module)
        if not importer.startswith("inoculation.pocket")
        and (importer, module) != ("inoculation.params", "inoculation.pocket.recipe")
    }
    assert importers == {f"inoculation.stages.pocket_{name}" for name in ("chats", "model", "obedience")}


def test_what_takes_minutes_depends_on_no_detector():
    graph = import_graph()
    for command in ("pocket-chats", "pocket-model", "mixture", "train", "respond", "judge"):
        assert not [path for path in code(load(command), graph) if "/detect/" in path], command


def test_no_code_asks_for_the_pocket_profile_by_name():
    for path in (ROOT / "src").rglob("*.py"):
        assert not re.search(r"""[=!]= ?["']pocket["']""", path.read_text()), path
