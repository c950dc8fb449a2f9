"""Reading and writing the project's files: JSONL with line numbers in every complaint, and atomic writes."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, TypeVar

T = TypeVar("T")


class InputError(ValueError):
    """Something the user gave is wrong. The message says what, where, and what would be valid."""


MAX_REPORTED = 20
"""How many mistakes one error message lists before it only counts the rest."""


def fail_if(problems: list[str], what: str) -> None:
    """Raise one `InputError` that lists all the problems, or return when there are none."""
    if problems:
        shown = "\n".join(f"  - {problem}" for problem in problems[:MAX_REPORTED])
        rest = len(problems) - MAX_REPORTED
        raise InputError(f"{what}:\n{shown}" + (f"\n  ... and {rest} more" if rest > 0 else ""))


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, moved there when the block ends well and deleted when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as handle:
        temporary = Path(handle.name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say what it was full for
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target` that replaces it when the block ends well and is deleted when it does not."""
    staging = target.with_name(f".{target.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        if target.exists():
            shutil.rmtree(target)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN is refused: a missing number is `null`."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def _decode(content: bytes) -> Any:
    """The value of some JSON, all of whose texts can be written again.

    Raises:
        ValueError: not UTF-8, not JSON, nested too deeply to be read, or half of a character (a lone surrogate, which
            JSON can spell and no file or tokenizer takes).
    """
    text = content.decode("utf-8-sig")
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply to be read") from None
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"{half} alone is half of a character; write both halves, or the character itself") from None
    return value


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: the file is missing or is not JSON; the message has the line and column.
    """
    try:
        return _decode(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder, a JSON file is expected") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None


def read_yaml(path: Path) -> Any:
    """Read a YAML file as DVC reads it: 1e-05 is a number (in YAML 1.1, PyYAML's, it needs a point).

    Raises:
        InputError: the file is missing, is not YAML, or gives a key twice (YAML forbids it, PyYAML takes the last).
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+\Z"), list("-+.0123456789")
    )

    def double(node: Any, above: str = "") -> Iterator[str]:
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                yield from double(item, f"{above}{index}.")
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                name, line = str(key.value), key.start_mark.line + 1
                if name in lines:
                    yield f"line {line}: {above}{name} is given already in line {lines[name]}"
                lines.setdefault(name, line)
                yield from double(value, f"{above}{name}.")

    try:
        loader = Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        problems = list(double(node))
        value = loader.construct_document(node) if node else None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run from the project's folder") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    except RecursionError:
        raise InputError(f"{path}: not valid YAML: nested too deeply to be read") from None
    fail_if(problems, f"{path}: {len(problems)} mistake(s), nothing was run")
    return value


def read_jsonl(path: Path, parse: Callable[[Any], T]) -> list[T]:
    """Read one object a line and parse each, collecting every bad line before failing.

    Args:
        path: a UTF-8 file; blank lines are skipped.
        parse: turns the decoded line into a `T`; a `ValueError` it raises is reported with its file and line.

    Raises:
        InputError: the file is missing, or any line is malformed (all of them are listed).
    """
    rows: list[T] = []
    problems: list[str] = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    rows.append(parse(_decode(line)))
                except json.JSONDecodeError as error:
                    problems.append(f"{path}:{number}: not valid JSON: {error.msg} at column {error.colno}")
                except ValueError as error:
                    problems.append(f"{path}:{number}: {error}")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder, a JSONL file is expected") from None
    fail_if(problems, f"{len(problems)} bad line(s)")
    return rows
