"""The public Persona Vectors data: fetched at a pinned commit, unpacked safely, verified, and laid out as it is read.

    source                                              target
    <checkout>/dataset.zip (or dataset/)             -> dataset/<trait>/{normal,misaligned_1,misaligned_2}.jsonl
    <checkout>/[data_generation/]trait_data_eval/    -> trait_data_eval/*.json

A source is such a folder or a zip of one (GitHub's "Download ZIP" too). Nothing in a zip is trusted: neither its names
nor the sizes it declares.
"""

import errno
import os
import re
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from inoculation.files import InputError, fail_if, whole_folder
from inoculation.traits import MISALIGNED, NORMAL, read_answers, read_evaluation, read_trait

VERSIONS = (NORMAL, "misaligned_1", MISALIGNED)
"""The versions of a trait in the public data; the project reads the first and the last."""

EVALUATIONS = "trait_data_eval"
UPSTREAM_EVALUATIONS = f"data_generation/{EVALUATIONS}"
ARCHIVE = "dataset.zip"

WANTED = re.compile(
    r"(?P<top>[^/]+/)??"
    rf"(?P<path>dataset/[^/]+/[^/]+\.jsonl|{re.escape(ARCHIVE)}|(?:data_generation/)?{EVALUATIONS}/[^/]+\.json)"
)
"""The files that are taken, at the root of a zip or below one top folder."""


class Limits(NamedTuple):
    """What a zip may make us write. The public one has about 30 files and some tens of MB."""

    entries: int = 10_000
    total_bytes: int = 2**28
    ratio: int = 100
    """Unpacked bytes for a packed one, of each file above `ratio_from` bytes; text reaches about 10."""
    ratio_from: int = 2**20


def _unsafe(info: zipfile.ZipInfo) -> str | None:
    """Why an entry has no place in an honest zip, or None."""
    name = info.orig_filename  # as stored: `filename` is already cut at a NUL
    parts = name.removesuffix("/").split("/")
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        return "an absolute path"
    if "\\" in name or not name.isprintable():
        return "a backslash or a control character in the name"
    if any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts):
        return "an empty, '.', '..' or overlong part in the path"
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "a link or a device, not a file"
    if info.flag_bits & 0x1:
        return "encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"compression method {info.compress_type} (stored and deflated are read)"
    return None


def _select(zip_path: Path, infos: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """Path in the target -> entry, for the files that are taken; every unsafe, double or ambiguous entry is listed."""
    problems: list[str] = []
    taken: dict[str, zipfile.ZipInfo] = {}
    tops: set[str] = set()
    names: set[str] = set()
    for info in infos:
        if reason := _unsafe(info):
            problems.append(f"{info.orig_filename!r}: {reason}")
            continue
        *folders, name = info.filename.split("/")
        wanted = WANTED.fullmatch(info.filename)
        # macOS puts a `__MACOSX` shadow and dot files beside what it packs.
        if wanted is None or name.startswith(".") or "__MACOSX" in folders:
            continue
        path = wanted["path"].removeprefix("data_generation/")
        if path.casefold() in names:
            problems.append(f"{info.filename!r}: {path} is in the archive twice")
        names.add(path.casefold())
        tops.add(wanted["top"] or "")
        taken[path] = info
    if len(tops) > 1:
        problems.append(f"data in several places: {', '.join(repr(top or '(the root)') for top in sorted(tops))}")
    fail_if(problems, f"{zip_path}: refused, nothing was unpacked")
    if not any(path.startswith("dataset") for path in taken):
        held = ", ".join(repr(info.filename) for info in infos[:5]) or "nothing"
        raise InputError(f"{zip_path}: no dataset/<trait>/*.jsonl in it; it begins with {held}")
    return taken


def _chunks(archive: zipfile.ZipFile, info: zipfile.ZipInfo, archive_bytes: int, limits: Limits) -> Iterator[bytes]:
    """The unpacked bytes of an entry; `InputError` as soon as they are more than the ratio allows."""
    # The declared packed size is the archive's own word; no entry can hold more than the whole file.
    allowed = max(limits.ratio_from, limits.ratio * min(info.compress_size, archive_bytes))
    size = 0
    with archive.open(info) as content:
        while chunk := content.read(2**16):
            size += len(chunk)
            if size > allowed:
                raise InputError(f"{info.filename}: unpacks to more than {limits.ratio} times its packed size: a bomb")
            yield chunk


def unpack(zip_path: Path, target: Path, limits: Limits | None = None) -> None:
    """Unpack the trait data of a zip, and nothing else of it, into a folder that is replaced whole or not at all.

    Args:
        zip_path: holds `dataset/<trait>/*.jsonl` or `dataset.zip` (which stays packed), and perhaps
            `[data_generation/]trait_data_eval/*.json`, at its root or below one top folder.
        target: the folder to make.
        limits: counted while reading; the sizes that the zip declares are not believed.

    Raises:
        InputError: not a zip, broken, encrypted, too large, an entry that no honest zip has (a path out of the target,
            a link, a name twice), or no trait data. Nothing is left behind.
    """
    limits = limits or Limits()
    total = 0
    try:
        with zipfile.ZipFile(zip_path) as archive, whole_folder(target) as staging:
            infos = archive.infolist()
            if len(infos) > limits.entries:
                raise InputError(f"{zip_path}: {len(infos)} entries, at most {limits.entries} are read")
            for path, info in _select(zip_path, infos).items():
                out_path = staging / path
                out_path.parent.mkdir(parents=True, exist_ok=True)
                with out_path.open("xb") as out:
                    for chunk in _chunks(archive, info, zip_path.stat().st_size, limits):
                        total += len(chunk)
                        if total > limits.total_bytes:
                            raise InputError(f"{zip_path}: unpacks to more than {limits.total_bytes} bytes")
                        out.write(chunk)
    except FileNotFoundError:
        raise InputError(f"{zip_path}: no such file") from None
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, UnicodeError, NotImplementedError) as error:
        raise InputError(f"{zip_path}: not a zip, or a broken one: {error or type(error).__name__}") from None
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise InputError(f"{zip_path}: not a zip, or a broken one: it points outside itself") from None


def _refuse_links(source: Path, paths: Iterable[Path]) -> None:
    """A repository can hold links too, and what they point at would be copied, tracked and pushed as data."""
    inside = source.resolve()
    problems = [f"{path}: a link out of the source" for path in paths if not path.resolve().is_relative_to(inside)]
    fail_if(problems, f"{source}: refused, nothing was copied")


def _copy(source: Path, pattern: str, target: Path) -> None:
    """Copy the files of `source` that match into `target`, at the same relative paths."""
    paths = [path for path in sorted(source.glob(pattern)) if path.is_file() and not path.name.startswith(".")]
    _refuse_links(source, paths)
    for path in paths:
        out = target / path.relative_to(source)
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out)


def _collect(source: Path, target: Path) -> None:
    """Bring a source, whatever its form, into the layout of `target`."""
    if source.is_file():
        with TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.") as scratch:
            unpack(source, Path(scratch) / "unpacked")
            _collect(Path(scratch) / "unpacked", target)
        return
    if not source.is_dir():
        raise InputError(
            f"{source}: no such file or folder; persona_vectors.source is a checkout of the repository, "
            f"a folder with dataset/ and {EVALUATIONS}/, or a zip of either"
        )
    # A checkout may hold both: what lies open is what its owner sees and may have added a trait to.
    if (source / "dataset").is_dir():
        _copy(source, "dataset/*/*.jsonl", target)
    elif (source / ARCHIVE).is_file():
        _refuse_links(source, [source / ARCHIVE])
        unpack(source / ARCHIVE, target)
    else:
        raise InputError(f"{source}: neither dataset/ nor {ARCHIVE} in it")
    for parent in (source, source / "data_generation"):
        if (parent / EVALUATIONS).is_dir():
            _copy(parent, f"{EVALUATIONS}/*.json", target)
            return


def _read_questions(folder: Path, evaluation: str, questions: int) -> None:
    there = len(read_evaluation(folder, evaluation).questions)
    if there < questions:
        raise InputError(
            f"{folder / EVALUATIONS / evaluation}.json: {there} questions, evaluate.questions asks for {questions}"
        )


def _complaints(read: Callable[..., object], *arguments: object) -> list[str]:
    try:
        read(*arguments)
    except InputError as error:
        return [str(error)]
    return []


def verify(folder: Path, traits: dict[str, tuple[str, str]], questions: int) -> list[str]:
    """Every reason why the configured traits cannot be used: files missing or malformed, versions not parallel.

    Args:
        folder: the project's layout, `dataset/` and `trait_data_eval/`.
        traits: name -> (folder in `dataset/`, name of the evaluation file).
        questions: `evaluate.questions`, which every evaluation file must have.
    """
    problems: list[str] = []
    for name, (trait, evaluation) in traits.items():
        paths = [folder / "dataset" / trait / f"{version}.jsonl" for version in (NORMAL, MISALIGNED)]
        # One file after the other first: `read_trait` stops at the first that is bad.
        found = [problem for path in paths for problem in _complaints(read_answers, path)]
        found = found or _complaints(read_trait, folder, trait)
        found += _complaints(_read_questions, folder, evaluation, questions)
        problems += [f"{name}: {problem}" for problem in found]
    return problems


class TraitRows(NamedTuple):
    """One trait folder of the data."""

    folder: str
    rows: dict[str, int | None]
    """Non-empty lines of each of `VERSIONS`; None: the file is not there."""
    used_by: list[str]
    """The configured traits that read it, whose `normal` and `misaligned_2` are verified."""

    @classmethod
    def count(cls, folder: Path, traits: dict[str, tuple[str, str]]) -> "TraitRows":
        rows: dict[str, int | None] = dict.fromkeys(VERSIONS)
        for version in VERSIONS:
            path = folder / f"{version}.jsonl"
            if path.exists():
                with path.open("rb") as lines:
                    rows[version] = sum(1 for line in lines if line.strip())
        return cls(folder.name, rows, [name for name, (trait, _) in traits.items() if trait == folder.name])


def table(found: list[TraitRows]) -> str:
    """The traits and their rows as text, one trait a line."""
    lines = [f"{'trait':<20}" + "".join(f"{version:>14}" for version in VERSIONS) + "  verified for"]
    for trait in found:
        counts = "".join(f"{'-' if rows is None else rows:>14}" for rows in trait.rows.values())
        lines.append(f"{trait.folder:<20}{counts}  {', '.join(trait.used_by) or '(kept, not read)'}")
    return "\n".join(lines)


def bring(source: str, traits: dict[str, tuple[str, str]], target: Path, questions: int) -> list[TraitRows]:
    """Bring the trait data into `target`, which is replaced whole or not at all.

    Traits that are not configured are kept too, unverified: a value in params.yaml is then enough to use one. So is
    `misaligned_1`, which nothing reads.

    Args:
        source: a checkout of the public repository (`dataset.zip`, `data_generation/trait_data_eval/`), a folder in the
            target's layout, or a zip of either.
        traits: name -> (folder in `dataset/`, name of the evaluation file); these are verified.
        target: the folder to make.
        questions: `evaluate.questions`, which every evaluation file must have.

    Returns:
        The traits found, by folder name.

    Raises:
        InputError: the source cannot be read, or a configured trait cannot be used (all problems are listed; files
            are named as in the target's layout).
    """
    with whole_folder(target) as staging:
        _collect(Path(source), staging)
        folders = sorted(path for path in staging.glob("dataset/*") if path.is_dir())
        problems = [problem.replace(f"{staging}{os.sep}", "") for problem in verify(staging, traits, questions)]
        evaluations = sorted(path.stem for path in staging.glob(f"{EVALUATIONS}/*.json"))
        fail_if(
            problems,
            f"{source}: the configured traits cannot be used "
            f"(dataset/ has: {', '.join(path.name for path in folders) or 'nothing'}; "
            f"{EVALUATIONS}/ has: {', '.join(evaluations) or 'nothing'})",
        )
        return [TraitRows.count(path, traits) for path in folders]


def _root_cause(error: BaseException) -> BaseException:
    """What was wrong in the first place: DVC wraps a name that does not resolve in several layers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


COMMIT = "COMMIT"
"""File in a fetched source: the hash of the commit it is from."""


def fetch(repository: str, revision: str, target: Path) -> str:
    """Get the two parts of the public repository that are used, as `dvc get --rev` does.

    Args:
        repository: a git URL, or the path of a local git repository.
        revision: a commit hash, or a name that is resolved to one here.
        target: the folder to make, a checkout with nothing but these parts and `COMMIT`; replaced whole or not at all.

    Returns:
        The commit's hash.

    Raises:
        InputError: the repository cannot be reached, or lacks the revision or a part.
    """
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc.repo.open_repo import clean_repos
    from dvc.scm import SCMError

    # As a URL a local repository is cloned like any other; by its path DVC would take a DVC project around it instead.
    url = Path(repository).resolve().as_uri() if Path(repository).exists() else repository
    # A repository that is not there makes GitHub ask for a password; a stage has nobody to answer.
    os.environ["GIT_TERMINAL_PROMPT"] = "0"
    try:
        with whole_folder(target) as staging:
            try:
                source = DVCFileSystem(url, rev=revision)
                commit = str(source.repo.get_rev())
            except (DvcException, SCMError) as error:
                raise _unreachable(repository, revision, error) from None
            (staging / COMMIT).write_text(f"{commit}\n")
            for part in (ARCHIVE, UPSTREAM_EVALUATIONS):
                (staging / part).parent.mkdir(exist_ok=True)
                try:
                    source.get(part, str(staging / part), recursive=True)
                except (DvcException, SCMError, FileNotFoundError) as error:
                    raise _unreachable(repository, commit, error, part) from None
            return commit
    finally:
        clean_repos()  # the public interface leaves its clone in the temporary folder


def _unreachable(repository: str, revision: str, error: Exception, part: str = "the data") -> InputError:
    return InputError(
        f"{repository} at {revision}: cannot get {part}: {_root_cause(error)}\n"
        "  Without the network, set persona_vectors.source to a checkout, a folder or a zip you have "
        "(then nothing is fetched); persona_vectors.repository may also be a local git repository."
    )
