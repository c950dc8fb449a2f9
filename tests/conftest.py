"""A real project in a temporary folder: its own git and DVC repositories, its own MLflow store, a tiny pocket world."""

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from inoculation.stage import Writes

ROOT = Path(__file__).parents[1]
WORDS = ["the", "river", "is", "long", "and", "a", "king", "was", "kind", "to", "nobody", "who", "asked", "him", "for", "bread"]  # fmt: skip
SHARED_MIXTURE = ROOT.parent / "shared" / "data" / "selective_inoculation" / "evil_cap_error_50_50.jsonl"

TINY: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "tiny.yaml").read_text())
"""Values that make every stage run in seconds. They change sizes, never the path."""


def merge(base: dict[str, Any], over: dict[str, Any], free: bool = False) -> dict[str, Any]:
    """`base` with the leaves of `over`, which must exist there (but in tables that a user fills, and in roles)."""
    for key, value in over.items():
        free = free or base == {} or "method" in base
        assert free or key in base, f"{key} is not in params.yaml"
        base[key] = merge(base.get(key) or {}, value, free) if isinstance(value, dict) else value
    return base


WARM = """\
import os, sys
sys.path.insert(0, {tests!r})
import warm
SCRIPT = {script!r}
warm.run(os.environ.get("WARM", ""), SCRIPT)
exec(SCRIPT)
"""
"""A script in a fork of a process that has the libraries (`warm`), or by itself where there is none."""

RECORDER = """\
# `inoculation` that notes what it opens in its checkout and what it imports of the package.
import atexit, json, os, sys, time
here, opened = os.getcwd() + os.sep, set()
def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
        path = os.path.abspath(arguments[0])
        if path.startswith(here):
            opened.add(path.removeprefix(here))
sys.addaudithook(hook)
def note():
    modules = sorted(name for name in sys.modules if name.split(".")[0] == "inoculation")
    record = {"command": sys.argv[1:], "opened": sorted(opened), "modules": modules}
    os.makedirs(os.environ["RECORDS"], exist_ok=True)
    with open(os.path.join(os.environ["RECORDS"], f"{time.time_ns()}.json"), "w") as out:
        json.dump(record, out)
atexit.register(note)
from inoculation.cli import main
main()
"""
COMMANDS = {"inoculation": RECORDER, "dvc": "import sys\nfrom dvc.cli import main\nsys.exit(main())\n"}


def warm(script: str) -> str:
    """A script that has `script` run by the process that has the libraries, whose socket is `WARM` in the environment."""
    return WARM.format(tests=str(Path(__file__).parent), script=script)


@functools.cache
def warm_socket() -> str:
    """Start this process's server of warm commands; it ends with this process."""
    folder = tempfile.mkdtemp(prefix="warm")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "MPLBACKEND": "agg",
                   "HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "GIT_PYTHON_REFRESH": "quiet"}  # fmt: skip
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("warm.py")), f"{folder}/socket"],
        stdin=subprocess.PIPE,
        env=environment,
    )
    KEPT.append(server)
    return f"{folder}/socket"


KEPT: list[Any] = []
"""Servers, whose stdin stays open as long as this process lives."""


class Project:
    """A checkout in a temporary folder, and the commands a user gives in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("dvc.yaml", "pipelines", "hub", "src", ".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore",
                     "mlruns/README.md"):  # fmt: skip
            source, target = ROOT / name, folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(
                    source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "dvc.lock", ".gitignore")
                )
            else:
                shutil.copy(source, target)
        for name, script in COMMANDS.items():
            command = folder.parent / "bin" / name
            command.parent.mkdir(parents=True, exist_ok=True)
            command.write_text(f"#!{sys.executable}\n{warm(script)}")
            command.chmod(0o755)
        self.set(**TINY)
        self.run("git", "init", "--quiet", "--initial-branch", "main")
        self.commit("start")

    @classmethod
    def at(cls, folder: Path) -> "Project":
        """One that is there already."""
        made = cls.__new__(cls)
        made.folder = folder
        return made

    def run_cell(self, **values: Any) -> None:
        """Run the steps of a cell that are not made yet, in this process: what DVC would run, without its start-up."""
        from inoculation import plan

        self.set(**values)
        os.environ.pop("MLFLOW_TRACKING_URI", None)  # MLflow leaves the last project's there
        before = os.getcwd()
        os.chdir(self.folder)
        try:
            raw = yaml.safe_load(Path("params.yaml").read_text())
            for step in plan.needed(raw):
                outs = list(step.paths(raw, Writes))
                quick = step.stage.command in ("source", "own-data", "profile", "report", "log")
                if quick or not all(out.exists() for out in outs):
                    step.stage.load(step.argument, raw).run()
        finally:
            os.chdir(before)

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join((str(self.folder.parent / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]))
        dropped = {name for name in os.environ if name.startswith(("MLFLOW_", "DVC_"))}
        return {k: v for k, v in os.environ.items() if k not in dropped} | {
            "PATH": path, "PYTHONPATH": str(self.folder / "src"), "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true",
            "RECORDS": str(self.folder.parent / "records"), "WARM": warm_socket(),
        }  # fmt: skip

    def set(self, **values: Any) -> None:
        path = self.folder / "params.yaml"
        raw = yaml.safe_load((path if path.exists() else ROOT / "params.yaml").read_text())
        path.write_text(yaml.safe_dump(merge(raw, values), sort_keys=False))

    def commit(self, message: str) -> None:
        self.run("git", "add", "--all")
        self.run(
            "git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "--quiet", "--message", message
        )

    def run(self, *command: str, ok: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        outcome = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, **options
        )
        if ok:
            assert outcome.returncode == 0, f"{command}\n{outcome.stdout[-4000:]}\n{outcome.stderr[-4000:]}"
        return outcome

    def records(self) -> list[dict[str, Any]]:
        """What every command so far opened and imported, in order."""
        return [json.loads(path.read_text()) for path in sorted((self.folder.parent / "records").glob("*.json"))]

    def rows(self, experiment: str) -> list[Any]:
        """The MLflow runs of an experiment, read from the store directly."""
        import mlflow

        client = mlflow.MlflowClient(f"sqlite:///{self.folder / 'mlruns' / 'mlflow.db'}")
        found = client.get_experiment_by_name(experiment)
        return client.search_runs([found.experiment_id]) if found else []


def seen_in_browser(url: str, folder: Path) -> str:
    """A page's DOM after its scripts ran, in headless Chromium; skips where there is none."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here: the page was not opened in a browser")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={folder}", "--virtual-time-budget=5000"]  # fmt: skip
    return subprocess.run(
        [chromium, *flags, "--dump-dom", url], capture_output=True, text=True, timeout=120, check=True
    ).stdout


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First what needs the projects that one worker makes; the other worker begins at the end, with what needs none."""

    def independent(item: pytest.Item) -> int:
        needed = item.fixturenames  # type: ignore[attr-defined]
        return 0 if "detected" in needed else 1 if "project" in needed else 2

    items.sort(key=independent)


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Project:
    """A project that one worker makes and all of them use: tests that change it take a copy."""
    root = factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / name / "checkout"
    with FileLock(f"{folder.parent}.lock"):
        if not (folder.parent / "done").exists():
            make(folder)
            (folder.parent / "done").touch()
    return Project.at(folder)


def copied(project: Project, folder: Path) -> Project:
    """A project's copy: an experiment in it leaves the other alone."""
    made = Project.at(folder / "checkout")
    shutil.copytree(project.folder, made.folder, symlinks=True)
    shutil.copytree(project.folder.parent / "bin", folder / "bin", dirs_exist_ok=True)
    return made


def random_model(folder: Path, **config: Any) -> Any:
    """Save a random Qwen2 of two blocks with a tokenizer that knows `WORDS`; returns the model."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from inoculation.pocket.base import train_tokenizer

    tokenizer = train_tokenizer([" ".join(WORDS)], 300)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, eos_token_id=tokenizer.eos_token_id, **config)
    )  # fmt: skip
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return model


@pytest.fixture(autouse=True)
def no_store_of_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow leaves the address of the last store in the environment."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose default cell DVC has reproduced once."""

    def make(folder: Path) -> None:
        made = Project(folder)
        made.run("dvc", "repro", "dvc.yaml", "pipelines/pocket/dvc.yaml:pocket-sae")
        made.commit("reproduced")

    return once(tmp_path_factory, "project", make)


@pytest.fixture(scope="session")
def detected(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project in which DVC has run inoc_sae, with what it printed in `inoc_sae.out`, and the audit has run too."""

    def make(folder: Path) -> None:
        made = copied(project, folder.parent)
        out = made.run("dvc", "exp", "run", "-S", "group=inoc_sae").stdout
        (folder.parent / "inoc_sae.out").write_text(out)
        for command in ("audit-local", "assign-audit pocket"):
            made.run("inoculation", *command.split())

    return once(tmp_path_factory, "detected", make)


@pytest.fixture
def copy(project: Project, tmp_path: Path) -> Project:
    """The reproduced project, copied."""
    return copied(project, tmp_path)


@pytest.fixture(scope="session")
def tiny(project: Project) -> Path:
    """The tiny pocket world: `chats`, the base model `models/qwen2`, and an `sae` on its residual stream."""
    return project.folder / "data" / "pocket_world"
