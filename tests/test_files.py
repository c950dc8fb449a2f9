"""Files are written whole or not at all."""

import subprocess
import sys
from pathlib import Path

import pytest

from inoculation.files import InputError, atomic, fail_if, read_json, write_json, write_jsonl


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
    assert outcome.returncode == 1 and "refused: [Errno 27]" in outcome.stderr, outcome.stderr
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


def test_long_lists_of_problems_are_counted():
    fail_if([], "nothing")
    with pytest.raises(InputError, match=r"and 5 more"):
        fail_if([str(i) for i in range(25)], "many")
