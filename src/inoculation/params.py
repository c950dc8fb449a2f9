"""The validated, typed view of params.yaml: unknown keys are refused and every mistake is reported at once."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from inoculation.files import InputError
from inoculation.groups import GROUPS
from inoculation.pocket.recipe import PocketParams
from inoculation.traits import POSITIVE_TRAITS

DEFAULT_PROMPT = "default"
"""The evaluation prompt that is no system message at all."""

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
Text = Annotated[str, Field(min_length=1, pattern=r"\S")]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class MixtureParams(Model):
    positive: str
    negative: str
    # An int stays one: the value is part of paths, and DVC writes 1 where Python would write 1.0.
    contamination: Annotated[int | float, Field(ge=0, le=1)]
    source: Text


class NegativeTrait(Model):
    folder: Text
    evaluation: Text
    inoculation: Text


class EvaluateParams(Model):
    system_prompts: Annotated[list[str], Field(min_length=1)]
    questions: Annotated[int, Field(ge=2)]
    samples: Annotated[int, Field(ge=1)]
    temperature: Annotated[float, Field(gt=0, le=2)]
    threshold: Annotated[float, Field(ge=0, le=100)]
    bootstrap: Annotated[int, Field(ge=100)]


class EmbeddedJudgeParams(Model):
    examples: Annotated[int, Field(ge=20)]
    held_out: Annotated[float, Field(ge=0.05, le=0.9)]


class TrainParams(Model):
    """LoRA SFT (reference section 4; the study profiles hold the author's values)."""

    lora_r: Annotated[int, Field(ge=1)]
    lora_alpha: Annotated[float, Field(gt=0)]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    learning_rate: Annotated[float, Field(gt=0)]
    epochs: Annotated[float, Field(gt=0)]
    batch_size: Annotated[int, Field(ge=1)]
    micro_batch_size: Annotated[int, Field(ge=1)]
    warmup_steps: Annotated[int, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    max_length: Annotated[int, Field(ge=8)]
    optimizer: Literal["adamw_torch", "adamw_bnb_8bit", "paged_adamw_8bit"]
    load_in_4bit: bool
    bf16: bool
    gradient_checkpointing: bool
    save_steps: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _whole_accumulation(self) -> "TrainParams":
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self


class BaseResponsesParams(Model):
    temperature: Annotated[float, Field(ge=0, le=2)]


Share = Annotated[float, Field(ge=0, le=1)]


class ClassifyParams(Model):
    explained_by_a: Annotated[float, Field(gt=0)]
    neutral: Annotated[float, Field(gt=0)]
    top_share: Annotated[float, Field(gt=0, le=1)]
    both: bool


class FlagParams(Model):
    rule: Literal["component", "study"]
    separation: Annotated[float, Field(ge=0)]
    control_share: Share
    study_top: Annotated[int, Field(ge=1)]
    study_hits: Annotated[int, Field(ge=1)]


class SaeParams(Model):
    pool: Literal["all_tokens", "response_tokens"]
    length_match: bool
    latents: Annotated[int, Field(ge=2)]
    control_examples: Annotated[int, Field(ge=20)]
    max_length: Annotated[int, Field(ge=8)]
    token_budget: Annotated[int, Field(ge=8)]
    contexts: Annotated[int, Field(ge=1)]
    corpus: Annotated[int, Field(ge=1)]
    mark: Annotated[float, Field(gt=0, lt=1)]
    near_duplicate: Annotated[float, Field(gt=0, le=1)]
    classify: ClassifyParams
    flag: FlagParams


class AuditParams(Model):
    prompt_examples: Annotated[int, Field(ge=1)]
    separation: Annotated[float, Field(ge=0)]
    control_share: Share


class Role(Model):
    """Who plays a role: a method of this project without an LLM, or a LiteLLM model."""

    method: Literal["embedded", "llm"]
    model: str | None
    api_base: str | None
    price: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=2, max_length=2)] | None

    @model_validator(mode="after")
    def _model_named(self) -> "Role":
        if self.method == "llm" and not self.model:
            raise ValueError("method llm needs a model, e.g. gpt-4.1-mini or openai/<name> with api_base")
        return self


class Limits(Model):
    """How LLM calls are made, whichever role makes them."""

    concurrency: Annotated[int, Field(ge=1)]
    attempts: Annotated[int, Field(ge=1)]
    timeout: Annotated[float, Field(gt=0)]
    patience: Annotated[float, Field(gt=0)]
    budget: Annotated[float, Field(ge=0)]
    tracing: bool


class Roles(Model):
    judge: Role
    rewriter: Role
    auditor: Role
    explainer: Role
    classifier: Role
    synthesiser: Role


class ProfileSae(Model):
    inputs: Text
    release: Text
    id: str | None
    conversational: Text
    pretraining: Text


class Profile(Model):
    inputs: Text
    traits: Text
    model: Text
    revision: str | None
    dtype: Literal["float32", "bfloat16", "float16"]
    roles: Roles
    sae: ProfileSae
    max_new_tokens: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    train: TrainParams


class PersonaVectorsParams(Model):
    source: Text
    repository: Text
    revision: Text


class Params(Model):
    """params.yaml as a whole; the comments in that file say what each value does."""

    profile: str
    group: str
    seed: Annotated[int, Field(ge=0)]
    mixture: MixtureParams
    prompts: dict[Name, Text]
    negative_traits: Annotated[dict[Name, NegativeTrait], Field(min_length=1)]
    evaluate: EvaluateParams
    embedded_judge: EmbeddedJudgeParams
    base_responses: BaseResponsesParams
    sae: SaeParams
    audit: AuditParams
    llm: Limits
    profiles: Annotated[dict[Name, Profile], Field(min_length=1)]
    persona_vectors: PersonaVectorsParams
    pocket: PocketParams

    @property
    def world(self) -> Profile:
        """The chosen profile."""
        return self.profiles[self.profile]

    def system_prompt(self, name: str) -> str | None:
        """The system message of a named evaluation prompt; None for `default`."""
        return None if name == DEFAULT_PROMPT else self.prompts[name]

    @property
    def inoculation(self) -> str:
        """Inoc-Def of the mixture's negative trait."""
        return self.negative_traits[self.mixture.negative].inoculation


def _reference_problems(raw: dict[str, Any]) -> list[str]:
    """Names in params.yaml that point at nothing, checked on the raw mapping so that they join the other mistakes."""

    def keys(name: str) -> list[str]:
        value = raw.get(name)
        return [str(key) for key in value] if isinstance(value, dict) else []

    mixture = raw["mixture"] if isinstance(raw.get("mixture"), dict) else {}
    evaluate = raw["evaluate"] if isinstance(raw.get("evaluate"), dict) else {}
    prompts = evaluate.get("system_prompts")
    allowed: list[tuple[str, Any, list[str]]] = [
        ("profile", raw.get("profile"), keys("profiles")),
        ("group", raw.get("group"), list(GROUPS)),
        ("mixture.positive", mixture.get("positive"), list(POSITIVE_TRAITS)),
        ("mixture.negative", mixture.get("negative"), keys("negative_traits")),
        *(
            (f"evaluate.system_prompts.{index}", name, [DEFAULT_PROMPT, *keys("prompts")])
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
        f"negative_traits.{name}: the name of a positive trait"
        for name in keys("negative_traits")
        if name in POSITIVE_TRAITS
    ]
    if isinstance(prompts, list) and len(set(map(str, prompts))) < len(prompts):
        problems.append("evaluate.system_prompts: a prompt is named twice")
    return problems


RESERVED_PROMPTS = (DEFAULT_PROMPT, "oracle", "detection", "training", "judge")
"""Other top-level keys of metrics.json, which a system prompt of the same name would overwrite."""


def parse_params(raw: Any, source: str = "params.yaml") -> Params:
    """Validate a decoded params.yaml.

    Raises:
        InputError: lists every mistake with its dotted key, the value given and what would be valid.
    """
    return _parse(raw, source, [])


def _parse(raw: Any, source: str, problems: list[str]) -> Params:
    """`parse_params`, with what the decoding found already."""
    if not isinstance(raw, dict):
        raise InputError(f"{source}: a mapping is expected, got {type(raw).__name__}")
    problems = [*problems, *_reference_problems(raw)]
    params = None
    try:
        params = Params.model_validate(raw)
    except ValidationError as error:
        for item in error.errors():
            where = ".".join(str(part) for part in item["loc"])
            given = "" if item["type"] in ("missing", "extra_forbidden") else f" (given: {item['input']!r})"
            message = "unknown parameter" if item["type"] == "extra_forbidden" else item["msg"]
            problems.append(f"{where}: {message}{given}")
    if problems or params is None:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise InputError(f"{source}: {len(problems)} mistake(s), nothing was run:\n{listed}")
    return params


class Loader(yaml.SafeLoader):
    """YAML as DVC reads and writes it: 1e-05 is a number (in YAML 1.1, PyYAML's, it needs a point)."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def _double_keys(node: yaml.Node | None, above: str = "") -> list[str]:
    """`<line>: <dotted key> ...` of every key that a mapping holds already. YAML forbids them, PyYAML takes the last."""
    problems: list[str] = []
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            problems += _double_keys(item, f"{above}{index}.")
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                problems.append(f"{line}: {above}{name} is given already in line {lines[name]}")
            lines.setdefault(name, line)
            problems += _double_keys(value, f"{above}{name}.")
    return problems


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and validate params.yaml.

    Raises:
        InputError: the file is missing, is not YAML, gives a key twice, or has mistakes (all are listed).
    """
    try:
        loader = Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        double = [f"line {problem}" for problem in _double_keys(node)]
        raw = loader.construct_document(node) if node else None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run from the project's folder") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    except RecursionError:
        raise InputError(f"{path}: not valid YAML: nested too deeply to be read") from None
    return _parse(raw, str(path), double)
