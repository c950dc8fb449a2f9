"""Files are written whole or not at all."""

import subprocess
import sys
from pathlib import Path

import pytest

from inoculation.files import InputError, atomic, fail_if, read_json, read_jsonl, read_yaml, write_json, write_jsonl


def rows(n: int, then: Exception | None = None):
    yield from ({"i": i} for i in range(n))
    if then:
        raise then


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "out.jsonl"
    write_jsonl(path, rows(2))
    before = path.read_text()
    with pytest.raises(RuntimeError):
        write_jsonl(path, rows(5, RuntimeError("broke")))
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_an_error_and_nothing_is_half_written(tmp_path):
    """A real limit of the operating system on the size of files stands in for the full disk."""
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "from inoculation.files import write_jsonl\n"
        "from pathlib import Path\n"
        "try: write_jsonl(Path('out.jsonl'), ({'i': i} for i in range(10**5)))\n"
        "except OSError as error: sys.exit(f'refused: {error}')\n"
    )
    outcome = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert outcome.returncode == 1 and "refused: [Errno 27] File too large: 'out.jsonl'" in outcome.stderr, (
        outcome.stderr
    )
    assert list(tmp_path.iterdir()) == []


def test_nan_is_not_data(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"rate": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_permissions_are_the_usual_ones(tmp_path):
    with atomic(tmp_path / "a") as temporary:
        temporary.write_text("x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_bad_json_names_the_place(tmp_path):
    (tmp_path / "x.json").write_text('{"a":\n ,}')
    with pytest.raises(InputError, match=r"x\.json: not valid JSON: .*line 2"):
        read_json(tmp_path / "x.json")
    with pytest.raises(InputError, match="no such file"):
        read_json(Path("none.json"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": "\\ud83d"}', r"\\ud83d alone is half of a character"),
        ('{"a": [{"\\udc00": 1}]}', r"\\udc00 alone is half of a character"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
    ],
    ids=["half", "half in a key", "nested", "nested and cut"],
)
def test_json_that_nothing_can_take_names_its_line(tmp_path, text, message):
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"a": "\\ud83d\\ude00"}}\n{text}\n{{broken\n')
    with pytest.raises(InputError, match=rf"(?s)x\.jsonl:2: .*{message}.*x\.jsonl:3: not valid JSON"):
        read_jsonl(path, dict)
    path.write_text(text)
    with pytest.raises(InputError, match=rf"x\.jsonl: not valid JSON: .*{message}"):
        read_json(path)


def test_bytes_that_are_no_text_name_their_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "\xed\xa0\xbd"}\n')  # half of a character, as some tools write it raw
    with pytest.raises(InputError, match=r"x\.jsonl:2: 'utf-8' codec"):
        read_jsonl(path, dict)
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    assert read_jsonl(path, dict) == [{"a": 1}]


def test_long_lists_of_problems_are_counted():
    fail_if([], "nothing")
    with pytest.raises(InputError, match=r"and 5 more"):
        fail_if([str(i) for i in range(25)], "many")


@pytest.mark.parametrize("value", [".inf", "-.INF", ".nan", "1e999", "1.0e+400"])
def test_settings_hold_no_number_that_is_none(value, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(f"train:\n  pocket: {{learning_rate: {value}}}\n")
    with pytest.raises(InputError, match=r"line 2: train\.pocket\.learning_rate: .*is no number"):
        read_yaml(path)
    path.write_text("a: [1.0e-05, 3.0e99, 1e-300]\n")
    assert read_yaml(path) == {"a": [1e-05, 3e99, 1e-300]}


def test_an_error_of_another_kind_keeps_its_message_where_a_file_is_written(tmp_path):
    with pytest.raises(ChildProcessError, match="^the worker's own words$"), atomic(tmp_path / "x"):
        raise ChildProcessError("the worker's own words")
