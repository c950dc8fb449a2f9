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


TERMINAL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal obeys instead of showing it, what turns the direction of writing, and halves of characters."""


def printable(text: str) -> str:
    """Text for a terminal: what would steer it is spelled out, `\\x1b` for an escape. Lines and tabs stay."""
    return TERMINAL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD)(_\d+)?$", re.IGNORECASE)
"""How variables of the environment are named whose value is nobody else's business."""


def scrub(text: str) -> str:
    """Text without any secret of the environment, and without the user and password of an address."""
    secrets = {value for name, value in os.environ.items() if SECRET.search(name) and len(value) >= 6}
    for value in sorted(secrets, key=len, reverse=True):
        text = text.replace(value, "***")
    return re.sub(r"(?<=://)[^\s/@'\"]+@", "***@", text)


MAX_MESSAGE, MAX_REPORTED, MAX_PROBLEM = 16_000, 20, 500
"""Characters of one error message; how many mistakes it lists before it only counts the rest; characters of each."""
MAX_PROBLEMS = 1000
"""Mistakes after which a file is read no further."""
MAX_LINE = 2**24
"""Bytes of one line of JSONL: some million words."""
MAX_YAML, MAX_VALUES = 2**18, 100_000
"""Bytes of a YAML file, and values in it, each alias counted in full: nine lines of aliases can stand for a billion."""


ENDLESS = re.compile(r"(?i)\.(inf|nan)$|[e]\+?\d{3}")
"""Floats of YAML that are none, or beyond any."""
MAX_DIGITS = 1000
"""Of a whole number in YAML: Python writes none of more than 4,300, and hexadecimal ones read longer."""


class InputError(ValueError):
    """Something the user gave is wrong. The message says what, where, and what would be valid."""

    def __init__(self, message: str) -> None:
        """The message may quote what it complains of: it holds no secret, is cut, and made fit for a terminal."""
        own = scrub(message)
        super().__init__(printable(own if len(own) <= MAX_MESSAGE else f"{own[:MAX_MESSAGE]} ..."))


def _cut(problem: str) -> str:
    return problem if len(problem) <= MAX_PROBLEM else f"{problem[:MAX_PROBLEM]} ..."


def fail_if(problems: list[str], what: str) -> None:
    """Raise one `InputError` that lists all the problems, or return when there are none."""
    if problems:
        shown = "\n".join(f"  - {_cut(problem)}" for problem in problems[:MAX_REPORTED])
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
        if error.errno is not None and not error.filename:
            error.filename = str(path)  # a full disk does not say what it was full for
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


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON; a missing one is null")


JSON = json.JSONDecoder(parse_constant=_no_number)
UNWRITABLE = re.compile(r"\\u|[eE]\+?\d{3}|\d{309}")
"""Where a text of JSON may hold half of a character, or a number beyond any float."""


def decode(content: bytes) -> Any:
    """The value of some JSON, which can be written again as it is.

    Raises:
        ValueError: not UTF-8, not JSON, nested too deeply to be read, a number that is none or infinite, or half of a
            character (a lone surrogate, which JSON can spell and no file or tokenizer takes).
    """
    text = content.decode("utf-8-sig")
    try:
        value = JSON.decode(text)
        if UNWRITABLE.search(text):
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
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
        return decode(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder, a JSON file is expected") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None


def read_yaml(path: Path) -> Any:
    """Read a YAML file as DVC reads it: 1e-05 is a number (in YAML 1.1, PyYAML's, it needs a point).

    Raises:
        InputError: the file is missing, is not YAML, gives a key twice (YAML forbids it, PyYAML takes the last), holds half
            of a character, or is larger than any settings are (`MAX_YAML`, `MAX_VALUES`).
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+\Z"), list("-+.0123456789")
    )
    problems: list[str] = []
    sizes: dict[int, int] = {}

    def size(node: Any, above: str = "") -> int:
        """How many values a node stands for. Mistakes in it are noted, once however many aliases it has."""
        if id(node) in sizes:
            return sizes[id(node)]
        sizes[id(node)] = MAX_VALUES  # until it is known: what holds itself has no end
        values = 1
        line = node.start_mark.line + 1
        where = f"line {line}: {above[:-1]}: " if above else f"line {line}: "
        if isinstance(node, yaml.ScalarNode):
            if re.search("[\ud800-\udfff]", node.value):
                problems.append(f"{where}half of a character")
            elif node.tag == "tag:yaml.org,2002:int" and len(node.value) > MAX_DIGITS:
                problems.append(f"{where}a number of more than {MAX_DIGITS} digits")
            elif node.tag == "tag:yaml.org,2002:float" and ENDLESS.search(node.value):
                problems.append(f"{where}{node.value} is no number that anything here can be")
        elif isinstance(node, yaml.SequenceNode):
            values += sum(size(item, f"{above}{index}.") for index, item in enumerate(node.value))
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                values += size(key, above)
                name, line = str(key.value) if isinstance(key, yaml.ScalarNode) else "", key.start_mark.line + 1
                if name in lines:
                    problems.append(f"line {line}: {above}{name} is given already in line {lines[name]}")
                lines.setdefault(name, line)
                values += size(value, f"{above}{name}.")
        sizes[id(node)] = values
        return values

    try:
        with path.open("rb") as file:
            content = file.read(MAX_YAML + 1)
        if len(content) > MAX_YAML:
            raise ValueError(f"more than {MAX_YAML} bytes")
        loader = Loader(content.decode("utf-8"))
        node = loader.get_single_node()
        if node and size(node) > MAX_VALUES:
            raise ValueError(f"with its aliases it holds more than {MAX_VALUES} values")
        value = loader.construct_document(node) if node else None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run from the project's folder") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder, a YAML file is expected") from None
    # PyYAML's constructors let through what they happen to meet: a 13th month, `!!bool x`, `!!int ""`, `!!timestamp x`.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
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
        InputError: the file is missing, or any line is malformed (the first `MAX_PROBLEMS` are counted), or longer than
            `MAX_LINE`: nothing behind it is read.
    """
    rows: list[T] = []
    problems: list[str] = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE + 1), b""), start=1):
                if len(line) > MAX_LINE:
                    problems.append(f"{path}:{number}: longer than {MAX_LINE} bytes, read no further")
                    break
                if len(problems) == MAX_PROBLEMS:
                    problems.append(f"{path}:{number}: read no further")
                    break
                if not line.strip():
                    continue
                try:
                    rows.append(parse(decode(line)))
                except json.JSONDecodeError as error:
                    problems.append(f"{path}:{number}: not valid JSON: {error.msg} at column {error.colno}")
                except ValueError as error:
                    problems.append(_cut(f"{path}:{number}: {error}"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder, a JSONL file is expected") from None
    fail_if(problems, f"{len(problems)} bad line(s)")
    return rows
