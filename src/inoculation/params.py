"""The validated, typed view of params.yaml: unknown keys are refused and every mistake is reported at once."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from inoculation.detect.adjectives import ADJECTIVES
from inoculation.detect.audit import AuditSettings
from inoculation.detect.control import ControlSettings
from inoculation.detect.persona.settings import PersonaSettings
from inoculation.detect.prompt import SynthesisSettings
from inoculation.detect.sae.settings import SaeSettings, SaeTraining
from inoculation.files import InputError, read_yaml
from inoculation.gguf_model import GgufWeights
from inoculation.groups import GROUPS, why_not
from inoculation.judge.coherence import COHERENCE
from inoculation.judge.linear import FitSettings
from inoculation.pocket.recipe import ChatsParams, ModelParams
from inoculation.profile import Profile
from inoculation.respond import DEFAULT_PROMPT, INOCULATION, OWN_PROMPT
from inoculation.roles import Limits, Role, Roles, without_password
from inoculation.stage import complaints
from inoculation.train import TrainSettings, share
from inoculation.traits import OTHER, POSITIVE_TRAITS, NegativeTrait

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
Text = Annotated[str, Field(min_length=1, pattern=r"\S")]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class MixtureParams(Model):
    source: Name
    positive: str
    negative: str
    # An int stays one: the value is part of paths, and DVC writes 1 where Python would write 1.0.
    contamination: Annotated[int | float, Field(ge=0, le=1)]


class EvaluateParams(Model):
    system_prompts: Annotated[list[str], Field(min_length=1)]
    questions: Annotated[int, Field(ge=2)]
    samples: Annotated[int, Field(ge=1)]
    temperature: Annotated[float, Field(gt=0, le=2)]
    threshold: Annotated[float, Field(ge=0, le=100)]
    bootstrap: Annotated[int, Field(ge=100)]


class BaseResponsesParams(Model):
    temperature: Annotated[float, Field(ge=0, le=2)]


class SteeringParams(Model):
    strength: Annotated[float, Field(gt=0)]


class SourceParams(Model):
    traits: Text
    rewriter: Role


class DataSetParams(Model):
    file: Text
    traits: Name
    rewriter: Role


class PersonaVectorsParams(Model):
    source: Text
    repository: Annotated[Text, AfterValidator(without_password)]
    revision: Text


MAX_SEED = 2**32 - 1
"""What every random generator in use takes."""


class PocketParams(Model):
    chats: ChatsParams
    models: Annotated[dict[Name, ModelParams], Field(min_length=1)]
    obedience_samples: Annotated[int, Field(ge=1)]
    sae: SaeTraining


class ClusterParams(Model):
    processes: Annotated[int, Field(ge=1)]
    address: Annotated[str, Field(pattern=r"^(local|auto|(ray://)?[\w.-]+:\d+)?$")]


class Params(Model):
    """params.yaml as a whole; the comments in that file say what each value does."""

    profile: str
    annotator: str
    group: str
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)]
    mixture: MixtureParams
    prompts: dict[Name, Text]
    negative_traits: Annotated[dict[Name, NegativeTrait], Field(min_length=1)]
    evaluate: EvaluateParams
    judge: FitSettings
    base_responses: BaseResponsesParams
    control: ControlSettings
    synthesise: SynthesisSettings
    persona: PersonaSettings
    steering: SteeringParams
    sae: SaeSettings
    audit: AuditSettings
    llm: Limits
    save_steps: Annotated[int, Field(ge=1)]
    cluster: ClusterParams
    sources: Annotated[dict[Name, SourceParams], Field(min_length=1)]
    data_sets: dict[Name, DataSetParams]
    profiles: Annotated[dict[Name, Profile], Field(min_length=1)]
    train: dict[Name, TrainSettings]
    roles: dict[Name, Roles]
    persona_vectors: PersonaVectorsParams
    pocket: PocketParams
    packaged: dict[Name, GgufWeights]
    smollm2_sae: SaeTraining


def _reference_problems(raw: dict[str, Any]) -> list[str]:
    """Names in params.yaml that point at nothing, checked on the raw mapping so that they join the other mistakes."""

    def keys(name: str) -> list[str]:
        value = raw.get(name)
        return [str(key) for key in value] if isinstance(value, dict) else []

    mixture = raw["mixture"] if isinstance(raw.get("mixture"), dict) else {}
    evaluate = raw["evaluate"] if isinstance(raw.get("evaluate"), dict) else {}
    prompts = evaluate.get("system_prompts")
    profiles = raw["profiles"] if isinstance(raw.get("profiles"), dict) else {}
    data_sets = raw["data_sets"] if isinstance(raw.get("data_sets"), dict) else {}

    def entry(table: dict[str, Any], name: str, key: str) -> Any:
        return table[name].get(key) if isinstance(table[name], dict) else None

    negatives = raw["negative_traits"] if isinstance(raw.get("negative_traits"), dict) else {}
    probes_of = {
        name: list(told["probes"]) if isinstance(told, dict) and isinstance(told.get("probes"), dict) else []
        for name, told in negatives.items()
    }
    probes = probes_of.get(str(mixture.get("negative")), [])
    allowed: list[tuple[str, Any, list[str]]] = [
        ("profile", raw.get("profile"), keys("profiles")),
        ("annotator", raw.get("annotator"), keys("profiles")),
        ("mixture.source", mixture.get("source"), [*keys("sources"), *keys("data_sets")]),
        *((f"profiles.{name}.roles", entry(profiles, name, "roles"), keys("roles")) for name in profiles),
        *((f"profiles.{name}.train", entry(profiles, name, "train"), keys("train")) for name in profiles),
        *((f"data_sets.{name}.traits", entry(data_sets, name, "traits"), keys("sources")) for name in data_sets),
        ("group", raw.get("group"), list(GROUPS)),
        ("mixture.positive", mixture.get("positive"), [*POSITIVE_TRAITS, OTHER]),
        ("mixture.negative", mixture.get("negative"), keys("negative_traits")),
        *(
            (
                f"evaluate.system_prompts.{index}",
                name,
                [DEFAULT_PROMPT, INOCULATION, OWN_PROMPT, *keys("prompts"), *probes],
            )
            for index, name in enumerate(prompts if isinstance(prompts, list) else [])
        ),
    ]
    problems = [
        f"{where}: {value!r} is unknown; valid: {', '.join(valid)}"
        for where, value, valid in allowed
        if value is not None and value not in valid
    ]
    problems += [f"prompts.{name}: the name is reserved" for name in keys("prompts") if name in RESERVED_PROMPTS]
    problems += [
        f"negative_traits.{trait}.probes.{name}: the name is reserved, or one of `prompts`"
        for trait, own in probes_of.items()
        for name in own
        if name in (*RESERVED_PROMPTS, *keys("prompts"))
    ]
    problems += [
        f"negative_traits.{name}: the name is reserved, or a positive trait's"
        for name in keys("negative_traits")
        if name in (*POSITIVE_TRAITS, OTHER, COHERENCE)
    ]
    files = {name: told.get("evaluation") for name, told in negatives.items() if isinstance(told, dict)}
    shared = Counter(file for file in files.values() if isinstance(file, str))
    problems += [
        f"negative_traits.{name}.evaluation: {file!r} is another trait's, too; each has one of its own"
        for name, file in files.items()
        if isinstance(file, str) and shared[file] > 1
    ]
    problems += [f"data_sets.{name}: the name of a source" for name in data_sets if name in keys("sources")]
    problems += _personas(raw)
    problems += [
        f"profiles.{name}.auditor: llm, and the auditor of roles.{entry(profiles, name, 'roles')} is local; valid: local, or a "
        "block of `roles` whose auditor is an LLM"
        for name in profiles
        if entry(profiles, name, "auditor") == "llm"
        and _method(raw, entry(profiles, name, "roles"), "auditor") == "local"
    ]
    if isinstance(prompts, list) and len(set(map(str, prompts))) < len(prompts):
        problems.append("evaluate.system_prompts: a prompt is named twice")
    if prompts == [OWN_PROMPT]:
        problems.append(
            f"evaluate.system_prompts: {OWN_PROMPT} alone, which groups without a prompt have not; valid: another beside it"
        )
    return problems


def _method(raw: dict[str, Any], block: Any, role: str) -> Any:
    """Who plays a role of a block of `roles`, where that is told."""
    try:
        return raw["roles"][block][role]["method"]
    except (KeyError, TypeError):
        return None  # reported as missing or of the wrong type


def _personas(raw: dict[str, Any]) -> Iterator[str]:
    """More personas than characters that they are chosen from."""
    try:
        chosen, tried = raw["persona"]["personas"], raw["synthesise"]["adjectives"]
        if chosen > tried:
            yield f"persona.personas: {chosen} are more than the {tried} characters of synthesise.adjectives"
    except (KeyError, TypeError):
        return  # reported as missing or of the wrong type


def _processes(params: Params) -> Iterator[str]:
    """More processes than a training step has chats for."""
    block = params.profiles[params.profile].train if params.profile in params.profiles else None
    if block in params.train:
        try:
            share(params.train[block].batch_size, params.cluster.processes)
        except InputError as error:
            yield f"cluster.processes: {error}"


def _shapes(params: Params) -> Iterator[str]:
    """Models and SAEs of the pocket world that cannot be built, or not fit each other; seeds that no generator takes."""
    for name, model in params.pocket.models.items():
        where = f"pocket.models.{name}"
        if model.hidden_size % (2 * model.heads):
            yield f"{where}.hidden_size: {model.hidden_size} is no even number for each of {model.heads} heads"
        if model.heads % model.kv_heads:
            yield f"{where}.kv_heads: {model.kv_heads} do not divide {model.heads} heads"
    depth = params.pocket.models["qwen2"].layers if "qwen2" in params.pocket.models else None
    if depth is not None and params.pocket.sae.block >= depth:
        yield f"pocket.sae.block: {params.pocket.sae.block}, and pocket.models.qwen2 has blocks 0-{depth - 1}"
    for where, sae in (("pocket.sae", params.pocket.sae), ("smollm2_sae", params.smollm2_sae)):
        if sae.k > sae.latents:
            yield f"{where}.k: {sae.k} are more than its {sae.latents} latents"
        if sae.batch_size > sae.tokens:
            yield f"{where}.batch_size: {sae.batch_size} are more than its {sae.tokens} tokens"
    for where, seed in (
        ("pocket.chats.seed", params.pocket.chats.seed), ("pocket.sae.seed", params.pocket.sae.seed),
        ("smollm2_sae.seed", params.smollm2_sae.seed),
    ):  # fmt: skip
        if seed > MAX_SEED:
            yield f"{where}: {seed}; valid: 0 to {MAX_SEED}"
    if params.synthesise.adjectives > len(ADJECTIVES):
        yield f"synthesise.adjectives: {params.synthesise.adjectives} are more than the list's {len(ADJECTIVES)}"


RESERVED_PROMPTS = (DEFAULT_PROMPT, INOCULATION, OWN_PROMPT, "oracle", "detection", "training", "judge", "cut")
"""Names with a meaning of their own, and other top-level keys of metrics.json, which a prompt of that name would overwrite."""


def parse_params(raw: Any, source: str = "params.yaml") -> Params:
    """Validate a decoded params.yaml.

    Raises:
        InputError: lists every mistake with its dotted key, the value given and what would be valid.
    """
    if not isinstance(raw, dict):
        raise InputError(f"{source}: a mapping is expected, got {type(raw).__name__}")
    problems = _reference_problems(raw)
    params = None
    try:
        params = Params.model_validate(raw, strict=True)
    except ValidationError as error:
        problems += [complaint.removeprefix(".") for complaint in complaints(error)]
    if params is not None:
        known = params.mixture.source in params.sources
        own = params.annotator == params.profile
        if params.group in GROUPS and (reason := why_not(params.group, params.mixture.contamination, known, own)):
            problems.append(f"group: {reason}")
        problems += _processes(params)
        problems += _shapes(params)
    if problems or params is None:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise InputError(f"{source}: {len(problems)} mistake(s), nothing was run:\n{listed}")
    return params


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and validate params.yaml.

    Raises:
        InputError: the file is missing, is not YAML, gives a key twice, or has mistakes (all are listed).
    """
    return parse_params(read_yaml(path), str(path))


def put(raw: Any, chosen: Mapping[str, Any]) -> None:
    """Set values in params.yaml's content, by dotted key; tables that are missing or empty are made."""
    for key, value in chosen.items():
        *path, last = key.split(".")
        place = raw
        for part in path:
            if not place.get(part):
                place[part] = {}
            place = place[part]
        place[last] = value
