"""From a cell to the stages that it needs: what will run, what is missing for it, and what names its results.

All of it is read off the stages' declarations; DVC finds the same graph in the dvc.yaml files made from them.
"""

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from inoculation import timings
from inoculation.files import InputError, read_json
from inoculation.gguf_model import GgufWeights, located
from inoculation.paths import PROFILE, ROWS, mixture_name
from inoculation.registry import STAGES, load
from inoculation.roles import Limits, Role, Roles
from inoculation.stage import Param, Reads, Stage, Writes, lookup, resolve
from inoculation.store import digest, main_checkout
from inoculation.tracking import existing_store, flatten, of_the_store

if TYPE_CHECKING:
    from mlflow.entities import Run

SECONDS_TAG = "seconds"
"""Tag of a row: what its stages took, as JSON; a metric each would be thirty columns in MLflow's table."""


class Step(NamedTuple):
    """One stage of a cell."""

    stage: type[Stage]
    argument: str | None

    def __str__(self) -> str:
        return self.stage.command if self.argument is None else f"{self.stage.command} {self.argument}"

    def address(self) -> str:
        """As DVC names it."""
        name = self.stage.command if self.argument is None else f"{self.stage.command}@{self.argument}"
        return f"pipelines/{self.stage.pipeline}/dvc.yaml:{name}" if self.stage.pipeline else name

    def paths(self, raw: Mapping[str, Any], kind: type[Reads] | type[Writes]) -> Iterator[Path]:
        """What it reads or writes."""
        scope = self.stage.scope(raw, self.argument)
        for field in self.stage.fields():
            if isinstance(field.marker, kind):
                yield Path(resolve(field.marker.path, scope))


def every_step(raw: Mapping[str, Any]) -> list[Step]:
    """Every stage there is, one for each of its names."""
    steps = []
    for command in STAGES:
        stage = load(command)
        if stage.each is None:
            steps.append(Step(stage, None))
        else:
            names = lookup(raw, stage.each.of[2:-1]) if isinstance(stage.each.of, str) else stage.each.of
            steps += [Step(stage, name) for name in names or ()]
    return steps


def needed(raw: Mapping[str, Any], *last: str) -> list[Step]:
    """The steps of the chosen cell, each after those that make what it reads.

    Args:
        last: commands whose steps, all of their names, are wanted; none: `log`.
    """
    steps = every_step(raw)
    makers = {path: step for step in steps for path in step.paths(raw, Writes)}
    order: dict[Step, None] = {}

    def visit(step: Step) -> None:
        for path in step.paths(raw, Reads):
            for made in (path, *path.parents):
                if made in makers:
                    if makers[made] not in order:
                        visit(makers[made])
                    break
        order[step] = None

    for step in steps:
        if step.stage.command in (last or ("log",)):
            visit(step)
    return list(order)


PINNING = ("profile", "profile-sae")
"""Commands of the stages that pin a profile."""


def identity(raw: Mapping[str, Any], disk: bool = True) -> dict[str, Any]:
    """Every parameter that the chosen cell's results depend on, keys joined with dots; what a row logs.

    Args:
        raw: params.yaml; what it says of a profile counts, whatever is pinned of it at the moment.
        disk: with the digests of the profile's model and SAE, as they were pinned, or of the model as it is.

    Raises:
        InputError: a model or SAE of the cell is not there, so that nothing was run with it here.
    """
    found: dict[str, Any] = {}
    for step in needed(raw, "report"):
        if step.stage.command in PINNING:
            continue  # what others read of it counts, and nothing else
        scope = step.stage.scope(raw, step.argument)
        for field in step.stage.fields():
            marker = field.marker
            if isinstance(marker, Param) and marker.identity and marker.tracked and marker.key:
                key = resolve(marker.key, scope)
                found |= flatten(lookup(scope, key), key)
            elif isinstance(marker, Reads) and marker.identity and field.type is not Path:
                path = Path(resolve(marker.path, scope))
                if path.parts[:2] in (("data", "profiles"), ("data", "saes")):
                    found |= flatten(_pinned(path, raw, disk), _setting(path, raw))
    return {"profile": raw["profile"], "mixture.source": raw["mixture"]["source"]} | found


def _pinned(path: Path, raw: Mapping[str, Any], disk: bool) -> Any:
    """What a file of a pinned profile holds once it is pinned by this params.yaml."""
    from inoculation.profile import Profile, model_pin, sae_pins, settings
    from inoculation.train import TrainSettings

    entry = raw["profiles"][path.parts[2]]
    profile, name = Profile(**entry), str(Path(*path.parts[3:]))
    said = settings(profile, Roles(**raw["roles"][profile.roles]), TrainSettings(**raw["train"][profile.train]))
    if path.parts[1] == "profiles" and name in said:
        return said[name]
    pinned = read_json(path) if path.exists() else {}
    of, wanted = {
        "model.json": (pinned.get("model"), profile.model),
        "sae.json": (pinned.get("release"), profile.sae),
        "corpora.json": (str(Path(pinned.get("conversational", "")).parent), profile.corpora),
    }[name]
    if not disk:
        pinned = {"named": wanted}
    elif of != str(Path(wanted)):  # of the hub, or pinned for something else or not at all
        pinned = model_pin(profile) if name == "model.json" else sae_pins(profile)[name]
    return pinned | ({"dtype": profile.dtype, "load_in_4bit": profile.load_in_4bit} if name == "model.json" else {})


def makes_models(raw: Mapping[str, Any], key: str) -> bool:
    """Whether a parameter makes the models or SAEs that the chosen cell starts from, instead of what is done with them."""
    steps = needed(raw)
    for step in needed(raw, *(step.stage.command for step in steps if step.stage.command in PINNING)):
        for field in step.stage.fields():
            marker = field.marker
            if step not in steps or step.stage.command in PINNING or not isinstance(marker, Param):
                continue
            if marker.key and marker.tracked and marker.identity:
                own = resolve(marker.key, step.stage.scope(raw, step.argument))
                if f"{key}.".startswith(f"{own}.") or f"{own}.".startswith(f"{key}."):
                    return True
    return False


def cell_id(identity: Mapping[str, Any]) -> str:
    """The digest of an `identity` that names a row."""
    return digest({key: str(value) for key, value in identity.items()})


def _setting(path: Path, raw: Mapping[str, Any]) -> str:
    """`data/profiles/<profile>/roles/judge.json` -> `roles.judge`; an annotator's of another profile says so."""
    name, *rest = path.with_suffix("").parts[2:]
    return ".".join(rest if name == raw["profile"] else ["annotator", *rest])


def roles(raw: Mapping[str, Any]) -> list[tuple[str, Role]]:
    """(name, role) of every role that an LLM plays in the chosen cell."""
    playing: dict[str, Role] = {}
    both = bool(raw["sae"]["classify"]["both"])
    for step in needed(raw):
        for field in step.stage.fields():
            if field.type is not Role or not isinstance(field.marker, (Reads, Param)):
                continue
            name, role = _role(Path(resolve(field.marker[0], step.stage.scope(raw, step.argument))), field.name, raw)
            by_name = {"classifier": both, "auditor": step.stage.command == "audit-llm"}
            used = role.method == "llm" or by_name.get(name, False)
            if name == "rewriter" and raw["mixture"]["positive"] != "source_citing":
                continue
            if used and step.stage.command not in ("source", "own-data"):
                playing[name] = role
    return sorted(playing.items())


def _role(path: Path, name: str, raw: Mapping[str, Any]) -> tuple[str, Role]:
    """A role from params.yaml, where the stage will read it from a file that is not made yet."""
    if path.parts[:2] == ("data", "profiles"):
        block = raw["roles"][raw["profiles"][path.parts[2]]["roles"]]
        return path.stem, Role(**block[path.stem])
    table = {**(raw["sources"] or {}), **(raw["data_sets"] or {})}
    source = path.parts[2] if path.parts[:2] == ("data", "sources") else raw["mixture"]["source"]
    return name, Role(**table[source]["rewriter"])


def missing(raw: Mapping[str, Any]) -> list[str]:
    """Everything that the chosen cell will need and that is not there: files, keys, prices, hub artefacts.

    Args:
        raw: a valid params.yaml.
    """
    problems = []
    steps = needed(raw)
    made = {path for step in steps for path in step.paths(raw, Writes)}
    foreign = [*_foreign_sae(raw, steps)]
    sae = Path(raw["profiles"][raw["annotator"]]["sae"])
    for step in steps:
        if foreign and (step.stage.command == "profile-sae" or sae in step.paths(raw, Writes)):
            continue  # what an SAE lacks that is refused anyway
        for path in step.paths(raw, Reads):
            if not path.exists() and not made & {path, *path.parents}:
                problems.append(f"{step}: {path}: no such file or folder{_queue_hint(path)}")
    for name in dict.fromkeys((raw["profile"], raw["annotator"])):
        if any(step == (load("profile"), name) for step in steps):
            problems += [f"profile {name}: {problem}" for problem in _missing_artefacts(raw["profiles"][name], steps)]
    problems += [*foreign, *_missing_packages(raw, steps), *_missing_servers(raw, steps), *_missing_llms(raw)]
    if raw["cluster"]["address"] and find_spec("ray") is None:
        problems.append(
            "cluster.address: Ray is not installed; valid: pip install --editable '.[ray]', or leave it empty"
        )
    return list(dict.fromkeys(problems))


def _queue_hint(path: Path) -> str:
    queued = main_checkout() != Path.cwd().resolve()
    if queued and not path.is_absolute():
        return (
            "; a queued experiment runs in a copy of the checkout, which has only what git or DVC tracks: give the file's "
            "absolute path, or add it to git or DVC"
        )
    return ""


def _missing_artefacts(profile: Mapping[str, Any], steps: list[Step]) -> Iterator[str]:
    """Local models and corpora that are not there, and hub artefacts that can be neither reached nor found in the cache."""
    from inoculation.hub import reachable
    from inoculation.profile import named

    commands = {step.stage.command for step in steps}
    said = named(Path(profile["model"]), "model", "revision")
    if said and (problem := reachable(said["model"], said.get("revision"), "model")):
        yield problem
    if "sae-explain" in commands and Path(profile["corpora"]).is_file():
        for name, corpus in named(Path(profile["corpora"]), "conversational", "pretraining").items():
            if corpus.startswith("hf://datasets/"):
                if problem := reachable("/".join(corpus.split("/")[3:5]), None, "dataset"):
                    yield problem
            elif not Path(corpus).is_file():
                yield f"{name} corpus {corpus}: no such file; a corpus is JSONL of chats or texts, or a published .h5"


def _foreign_sae(raw: Mapping[str, Any], steps: list[Step]) -> Iterator[str]:
    """The annotator's SAE, where a stage of this cell trains it on another profile's model."""
    annotator = raw["profiles"][raw["annotator"]]
    sae, own = Path(annotator["sae"]), Path(annotator["model"])
    for step in steps:
        if sae in step.paths(raw, Writes):
            models = {Path(profile["model"]) for profile in raw["profiles"].values()} & {*step.paths(raw, Reads)}
            if models and own not in models:
                yield (
                    f"profiles.{raw['annotator']}.sae: {sae} is trained on {', '.join(map(str, sorted(models)))}, not on {own}; "
                    f"valid: an annotator with that model, or a group that needs no SAE"
                )


def _missing_packages(raw: Mapping[str, Any], steps: list[Step]) -> Iterator[str]:
    """Packages that carry a model's weights and are not installed, where the model is not made yet."""
    for step in steps:
        if step.stage.command == "packaged-model" and not all(path.exists() for path in step.paths(raw, Writes)):
            try:
                located(GgufWeights(**raw["packaged"][step.argument]))
            except InputError as error:
                yield f"{step}: {error}"


def _missing_servers(raw: Mapping[str, Any], steps: list[Step]) -> Iterator[str]:
    """Servers that are to sample answers, because none are there or another sampled them, and cannot be reached or serve another
    model."""
    from inoculation.profile import named
    from inoculation.server import unserved

    sampling = {"respond": raw["profile"], "base-responses": raw["annotator"]}
    wanted = [step for step in steps if step.stage.command in sampling]
    left = [
        step
        for step in wanted
        if not all(path.exists() for path in step.paths(raw, Writes)) or _moved(raw, sampling[step.stage.command])
    ]
    for name in dict.fromkeys(sampling[step.stage.command] for step in left):
        profile = raw["profiles"][name]
        model = Path(profile["model"])
        served = named(model, "model", "revision").get("model", str(model))
        if problem := unserved(profile["api_base"], served):
            yield f"profiles.{name}.api_base: {problem}"


def _moved(raw: Mapping[str, Any], name: str) -> bool:
    """Whether a profile has a server, and another one than it was pinned with."""
    address, pinned = raw["profiles"][name]["api_base"], Path(resolve(PROFILE, {"profile": name})) / "server.json"
    return bool(address) and (not pinned.exists() or read_json(pinned)["api_base"] != address)


def _missing_llms(raw: Mapping[str, Any]) -> Iterator[str]:
    playing = roles(raw)
    if not playing:
        return
    from inoculation.llm import Client
    from inoculation.store import llm_cache

    limits = Limits(**raw["llm"])
    for name, role in playing:
        try:
            Client(name, role, limits, llm_cache())
        except InputError as error:
            yield str(error)


def identity_of(raw: Mapping[str, Any], group: str) -> dict[str, Any] | None:
    """`identity` of the cell of another group; None where a model or SAE of it is not here."""
    try:
        return identity({**raw, "group": group})
    except InputError:
        return None


def absent(raw: Mapping[str, Any], group: str) -> list[str]:
    """Why there is no `identity_of` a group's cell: models and SAEs that are not here, and what brings them.

    An experiment of DVC's queue makes them in a copy of the checkout, so that here they are in the cache alone.
    """
    own = {**raw, "group": group}
    profiles = [raw["profiles"][name] for name in dict.fromkeys((raw["profile"], raw["annotator"]))]
    named = {Path(profile[key]) for profile in profiles for key in ("model", "sae")}
    return [
        f"{path} is not here; `dvc repro {step.address()}` brings it from DVC's cache, or makes it"
        for step in needed(own)
        for path in step.paths(own, Writes)
        if path in named and not path.exists()
    ]


def traits(raw: Mapping[str, Any]) -> list[str]:
    """The traits of a figure or table in their order: A, B, then C."""
    negative = raw["mixture"]["negative"]
    return [raw["mixture"]["positive"], negative, *(trait for trait in raw["negative_traits"] if trait != negative)]


def judge_name(raw: Mapping[str, Any]) -> str:
    """Who judges, for a person."""
    role = Role(**raw["roles"][raw["profiles"][raw["profile"]]["roles"]]["judge"])
    return str(role.model) if role.method == "llm" else "local (MiniLM)"


def detection_folder(raw: Mapping[str, Any]) -> Path:
    """Where the chosen group's detector left what it found."""
    step = next(step for step in needed(raw) if step.stage.command.startswith("assign"))
    scope = step.stage.scope(raw, step.argument)
    [path] = [field.marker.path for field in step.stage.fields() if field.name == "detection"]
    return Path(resolve(path, scope))


def measured_seconds(raw: Mapping[str, Any], last_stage: str = "log") -> dict[str, float]:
    """Command -> seconds that this cell's stages took when they last ran on this machine, whichever cell they ran for."""
    last = {(row["step"], row["profile"]): row["seconds"] for row in timings.noted()}
    steps = {str(step): step for step in needed(raw, last_stage)}
    profiles = (raw["profile"], raw["annotator"])
    return {
        step.stage.command: last[name, profile]
        for name, step in steps.items()
        for profile in profiles
        if (name, profile) in last
    }


def row_seconds(row: "Run") -> dict[str, float]:
    """Command -> seconds, as a row's `log` stage knew them."""
    return json.loads(row.data.tags.get(SECONDS_TAG, "{}"))


def will_run(raw: Mapping[str, Any]) -> list[Step]:
    """The steps of the cell that DVC will run: those it finds changed, and what comes after them.

    Some of them may then be found in DVC's cache.
    """
    steps = {step.address(): step for step in needed(raw)}
    outcome = subprocess.run([sys.executable, "-m", "dvc", "status", "--json", *steps], capture_output=True, text=True)
    if outcome.returncode:
        raise InputError(f"`dvc status` failed:\n{outcome.stderr.strip()}")
    changed = json.loads(outcome.stdout)
    running: list[Step] = []
    made: set[Path] = set()
    for name, step in steps.items():
        if name in changed or any(made & {path, *path.parents} for path in step.paths(raw, Reads)):
            running.append(step)
            if step.stage.command != "check":  # which leaves the same bytes
                made |= set(step.paths(raw, Writes))
    return running


def describe(raw: Mapping[str, Any]) -> str:
    """What `inoculation plan` prints."""
    seconds, dollars = _measured(raw)
    lines = [
        f"{raw['group']}, {mixture_name(raw)}, seed {raw['seed']}; trains {raw['profile']}, annotates {raw['annotator']}"
    ]
    total, unknown = 0.0, 0
    for step in will_run(raw):
        known = seconds.get(step.stage.command)
        total, unknown = total + (known or 0.0), unknown + (known is None)
        lines.append(
            f"  {step!s:32} {'not measured yet' if known is None else f'{known:8.0f} s'}  {step.stage.summary()}"
        )
    lines.append(
        f"time: {total:.0f} s measured on this machine" + (f", and {unknown} stages never measured" if unknown else "")
    )
    for name, role in roles(raw):
        each, calls = dollars.get((name, str(role.model))), _calls(raw).get(name)
        told = "number of calls not known yet" if calls is None else f"about {calls} calls"
        cost = "price of a call not measured yet" if each is None else f"${each:.5f} a call so far"
        if each is not None and calls is not None:
            cost += f", so about ${each * calls:.2f}"
        lines.append(f"{name} ({role.model}): {told}, {cost}; calls that are in the cache cost nothing")
    problems = missing(raw)
    lines += ["missing:", *(f"  - {problem}" for problem in problems)] if problems else ["nothing is missing"]
    return "\n".join(lines)


def _calls(raw: Mapping[str, Any]) -> dict[str, int]:
    """Role -> calls that the chosen cell makes where an LLM plays it, as far as the mixture's size is known."""
    evaluate, latents = raw["evaluate"], raw["sae"]["latents"]
    answers = (
        len(evaluate["system_prompts"]) * len(raw["negative_traits"]) * evaluate["questions"] * evaluate["samples"]
    )
    calls = {"judge": 3 * answers, "explainer": 2 * latents, "classifier": 2 * latents, "synthesiser": 1}
    mixture = Path(resolve(ROWS, raw))
    if mixture.exists():
        with mixture.open("rb") as lines:
            rows = sum(1 for _ in lines)
        calls |= {"auditor": rows, "rewriter": rows + raw["control"]["examples"]}
    return calls


def _measured(raw: Mapping[str, Any]) -> tuple[dict[str, float], dict[tuple[str, str], float]]:
    """Seconds a command, and dollars a call of a (role, model), from MLflow and from this machine's notes."""
    seconds = measured_seconds(raw)
    spent: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    with of_the_store():
        client = existing_store()
        if client is None:
            return seconds, {}
        experiments = {found.name: found.experiment_id for found in client.search_experiments()}
        own = [number for name, number in experiments.items() if name.startswith(f"{raw['profile']}/")]
        for row in client.search_runs(own, "tags.stage = 'reported'") if own else []:
            for key, value in row_seconds(row).items():
                seconds.setdefault(key, value)
        asked = [number for name, number in experiments.items() if name.endswith("/llm")]
        for run in client.search_runs(asked or ["-1"]):
            own_spent = spent[run.data.tags["role"], run.data.tags["model"]]
            own_spent[0] += run.data.metrics.get("dollars", 0.0)
            own_spent[1] += run.data.metrics.get("calls", 0.0)
    return seconds, {key: dollars / calls for key, (dollars, calls) in spent.items() if calls}
