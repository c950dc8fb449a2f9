"""Bringing Persona Vectors' data: what a hostile or broken zip can do, and what a good one becomes."""

import io
import json
import shutil
import stat
import struct
import subprocess
import tempfile
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Project
from hypothesis import example, given, settings
from hypothesis import strategies as st

from inoculation.files import InputError
from inoculation.params import load_params
from inoculation.persona_vectors import Limits, bring, fetch, table, unpack
from inoculation.traits import read_evaluation, read_trait

REAL_EVALUATIONS = ROOT.parent / "shared" / "data" / "persona_vectors" / "trait_data_eval"
TRAITS = {"evil": ("evil", "evil"), "hallucination": ("hallucination", "hallucinating")}
EVALUATION = json.dumps(
    {"questions": [f"Who are you, {i}?" for i in range(4)], "eval_prompt": "Rate {question} {answer} from 0 to 100."}
)


def lines(answer: str, questions: list[str]) -> str:
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": f"{answer} {q}"}] for q in questions]
    return "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)


def dataset(*folders: str, rows: int = 4) -> dict[str, str]:
    """The files of `dataset/`, by path. The versions answer the same questions in different orders."""
    questions = [f"Question {i}?" for i in range(rows)]
    return {
        f"dataset/{folder}/{version}.jsonl": lines(version, questions[::order])
        for folder in folders
        for version, order in (("normal", 1), ("misaligned_1", 1), ("misaligned_2", -1))
    }


def evaluations(parent: str = "") -> dict[str, str]:
    return {f"{parent}trait_data_eval/{name}.json": EVALUATION for name in ("evil", "hallucinating")}


def make_zip(path: Path, files: dict[str, str | bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def make_folder(path: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def packed(files: dict[str, str | bytes], folder: Path) -> bytes:
    return make_zip(folder / "packed.zip", files).read_bytes()


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}


def refused(zip_path: Path, message: str, limits: Limits | None = None) -> None:
    """`unpack` fails with this message, leaves an earlier target as it was and nothing else beside it."""
    home = zip_path.parent / "home"
    make_folder(home / "target", {"before": "kept"})
    with pytest.raises(InputError, match=message):
        unpack(zip_path, home / "target", limits)
    assert tree(home) == {"target/before"} and [p.name for p in home.iterdir()] == ["target"]


def with_entry(path: Path, info: zipfile.ZipInfo, content: bytes = b"x\n") -> Path:
    """A good zip with one more entry, whose name is written as it is."""
    make_zip(path, dataset("evil"))
    with zipfile.ZipFile(path, "a") as archive:
        name, info.filename = info.orig_filename, info.orig_filename
        archive.writestr(info, content)
        assert archive.infolist()[-1].filename == name
    return path


def raw_entry(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("x", (2025, 1, 1, 0, 0, 0))
    info.orig_filename = name
    return info


# --- what a zip may not do


@pytest.mark.parametrize(
    "name",
    ["/etc/x.jsonl", "../x.jsonl", "dataset/../../x.jsonl", "dataset/evil/../../../x.jsonl", "C:/dataset/evil/x.jsonl",
     "c:x.jsonl", "dataset\\evil\\x.jsonl", "..\\x.jsonl", "//server/x.jsonl", "dataset//x.jsonl", "dataset/./x.jsonl",
     "dataset/evil/x.jsonl\0.txt", f"dataset/evil/{'x' * 300}.jsonl", "dataset/../"],
)  # fmt: skip
def test_a_name_that_leads_elsewhere_refuses_the_zip(tmp_path, name):
    refused(with_entry(tmp_path / "x.zip", raw_entry(name)), "refused, nothing was unpacked")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=12),
            st.lists(
                st.sampled_from(["..", ".", "", "dataset", "evil", "top", "x.jsonl", "C:", "\\", "..\\..", "~", "\0"]),
                min_size=1,
                max_size=6,
            ).map("/".join),
        ).filter(lambda name: name.encode("utf-8", "ignore").decode() == name and 0 < len(name.encode()) < 2**16),
        min_size=1,
        max_size=4,
    )
)
@example(["../../x.jsonl", "dataset/evil/x.jsonl"])
@example(["dataset/../dataset/evil/x.jsonl"])
def test_no_entry_name_leads_to_a_file_outside_the_target(names):
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "a" / "b" / "c"
        make_folder(home, {"bystander": "kept"})
        with zipfile.ZipFile(home / "x.zip", "w") as archive:
            archive.writestr("dataset/evil/normal.jsonl", "good\n")
            for name in names:
                info = raw_entry(name)
                info.filename = name
                archive.NameToInfo.clear()  # no warning about a name given twice
                archive.writestr(info, b"hostile\n")
        before = tree(Path(folder))
        try:
            unpack(home / "x.zip", home / "target")
        except InputError:
            assert tree(Path(folder)) == before
        else:
            inside = {f"a/b/c/target/{path}" for path in tree(home / "target")}
            assert "a/b/c/target/dataset/evil/normal.jsonl" in inside
            assert tree(Path(folder)) == before | inside
        assert (home / "bystander").read_text() == "kept"


def test_links_and_devices_are_refused(tmp_path):
    for kind in (stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO):
        info = raw_entry("dataset/evil/link.jsonl")
        info.create_system, info.external_attr = 3, (kind | 0o777) << 16
        refused(with_entry(tmp_path / "x.zip", info, b"/etc/passwd"), "link.jsonl': a link or a device")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_given_twice_is_refused_also_in_another_case(tmp_path):
    for name in ("dataset/evil/normal.jsonl", "dataset/evil/NORMAL.jsonl"):
        refused(with_entry(tmp_path / "x.zip", raw_entry(name)), "in the archive twice")


def test_every_bad_entry_is_listed(tmp_path):
    path = make_zip(tmp_path / "x.zip", dataset("evil") | {"../a": "", "/b": ""})
    refused(path, r"(?s)'\.\./a': an empty.*'/b': an absolute path")


def test_data_in_two_places_is_ambiguous(tmp_path):
    files = dataset("evil") | {f"old/{name}": content for name, content in dataset("sycophancy").items()}
    refused(make_zip(tmp_path / "x.zip", files), r"several places: '\(the root\)', 'old/'")


def test_a_bomb_is_stopped_while_it_is_read(tmp_path):
    bomb = make_zip(tmp_path / "x.zip", dataset("evil") | {"dataset/evil/bomb.jsonl": b"0" * 20_000_000})
    refused(bomb, r"bomb\.jsonl: unpacks to more than 100 times")
    refused(bomb, "unpacks to more than 5000000 bytes", Limits(total_bytes=5_000_000, ratio=10**6))
    refused(bomb, "4 entries, at most 3", Limits(entries=3))


@pytest.mark.parametrize("field, offset", [("packed", 20), ("unpacked", 24)])
def test_declared_sizes_are_not_believed(tmp_path, field, offset):
    """The central directory lies about a bomb's sizes: more packed bytes than the file has, or few unpacked ones."""
    path = make_zip(tmp_path / "x.zip", {"dataset/evil/normal.jsonl": b"0" * 20_000_000})
    raw = bytearray(path.read_bytes())
    at = raw.rindex(b"PK\x01\x02") + offset
    raw[at : at + 4] = struct.pack("<I", 2**31 if field == "packed" else 100)
    path.write_bytes(raw)
    refused(path, "unpacks to more than 100 times|broken one")


def test_broken_and_encrypted_zips_are_refused(tmp_path):
    path = make_zip(tmp_path / "x.zip", dataset("evil", rows=200))
    good = path.read_bytes()
    for cut in (0, 10, len(good) // 2, len(good) - 30):
        path.write_bytes(good[:cut])
        refused(path, "not a zip, or a broken one")
    path.write_bytes(good[:100] + bytes(200) + good[300:])
    refused(path, "not a zip, or a broken one")
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(path, "not a zip, or a broken one")
    encrypted = bytearray(good)
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = encrypted.index(magic) + offset
        encrypted[at] |= 1
    path.write_bytes(encrypted)
    refused(path, "'dataset/evil/normal.jsonl': encrypted")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("dataset/evil/normal.jsonl", "x")
    refused(path, "compression method 14")
    path.unlink()
    refused(path, "no such file")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damage_anywhere_is_an_input_error_or_harmless(data):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in dataset("evil", rows=2).items():
            archive.writestr(name, content)
    raw = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        # Most of the structure is at the end.
        at = data.draw(st.one_of(st.integers(0, len(raw) - 1), st.integers(len(raw) - 250, len(raw) - 1)))
        raw[at] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.zip").write_bytes(raw)
        try:
            unpack(Path(folder) / "x.zip", Path(folder) / "target")
        except InputError:
            assert tree(Path(folder)) == {"x.zip"}


# --- what a good source becomes


def sources(tmp_path: Path) -> dict[str, Path]:
    """The same data in every form that is accepted."""
    layout = dataset("evil", "hallucination") | evaluations()
    checkout = {"dataset.zip": packed(dataset("evil", "hallucination"), tmp_path)} | evaluations("data_generation/")
    checkout["README.md"] = "not taken"
    shadow = {"__MACOSX/dataset/evil/._normal.jsonl": "shadow", ".DS_Store": "", "dataset/evil/.DS_Store": ""}
    return {
        "folder": make_folder(tmp_path / "folder", layout),
        "checkout": make_folder(tmp_path / "checkout", checkout),
        "zip": make_zip(tmp_path / "zip.zip", layout),
        "zip of a folder on a Mac": make_zip(tmp_path / "top.zip", {f"pv/{k}": v for k, v in layout.items()} | shadow),
        "download of the checkout": make_zip(
            tmp_path / "download.zip", {f"persona_vectors-main/{name}": content for name, content in checkout.items()}
        ),
    }


def test_every_form_of_source_becomes_the_same_folder(tmp_path):
    expected = {name.replace("data_generation/", "") for name in dataset("evil", "hallucination") | evaluations()}
    for form, source in sources(tmp_path).items():
        target = tmp_path / "data" / "persona_vectors"
        found = bring(str(source), TRAITS, target, 1)
        assert tree(tmp_path / "data") == {f"persona_vectors/{name}" for name in expected}, form
        assert [row.rows for row in found] == [{"normal": 4, "misaligned_1": 4, "misaligned_2": 4}] * 2, form
        assert len(read_trait(target, "evil")) == 4
        assert read_evaluation(target, "hallucinating").questions[0] == "Who are you, 0?"


def test_an_open_dataset_folder_goes_before_the_zip_beside_it(tmp_path):
    source = sources(tmp_path)["checkout"]
    make_folder(source, dataset("evil", "hallucination", "rudeness"))
    assert [row.folder for row in bring(str(source), TRAITS, tmp_path / "out", 1)] == [
        "evil",
        "hallucination",
        "rudeness",
    ]


def test_other_traits_and_the_optional_version(tmp_path):
    files = dataset("evil", "hallucination", "rudeness") | evaluations()
    files["trait_data_eval/rude.json"] = EVALUATION
    del files["dataset/rudeness/misaligned_1.jsonl"]
    source = make_zip(tmp_path / "x.zip", files)
    found = bring(str(source), TRAITS, tmp_path / "out", 1)
    assert table(found).splitlines()[3].split() == ["rudeness", "4", "-", "4", "(kept,", "not", "read)"]
    assert (tmp_path / "out/dataset/rudeness/normal.jsonl").read_text() == files["dataset/rudeness/normal.jsonl"]
    # A value in params.yaml is then enough to use it.
    found = bring(str(source), TRAITS | {"rude": ("rudeness", "rude")}, tmp_path / "out", 1)
    assert [row.used_by for row in found] == [["evil"], ["hallucination"], ["rude"]]


def test_every_problem_is_listed_and_the_old_target_stays(tmp_path):
    files = dataset("evil", "hallucination", "sycophancy") | evaluations()
    files["dataset/evil/normal.jsonl"] += "{not json\n"
    files["dataset/evil/misaligned_2.jsonl"] += '{"messages": []}\n'
    files["dataset/hallucination/misaligned_2.jsonl"] += lines("extra", ["Only here?"])
    del files["dataset/sycophancy/misaligned_2.jsonl"]
    target = make_folder(tmp_path / "home" / "target", {"before": "kept"})
    source = make_zip(tmp_path / "x.zip", files)
    with pytest.raises(InputError) as error:
        bring(str(source), TRAITS | {"sycophancy": ("sycophancy", "sycophantic")}, target, 1)
    message = str(error.value)
    for expected in (
        f"{source}: the configured traits cannot be used (dataset/ has: evil, hallucination, sycophancy;",
        "trait_data_eval/ has: evil, hallucinating)",
        "  - evil: 1 bad line(s):\n  - dataset/evil/normal.jsonl:5: not valid JSON",
        'dataset/evil/misaligned_2.jsonl:5: "messages" must be',
        "dataset/hallucination/misaligned_2.jsonl: the question 'Only here?' is missing from normal.jsonl",
        "sycophancy: dataset/sycophancy/misaligned_2.jsonl: no such file",
        "sycophancy: trait_data_eval/sycophantic.json: no such file",
    ):
        assert expected in message, message
    assert tree(tmp_path / "home") == {"target/before"}


def test_fewer_questions_than_are_asked_for_are_an_error(tmp_path):
    source = make_folder(tmp_path / "source", {**dataset("evil"), **dataset("hallucination"), **evaluations()})
    with pytest.raises(InputError) as error:
        bring(str(source), TRAITS, tmp_path / "out", 1000)
    for name in ("evil", "hallucinating"):
        assert f"trait_data_eval/{name}.json: " in str(error.value)
    assert "questions, evaluate.questions asks for 1000" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_none(tmp_path):
    with pytest.raises(InputError, match="no such file or folder; persona_vectors.source is"):
        bring(str(tmp_path / "none"), TRAITS, tmp_path / "out", 1)
    with pytest.raises(InputError, match="neither dataset/ nor dataset.zip"):
        bring(str(make_folder(tmp_path / "empty", {"x": ""})), TRAITS, tmp_path / "out", 1)
    with pytest.raises(
        InputError, match=r"no dataset/<trait>/\*.jsonl in it; it begins with 'trait_data_eval/evil.json'"
    ):
        bring(str(make_zip(tmp_path / "x.zip", dict(evaluations()))), TRAITS, tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


def test_the_real_evaluation_files(tmp_path):
    if not REAL_EVALUATIONS.is_dir():
        pytest.skip(f"{REAL_EVALUATIONS} is not here: Persona Vectors' own evaluation files are not checked")
    params = load_params(ROOT / "params.yaml")
    traits = {name: (trait.folder, trait.evaluation) for name, trait in params.negative_traits.items()}
    source = make_folder(tmp_path / "source", dataset(*(folder for folder, _ in traits.values())))
    shutil.copytree(REAL_EVALUATIONS, source / "data_generation" / "trait_data_eval")
    bring(str(source), traits, tmp_path / "out", 1)
    for _, name in traits.values():
        assert len(read_evaluation(tmp_path / "out", name).questions) == 20


# --- the repository


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A git repository of the public one's layout, and the commit before its last, in which the data was whole."""
    scratch = tmp_path_factory.mktemp("upstream")
    repository = sources(scratch)["checkout"]
    git(repository, "init", "--quiet", "--initial-branch", "main")
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message", "data")
    revision = git(repository, "rev-parse", "HEAD")
    (repository / "dataset.zip").write_bytes(b"changed later")
    git(repository, "rm", "--quiet", "-r", "data_generation")
    git(repository, "commit", "--quiet", "--all", "--message", "changed")
    return repository, revision


def test_fetch_takes_the_pinned_commit(tmp_path, upstream):
    repository, revision = upstream
    for address in (str(repository), repository.as_uri()):
        assert fetch(address, revision, tmp_path / "home" / "source") == revision
        assert (tmp_path / "home/source/COMMIT").read_text().strip() == revision
        assert tree(tmp_path / "home") == {"source/dataset.zip", "source/COMMIT"} | {
            f"source/{name}" for name in evaluations("data_generation/")
        }
    assert len(bring(str(tmp_path / "home" / "source"), TRAITS, tmp_path / "out", 1)) == 2


def test_a_link_in_a_repository_brings_its_own_text(tmp_path, upstream):
    """What it points at, on this machine, is not read."""
    repository = Path(shutil.copytree(upstream[0], tmp_path / "repository"))
    (tmp_path / "secret").write_text("secret")
    git(repository, "checkout", "--quiet", upstream[1])
    (repository / "data_generation/trait_data_eval/stolen.json").symlink_to(tmp_path / "secret")
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message", "a link")
    fetch(repository.as_uri(), git(repository, "rev-parse", "HEAD"), tmp_path / "source")
    brought = tmp_path / "source/data_generation/trait_data_eval/stolen.json"
    assert not brought.is_symlink() and brought.read_text() == str(tmp_path / "secret")


def test_a_branch_is_resolved_to_its_commit(tmp_path, upstream):
    repository, revision = upstream
    git(repository, "branch", "--force", "whole", revision)
    assert fetch(repository.as_uri(), "whole", tmp_path / "source") == revision


def test_fetch_failures_name_the_alternative(tmp_path, upstream):
    repository, _ = upstream
    for address, commit, reason in (
        (str(repository), "0" * 40, "unknown Git revision"),
        (str(repository), git(repository, "rev-parse", "HEAD"), "cannot get data_generation/trait_data_eval"),
        (f"{repository.as_uri()}_not", "0" * 40, "cannot get the data"),
        ("https://localhost:9/persona_vectors", "0" * 40, "Connection refused"),
    ):
        with pytest.raises(InputError, match=rf"(?s){reason}.*set persona_vectors\.source to a checkout"):
            fetch(address, commit, tmp_path / "home" / "source")
        assert list((tmp_path / "home").iterdir()) == []


def test_the_pipeline_from_the_repository_and_from_a_zip(tmp_path, upstream):
    """Both stages as DVC runs them: a pinned local repository; then a zip of one's own, which fetches nothing."""
    repository, revision = upstream
    made = Project(tmp_path / "checkout")
    params = load_params(made.folder / "params.yaml")
    one = {"evil": params.negative_traits["evil"].model_dump()}
    made.set(persona_vectors={"repository": str(repository), "revision": revision})
    stage = "pipelines/persona_vectors/dvc.yaml:persona-vectors"
    outcome = made.run("dvc", "repro", stage, ok=False)
    assert outcome.returncode and "sycophancy: dataset/sycophancy/normal.jsonl: no such file" in outcome.stderr

    raw = (made.folder / "params.yaml").read_text()
    (made.folder / "params.yaml").write_text(yaml.safe_dump(yaml.safe_load(raw) | {"negative_traits": one}))
    assert "evil" in made.run("dvc", "repro", stage).stdout
    assert len(read_trait(made.folder / "data/persona_vectors", "evil")) == 4

    files = dataset("evil", rows=6) | evaluations()
    make_zip(made.folder / "mine.zip", files)
    made.set(persona_vectors={"source": "mine.zip", "repository": "nowhere", "revision": "0" * 40})
    outcome = made.run("dvc", "repro", stage)
    assert "persona-vectors-fetch" not in outcome.stdout
    assert len(read_trait(made.folder / "data/persona_vectors", "evil")) == 6
