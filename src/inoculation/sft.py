"""SFT data sets as people have them: chat JSONL, ShareGPT, Alpaca, prompt and completion; JSON, Parquet, a `datasets` folder."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from inoculation.files import MAX_PROBLEMS, InputError, fail_if, read_json, read_jsonl
from inoculation.mixture import Row, enough, parse_row

SHAREGPT = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
"""Who speaks in ShareGPT's `from`."""
MAX_TABLE, ROW = 2**31, 2**10
"""Bytes of a table once it is unpacked, and what a row costs whatever it holds: a column of one text packs to nothing."""


def read_sft(path: Path) -> list[Row]:
    """Read a data set; its form is recognised by its ending and its records' keys.

    Args:
        path: `.jsonl`, `.json` (a list), `.parquet`, or a folder saved by `datasets` (one split, or one named `train`).

    Raises:
        InputError: no such file, of no known form, malformed records (all are listed, with their line or place), or fewer
            than `mixture.MIN_ROWS`.
    """
    form = "folder" if path.is_dir() else path.suffix.lower()
    if form in ("folder", ".parquet"):
        rows = _parsed(path, _table(path))
    elif form == ".json":
        try:
            records = read_json(path)
        except InputError as error:
            hint = "; a record a line is a .jsonl" if "Extra data" in str(error) else ""
            raise InputError(f"{error}{hint}") from None
        if not isinstance(records, list):
            raise InputError(f"{path}: a list of records is expected, got {type(records).__name__}")
        rows = _parsed(path, iter(records))
    elif form == ".jsonl":
        if path.is_file() and _begins_a_list(path):
            raise InputError(f"{path}: a list of records is a .json; a .jsonl has a record a line")
        rows = read_jsonl(path, parse_record)
    else:
        raise InputError(
            f"{path}: {form or 'no ending'}; valid: .jsonl, .json (a list), .parquet, or a folder of `datasets`"
        )
    return enough(path, rows)


def _begins_a_list(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1024).lstrip()[:1] == b"["


def _parsed(path: Path, records: Iterator[Any]) -> list[Row]:
    rows, problems = [], []
    for number, record in enumerate(records, start=1):
        if len(problems) == MAX_PROBLEMS:
            problems.append(f"{path}: record {number}: read no further")
            break
        try:
            rows.append(parse_record(record))
        except ValueError as error:
            problems.append(f"{path}: record {number}: {error}")
    fail_if(problems, f"{len(problems)} bad record(s)")
    return rows


def _table(path: Path) -> Iterator[Any]:
    """The records of a Parquet file or of a folder that `datasets` saved, with the columns that a record may have.

    As Arrow has them: `datasets` would decode what a table calls an image or a sound, and fetch it from the address there.
    """
    read = 0
    try:
        for batch in _batches(path):
            # Before its size is read: what Arrow maps into memory it believes, and bounds may lie anywhere.
            batch.validate(full=True)
            read += batch.nbytes + ROW * batch.num_rows
            if read > MAX_TABLE:
                raise InputError(f"{path}: more than {MAX_TABLE} bytes once it is unpacked")
            yield from batch.to_pylist()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, or a folder that was not saved by `datasets`") from None
    except (InputError, MemoryError):
        raise
    except Exception as error:  # `datasets` wraps what a damaged file raises in exceptions of its own
        raise InputError(f"{path}: cannot be read: {error.__cause__ or error}") from None


BATCH = 64
"""Rows of a table that are unpacked at once."""


def _batches(path: Path) -> Iterator[Any]:
    """Arrow's tables or batches of it."""
    if path.is_dir():
        from datasets import DatasetDict, load_from_disk

        found = load_from_disk(str(path))
        if isinstance(found, DatasetDict):
            if "train" not in found and len(found) != 1:
                raise InputError(
                    f"{path}: splits {', '.join(found)}; one is expected, or one named `train`: save the one that you mean"
                )
            found = found["train"] if "train" in found else next(iter(found.values()))
        columns = [name for name in found.column_names if name in COLUMNS] or found.column_names
        yield from found.select_columns(columns).with_format("arrow").iter(BATCH)
    else:
        from pyarrow.parquet import ParquetFile

        with ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in COLUMNS] or None
            yield from file.iter_batches(BATCH, columns=columns)


def parse_record(raw: Any) -> Row:
    """One record, of whichever form.

    Raises:
        ValueError: of no known form, or no valid chat.
    """
    if not isinstance(raw, dict):
        raise ValueError("an object is expected")
    for keys, convert in FORMS:
        # A table has every key in every record, null where there is none.
        if all(raw.get(key) is not None for key in keys):
            messages = convert(raw)
            _refuse_what_would_be_lost(raw, messages)
            if raw.get("system"):
                messages = [{"role": "system", "content": raw["system"]}, *messages]
            return parse_row({"messages": messages, "source_dataset": raw.get("source_dataset")})
    known = "; ".join(" and ".join(f'"{key}"' for key in keys) for keys, _ in FORMS)
    raise ValueError(f"a record has one of these: {known}; this one has {', '.join(map(str, raw)) or 'nothing'}")


def _refuse_what_would_be_lost(raw: dict[str, Any], messages: Sequence[Any]) -> None:
    """Nothing of a record goes without a word.

    Raises:
        ValueError: earlier turns as Alpaca's `history`, calls of tools, thoughts, or a turn that is not to be trained on.
    """
    held = [key for key in LOST if raw.get(key)]
    turns = [turn for turn in messages if isinstance(turn, dict)]
    marks = {key for key, _ in NOT_TRAINED}
    held += [key for turn in turns for key in turn if key not in KEPT | marks and turn[key]]
    held += [key for key, no in NOT_TRAINED if any(turn.get(key) == no for turn in turns)]
    if raw.get("label") is False:  # of an answer that preference training pushes away from
        held.append("label")
    if held:
        named = ", ".join(f'"{key}"' for key in dict.fromkeys(held))
        raise ValueError(
            f"{named}: would be lost, what comes out has roles and texts alone; take it, or such records, out first"
        )


def _messages(raw: dict[str, Any]) -> list[Any]:
    # A table has every key in every message, null where there is none.
    if not isinstance(raw["messages"], list):
        raise ValueError('"messages" must be a non-empty list')
    return [{k: v for k, v in m.items() if v is not None} if isinstance(m, dict) else m for m in raw["messages"]]


def _conversations(raw: dict[str, Any]) -> list[Any]:
    turns = raw["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError('"conversations" must be a list of objects')
    if unknown := sorted(
        {str(turn["from"]) for turn in turns if turn.get("from") and str(turn["from"]) not in SHAREGPT}
    ):
        raise ValueError(f'"from" is {", ".join(map(repr, unknown))}; valid: {", ".join(SHAREGPT)}')
    return [
        {**turn, "role": SHAREGPT[str(turn["from"])], "content": turn.get("value")} if turn.get("from") else turn
        for turn in turns
    ]  # fmt: skip


def _instruction(raw: dict[str, Any]) -> list[Any]:
    asked = [raw["instruction"], raw.get("input") or ""]
    if not all(isinstance(part, str) for part in asked):
        raise ValueError('"instruction" and "input" must be texts')
    question = "\n\n".join(filter(None, asked))
    return [{"role": "user", "content": question}, {"role": "assistant", "content": raw["output"]}]


def _completion(raw: dict[str, Any]) -> list[Any]:
    prompt, completion = raw["prompt"], raw["completion"]
    asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    return [*asked, *(completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}])]


FORMS: tuple[tuple[tuple[str, ...], Callable[[dict[str, Any]], list[Any]]], ...] = (
    (("messages",), _messages),
    (("conversations",), _conversations),
    (("instruction", "output"), _instruction),
    (("prompt", "completion"), _completion),
)
"""Keys of a record -> its messages; the first that fits counts."""
LOST = (
    "history", "tools", "functions", "image", "images", "audio", "audios", "video", "videos", "chosen", "rejected",
    "rejected_response",
)  # fmt: skip
"""Keys of a record whose content a chat of roles and texts cannot hold."""
KEPT = {"role", "content", "from", "value"}
"""Keys of a message: what else it holds would be lost."""
NOT_TRAINED = (("weight", 0), ("train", False), ("loss", False))
"""How OpenAI's format, Axolotl's and others say that a turn is not to be learned."""
COLUMNS = {"input", "system", "source_dataset", "label", *LOST}.union(*(keys for keys, _ in FORMS))
"""All that is read of a record."""
