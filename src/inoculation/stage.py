"""What a stage is: a class that declares all it reads and writes, and gets nothing else.

    class Train(Stage):
        "LoRA SFT on the response tokens of the group's training chats"

        command, pipeline = "train", ""                                  # dvc.yaml at the root
        seed: Annotated[int, Param("seed")]                              # a value of params.yaml
        settings: Annotated[TrainSettings, Reads(f"{PROFILE}/train.json")]   # a JSON file, validated
        chats: Annotated[Path, Reads(f"{CELL}/assign/${{group}}/chats.jsonl")]
        adapter: Annotated[Path, Writes(f"{CELL}/${{group}}/adapter")]

        def run(self) -> None: ...

One declaration serves three readers: `run` finds validated values and paths in its attributes; `pipelines` writes the
dvc.yaml files from it, with every module that the stage imports (`code`); `plan` walks from a cell to the stages that it
needs. Paths hold `${...}` exactly as DVC does, so that both resolve the same text.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from inoculation.files import InputError, fail_if, read_json, read_yaml

PARAMS = Path("params.yaml")


class Param(NamedTuple):
    """A value of params.yaml, by its dotted key; an empty key is the whole file."""

    key: str
    identity: bool = True
    """False: it moves rounding errors or random draws (a batch size), and does not make another experiment."""
    tracked: bool = True
    """False: it cannot change what comes out (how often to save), and DVC does not track it."""


class Reads(NamedTuple):
    """A file or folder; a field that is no `Path` gets the JSON file's content, validated."""

    path: str
    identity: bool = True
    """As in `Param`, for settings that are read from a file."""


class Writes(NamedTuple):
    """A file or folder that the stage makes, whole or not at all."""

    path: str
    kind: str = "outs"
    """`outs`, `metrics` or `plots`: the section of dvc.yaml."""


class Each(NamedTuple):
    """One stage for each of several names, which the command gets as its argument."""

    argument: str
    """Name of the field that holds it."""
    of: tuple[str, ...] | str
    """The names, or `${table}`: the keys of a table in params.yaml, whose entry is `${item...}`."""


class Field(NamedTuple):
    """A declared field."""

    name: str
    type: Any
    marker: Param | Reads | Writes


def lookup(raw: Any, key: str) -> Any:
    """The value at a dotted key.

    Raises:
        InputError: there is none.
    """
    value = raw
    for part in key.split(".") if key else ():
        if not isinstance(value, Mapping) or part not in value:
            raise InputError(f"params.yaml: {key} is missing")
        value = value[part]
    return value


def resolve(text: str, raw: Mapping[str, Any]) -> str:
    """Fill `${dotted.key}` as DVC does."""
    return re.sub(r"\$\{([\w.]+)\}", lambda found: str(lookup(raw, found[1])), text)


class Stage(BaseModel):
    """Base of all stages; see the module's text."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, protected_namespaces=())

    command: ClassVar[str]
    """The subcommand of `inoculation`."""
    pipeline: ClassVar[str]
    """Folder in pipelines/; empty: the root's dvc.yaml."""
    each: ClassVar[Each | None] = None
    expensive: ClassVar[bool] = False
    """Whether what the cell still needs is looked for once more before it runs."""
    always: ClassVar[bool] = False
    """Whether DVC runs it in every `dvc repro`."""

    def run(self) -> None:
        """Read the inputs, call the library, write the outputs."""
        raise NotImplementedError

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0].rstrip(".")

    @classmethod
    def fields(cls) -> Iterator[Field]:
        """The declared fields, in their order."""
        for name, info in cls.model_fields.items():
            bounds = [item for item in info.metadata if not isinstance(item, (Param, Reads, Writes))]
            for marker in info.metadata:
                if isinstance(marker, (Param, Reads, Writes)):
                    yield Field(name, Annotated[info.annotation, *bounds] if bounds else info.annotation, marker)

    @classmethod
    def scope(cls, raw: Mapping[str, Any], argument: str | None) -> dict[str, Any]:
        """What `${...}` in the declarations can name: params.yaml, and `item` and `key` of an `each`."""
        scope = dict(raw)
        if cls.each and argument is not None:
            if isinstance(cls.each.of, str):
                table = lookup(raw, cls.each.of[2:-1])
                if argument not in table:
                    valid = ", ".join(table)
                    raise InputError(f"{cls.command}: {cls.each.argument} {argument!r} is unknown; valid: {valid}")
                scope |= {"key": argument, "item": table[argument]}
            elif argument not in cls.each.of:
                valid = ", ".join(cls.each.of)
                raise InputError(f"{cls.command}: {cls.each.argument} {argument!r} is unknown; valid: {valid}")
            else:
                scope |= {"item": argument}
        return scope

    @classmethod
    def load(cls, argument: str | None = None, raw: Mapping[str, Any] | None = None) -> "Stage":
        """The stage with its values and paths, from params.yaml of the current folder.

        Raises:
            InputError: a parameter or a settings file is missing or invalid (all are listed).
        """
        raw = read_yaml(PARAMS) if raw is None else raw
        scope = cls.scope(raw, argument)
        values: dict[str, Any] = {cls.each.argument: argument} if cls.each else {}
        problems: list[str] = []
        for field in cls.fields():
            try:
                where = resolve(field.marker[0], scope)
                values[field.name] = cls._value(field, where, scope)
            except ValidationError as error:
                problems += [f"{where}{complaint}" for complaint in complaints(error)]
            except InputError as error:
                problems.append(str(error))
        fail_if(problems, f"{cls.command}: {len(problems)} mistake(s), nothing was run")
        return cls.model_construct(**values)

    @staticmethod
    def _value(field: Field, where: str, scope: Mapping[str, Any]) -> Any:
        if isinstance(field.marker, Param):
            return TypeAdapter(field.type).validate_python(lookup(scope, where))
        if field.type is Path:
            return Path(where)
        # An annotator's folder may hold what another profile made: it is read as it is.
        return TypeAdapter(field.type).validate_python(read_json(Path(where)))


def complaints(error: ValidationError) -> Iterator[str]:
    """`.key: what is wrong (given: value)` for each mistake pydantic saw."""
    for item in error.errors():
        where = "".join(f".{part}" for part in item["loc"])
        given = "" if item["type"] in ("missing", "extra_forbidden") else f" (given: {item['input']!r})"
        message = "unknown parameter" if item["type"] == "extra_forbidden" else item["msg"]
        yield f"{where}: {message}{given}"
