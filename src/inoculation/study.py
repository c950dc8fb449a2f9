"""The study as a whole: its cells, run through DVC's queue, and what they say together (reference sections 3 and 8).

A cell that MLflow has a row of, under the same parameters, is not run again; so a study that was interrupted goes on, and one
more seed costs one more seed.
"""

import copy
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ruamel.yaml import YAML, YAMLError

from inoculation import plan
from inoculation.detect.words import read_marked
from inoculation.effects import VERDICTS, Verdict, verdicts
from inoculation.files import InputError, fail_if, read_jsonl
from inoculation.groups import DETECTORS, GROUPS, why_not
from inoculation.intervals import CellRates
from inoculation.mixture import read_mixture
from inoculation.params import MAX_SEED, parse_params, put
from inoculation.paths import ROWS, experiment
from inoculation.stage import Writes, resolve
from inoculation.store import digest
from inoculation.traits import POSITIVE_TRAITS

if TYPE_CHECKING:
    from mlflow.entities import Run

KNOWN = ("base", "baseline", "inoc_general", "inoc_selective")
"""Figures 1-6: B is known."""
IRRELEVANT = ("irrelevant_general", "irrelevant_selective")
"""Figures 13 and 14: does any prompt do?"""
LEAKAGE = (
    "base",
    "baseline",
    "inoc_general",
    "inoc_selective",
    "inoc_persona",
    "inoc_sae",
    "inoc_llm",
    "filter_persona",
    "adapter_persona",
    "steer_persona",
)
"""Further figures: does B come back under prompts that describe or deny it?"""
LEAKAGE_FROM = 21
"""Number of the first of them, behind the study's sixteen and room for further transfers."""


def unknown_groups() -> tuple[str, ...]:
    """Figures 7-12: B is unknown."""
    found = [name for name, rule in GROUPS.items() if rule.prompt in DETECTORS and rule.on == "flagged"]
    return ("base", "baseline", "inoc_general", *found)


class Setting(NamedTuple):
    """A parameter and a value that it has instead of params.yaml's."""

    key: str
    """Dotted."""
    value: str
    """As YAML."""

    def parsed(self) -> Any:
        """What DVC writes into params.yaml for it.

        Raises:
            ValueError: it is no YAML.
        """
        try:
            return _as_dvc_reads(self.value)
        except YAMLError:
            raise ValueError(f"{self.value!r} is no value of YAML") from None


def _as_dvc_reads(text: str) -> Any:
    """YAML 1.2, in which 1e-4 is a number."""
    return YAML(typ="safe").load(text)


class Cell(NamedTuple):
    """One training and its evaluation."""

    profile: str
    positive: str
    negative: str
    group: str
    seed: int
    setting: Setting | None = None

    def params(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """params.yaml with its settings."""
        mixture = {**raw["mixture"], "positive": self.positive, "negative": self.negative}
        told = {**raw, "profile": self.profile, "mixture": mixture, "group": self.group, "seed": self.seed}
        if self.setting:
            told = copy.deepcopy(told)
            put(told, {self.setting.key: self.setting.parsed()})
        return told

    def __str__(self) -> str:
        return f"{self.question}: {self.group}, seed {self.seed}" + (
            f", {'='.join(self.setting)}" if self.setting else ""
        )

    @property
    def question(self) -> "Question":
        return Question(self.profile, self.positive, self.negative)


class Question(NamedTuple):
    """The cells that are compared: one profile and mixture."""

    profile: str
    positive: str
    negative: str

    def __str__(self) -> str:
        return f"{self.profile}, {self.negative} + {self.positive}"


class Selection(NamedTuple):
    """Which part of the study; the whole by default."""

    mixtures: Sequence[tuple[str, str]]
    """(A, B), in the order of the figures."""
    groups: Sequence[str]
    seeds: Sequence[int]
    transfer: Sequence[str]
    """Profiles that are trained on the first mixture under the annotator's flags and prompt (figures 15, 16)."""
    part: str = ""
    """A name for the mixtures and groups that were chosen; empty: all."""


def mixtures_of(raw: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(A, B) of every mixture, in the order of the figures; of a data set of one's own whose A is another, its own."""
    own = raw["mixture"]["positive"], raw["mixture"]["negative"]
    every = [(positive, negative) for positive in POSITIVE_TRAITS for negative in raw["negative_traits"]]
    return every if own in every else [own]


def selection(
    raw: Mapping[str, Any],
    mixtures: str | None,
    groups: str | None,
    seeds: str,
    transfer: str | None,
    option: str = "--mixtures",
) -> Selection:
    """What a person chose, checked.

    Args:
        raw: a valid params.yaml.
        mixtures: `all_caps+evil,...`; None: every A with every B, or the one of params.yaml where its A is another.
        groups: names; None: all that make sense.
        option: which one `mixtures` was given by.
        seeds: numbers.
        transfer: profiles; None: none.

    Raises:
        InputError: a name is unknown (all are listed).
    """

    def names(told: str) -> list[str]:
        return [name.strip() for name in told.split(",")]

    every = mixtures_of(raw)
    chosen = every if mixtures is None else [tuple(name.split("+", 1)) for name in names(mixtures)]
    known, own = raw["mixture"]["source"] in raw["sources"], raw["annotator"] == raw["profile"]
    every_group = [name for name in GROUPS if not why_not(name, raw["mixture"]["contamination"], known, own)]
    wanted = every_group if groups is None else names(groups)
    profiles = [] if transfer is None else names(transfer)
    others = [name for name in raw["profiles"] if name != raw["profile"]]
    numbers = names(seeds)
    problems = [
        f"{option}: {'+'.join(pair)!r} is unknown; valid: {', '.join('+'.join(known) for known in every)}"
        for pair in chosen
        if pair not in every
    ]
    problems += [f"--groups: {name!r} is unknown; valid: {', '.join(GROUPS)}" for name in wanted if name not in GROUPS]
    problems += [
        f"--transfer: {name!r} is unknown; valid: {', '.join(others)}" for name in profiles if name not in others
    ]
    if profiles and not {*wanted} & {*unknown_groups()}:
        problems.append(f"--transfer: trains {', '.join(unknown_groups())}, and --groups names none of them")
    drawn = [int(name) for name in numbers if _is_seed(name)]
    problems += [f"--seeds: {name!r} is no seed; valid: 0 to {MAX_SEED}" for name in numbers if not _is_seed(name)]
    for given, told in ((option, chosen), ("--groups", wanted), ("--seeds", drawn), ("--transfer", profiles)):
        twice = [one for one in dict.fromkeys(told) if told.count(one) > 1]
        problems += [f"{given}: {'+'.join(one) if isinstance(one, tuple) else one} stands twice" for one in twice]
    fail_if(problems, "the study cannot be run")
    parts = [
        *([",".join(map("+".join, chosen))] if chosen != every else []),
        *([",".join(wanted)] if wanted != every_group else []),
    ]
    part = "-".join(parts)
    return Selection(chosen, wanted, drawn, profiles, part if len(part) < 100 else f"{part[:80]}-{digest(part)[:8]}")


def _is_seed(name: str) -> bool:
    return name.isascii() and name.isdecimal() and len(name) <= 10 and int(name) <= MAX_SEED


def cells(raw: Mapping[str, Any], chosen: Selection) -> list[Cell]:
    """The study's cells, group by group: with several at once, no two make the same mixture or look for B in it twice.

    Raises:
        InputError: a cell makes no sense, or params.yaml is wrong for it (all are listed).
    """
    profile = str(raw["profile"])
    transferred = [(other, *chosen.mixtures[0], unknown_groups()) for other in chosen.transfer if other != profile]
    found = [
        Cell(trained, positive, negative, group, seed)
        for group in chosen.groups
        for trained, positive, negative, groups in [
            *((profile, *pair, chosen.groups) for pair in chosen.mixtures),
            *transferred,
        ]
        for seed in chosen.seeds
        if group in groups
    ]
    fail_if(mistakes(raw, found), "the study cannot be run")
    return found


def mistakes(raw: Mapping[str, Any], wanted: Iterable[Cell]) -> list[str]:
    """What params.yaml would have wrong for some cells, each mistake once, with its setting and its groups."""
    told: dict[str, list[str]] = defaultdict(list)
    for cell in dict.fromkeys(cell._replace(seed=0) for cell in wanted):
        try:
            parse_params(cell.params(raw))
        except InputError as error:
            setting = f"{'='.join(cell.setting)}: " if cell.setting else ""
            for mistake in str(error).split("\n  - ")[1:]:
                told[f"{setting}{mistake}"].append(cell.group)
    return [f"{mistake} ({', '.join(dict.fromkeys(own))})" for mistake, own in told.items()]


def listed(wanted: Sequence[Cell]) -> list[str]:
    """Some cells for a person, a line for each that differ in their seed alone."""
    seeds: dict[Cell, list[int]] = defaultdict(list)
    for cell in wanted:
        seeds[cell._replace(seed=0)].append(cell.seed)
    return [
        str(cell._replace(seed=own[0]))
        if len(own) == 1
        else f"{cell.question}: {cell.group}, seeds {', '.join(map(str, own))}"
        for cell, own in seeds.items()
    ]


def rows_of(raw: Mapping[str, Any], wanted: Iterable[Cell]) -> "dict[Cell, Run]":
    """The rows that MLflow has of some cells."""
    from inoculation import rows

    there = rows.reported()
    found, unknown = {}, set()
    for cell in wanted:
        params = cell.params(raw)
        try:
            identity = plan.identity(params)
        except (
            InputError
        ):  # a model or SAE of it is not here, so nothing was run with it, or in a copy of the checkout alone
            if any(row.data.params.get("group") == cell.group for row in there.get(experiment(params), {}).values()):
                unknown |= {(cell.group, why) for why in plan.absent(params, cell.group)}
            continue
        row = there.get(experiment(params), {}).get(plan.cell_id(identity))
        if row is not None:
            found[cell] = row
    for group, why in sorted(unknown):
        print(f"{group}: its rows in MLflow are left out, for it cannot be said what they were made with: {why}")
    return found


class Grid(NamedTuple):
    """Cells that one `dvc exp run --queue` names: every B with every seed."""

    profile: str
    group: str
    positive: str
    negatives: tuple[str, ...]
    seeds: tuple[int, ...]
    setting: Setting | None

    def arguments(self) -> list[str]:
        """As DVC takes them."""
        settings = {
            "profile": self.profile,
            "mixture.positive": self.positive,
            "mixture.negative": ",".join(self.negatives),
            "group": self.group,
            "seed": ",".join(map(str, self.seeds)),
        } | (dict([self.setting]) if self.setting else {})
        return [part for key, value in settings.items() for part in ("-S", f"{key}={value}")]


def grids(wanted: Sequence[Cell]) -> list[Grid]:
    """Few grids that together are exactly some cells, in the order of their groups."""
    seeds: dict[Cell, list[int]] = defaultdict(list)
    for cell in wanted:
        seeds[cell._replace(seed=0)].append(cell.seed)
    negatives: dict[tuple[Cell, tuple[int, ...]], list[str]] = defaultdict(list)
    for cell, own in seeds.items():
        negatives[cell._replace(negative=""), tuple(own)].append(cell.negative)
    return [
        Grid(cell.profile, cell.group, cell.positive, tuple(names), own, cell.setting)
        for (cell, own), names in negatives.items()
    ]


def seconds(raw: Mapping[str, Any], wanted: Sequence[Cell]) -> tuple[float, int]:
    """How long some cells take by what was measured on this machine, and how many of their stages never were.

    What cells share (a mixture's detection, its judge) counts once.
    """
    total, unknown = 0.0, 0
    seen: set[tuple[str, ...]] = set()
    for cell in wanted:
        params = cell.params(raw)
        measured = plan.measured_seconds(params)
        for step in plan.needed(params):
            made = tuple(map(str, step.paths(params, Writes))) or (step.stage.command, *map(str, cell))
            if made in seen:
                continue
            seen.add(made)
            total += measured.get(step.stage.command, 0.0)
            unknown += step.stage.command not in measured
    return total, unknown


class Failure(NamedTuple):
    """A task of the queue that failed."""

    task: str
    reason: str


def _dvc(*arguments: str) -> str:
    # Files, not pipes: a queue's worker outlives the command that starts it and keeps what it was given open.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        outcome = subprocess.run([sys.executable, "-m", "dvc", *arguments], stdout=out, stderr=err)
        out.seek(0)
        err.seek(0)
        if outcome.returncode:
            raise InputError(f"`dvc {' '.join(arguments[:3])}` failed:\n{err.read().strip()}")
        return out.read()


def _tasks() -> dict[str, str]:
    """Task of DVC's queue -> its state."""
    lines = [line.split() for line in _dvc("queue", "status").splitlines()]
    return {words[0]: words[-1] for words in lines if len(words) > 2 and words[-1] in STATES}


ENDED = ("Success", "Failed")
STATES = ("Queued", "Running", *ENDED)
RESULTS = Path(".dvc/tmp/exps/celery/result")
"""Where DVC's queue leaves a file of every task that ended. Only when to look is read off them: `dvc queue status` takes a
processor three seconds."""
RUNS = Path(".dvc/tmp/exps/run")
"""Where a worker makes a folder of every task that it has begun, named by the task's commit."""
LOOK = 60.0
"""Seconds between two looks at the queue, at most."""


def _results() -> set[tuple[str, int]]:
    return {(path.name, path.stat().st_mtime_ns) for path in RESULTS.glob("*")}


def run(raw: Mapping[str, Any], wanted: Sequence[Cell], jobs: int) -> list[Failure]:
    """Run cells in DVC's queue, and wait for them with a bar; what fails does not stop the others.

    What all of them share (the pocket world, a pinned profile) is made first, in this checkout.

    Args:
        raw: a valid params.yaml.
        wanted: cells without a row.
        jobs: workers. Their stages spread over the GPUs by themselves, and share the cores (`OMP_NUM_THREADS`, where it is not set).

    Returns:
        What failed, and the last line of its log.

    Raises:
        InputError: something is missing for one of the cells (all is listed, before anything runs), the queue has not ended
            what it was given before, a shared stage failed, or DVC refused.
    """
    from tqdm import tqdm

    problems = [
        f"{one.question}: {problem}"
        for one in {cell._replace(seed=0): cell for cell in wanted}.values()
        for problem in plan.missing(one.params(raw))
    ]
    fail_if(list(dict.fromkeys(problems)), "the study cannot be finished; nothing was run")
    before = _tasks()
    if open_tasks := [f"{task} ({state.lower()})" for task, state in before.items() if state in ("Queued", "Running")]:
        raise InputError(
            f"DVC's queue has not ended what it was given before: {', '.join(open_tasks)}. `dvc queue start` goes on with it, "
            "`dvc queue status` looks, `dvc queue kill` and `dvc queue remove --queued` end it; then start the study again"
        )
    shared = sorted({address for cell in wanted for address in _shared(cell.params(raw))})
    print(f"what the cells share: {', '.join(shared)}", flush=True)
    if subprocess.run([sys.executable, "-m", "dvc", "repro", "--quiet", *shared]).returncode:
        raise InputError("a stage that all cells need failed, see above; the same command goes on from there")
    for grid in grids(wanted):
        _dvc("exp", "run", "--queue", *grid.arguments())
    # Else each cell takes every core, and their threads wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    _dvc("queue", "start", "--jobs", str(jobs))
    lost: set[str] = set()
    with tqdm(total=len(wanted), unit="cell", desc="cells", smoothing=0) as bar:
        while True:
            known, deadline = _results(), time.monotonic() + LOOK
            states = {task: state for task, state in _tasks().items() if task not in (*before, *lost)}
            nowhere = _nowhere(states)
            ended = sum(state in ENDED for state in states.values())
            failed = [task for task, state in states.items() if state == "Failed"]
            bar.set_postfix(failed=len(failed))
            bar.update(ended - bar.n)
            if ended == len(states):
                return [Failure(task, _last_line(task)) for task in failed]
            while _results() == known and time.monotonic() < deadline:
                time.sleep(0.5)
            if _results() == known and (gone := sorted(nowhere & _nowhere(states))):
                for task in gone:
                    cell = _cell_of(task, raw, wanted)
                    _dvc("queue", "kill", task)
                    if cell is not None:
                        lost.add(task)
                        _dvc("exp", "run", "--queue", *grids([cell])[0].arguments())
                _dvc("queue", "start", "--jobs", str(jobs))


def _nowhere(states: Mapping[str, str]) -> set[str]:
    """Tasks that DVC calls running and has begun nowhere.

    A worker that finds the queue empty ends, also while it is given the last task: that one is nobody's then.
    """
    return {task for task, state in states.items() if state == "Running" and not any(RUNS.glob(f"{task}*"))}


def _cell_of(task: str, raw: Mapping[str, Any], wanted: Sequence[Cell]) -> Cell | None:
    """The cell that a task is, by the params.yaml of the commit that it is named after."""
    told = subprocess.run(["git", "show", f"{task}:params.yaml"], capture_output=True, text=True)
    params = _as_dvc_reads(told.stdout) if told.returncode == 0 else None
    return next((cell for cell in wanted if cell.params(raw) == params), None)


def _shared(raw: Mapping[str, Any]) -> Iterator[str]:
    """Addresses of the stages whose outputs belong to no mixture."""
    for step in plan.needed(raw):
        if step.stage.pipeline and not any(
            isinstance(field.marker, Writes) and "${seed}" in field.marker.path for field in step.stage.fields()
        ):
            yield step.address()


def _last_line(task: str) -> str:
    try:
        lines = [line for line in _dvc("queue", "logs", task).splitlines() if line.strip()]
    except InputError:
        return "no log"
    return lines[-1] if lines else "an empty log"


class Finding(NamedTuple):
    """What a detector found in one mixture."""

    detector: str
    seed: int
    prompt: str | None
    reason: str
    precision: float | None
    recall: float | None
    flagged: float | None


class Outcome(NamedTuple):
    """What the cells of one question say."""

    question: Question
    cells: list[CellRates]
    verdicts: list[Verdict]
    found: list[Finding]
    prompts: list[str]
    """Evaluation prompts."""
    traits: list[str]
    """A, B, then C."""
    judge: str
    seconds: float
    """Of all its cells, where they were timed."""
    unlike: list[str]
    """What cells of a seed should share and do not."""


class Example(NamedTuple):
    """A flagged row."""

    question: Question
    group: str
    row: int
    shows: bool | None
    """Whether it shows B, by provenance."""
    prompt: str
    response: str
    words: Sequence[tuple[str, int]] | None = None
    """As `read_marked` gives them; None: the detector marks none."""


EXAMPLES = 3
"""Flagged rows that are shown a detector and mixture."""


def examples(raw: Mapping[str, Any], wanted: Iterable[Cell]) -> list[Example]:
    """The strongest flagged rows of each detector's first seed, where mixture and flags lie in this checkout."""
    told, seen = [], set()
    for cell in wanted:
        params = cell.params(raw)
        if GROUPS[cell.group].on != "flagged" or (cell.question, cell.group) in seen:
            continue
        rows, flags = Path(resolve(ROWS, params)), plan.detection_folder(params) / "flags.jsonl"
        if not rows.exists() or not flags.exists():
            continue
        seen.add((cell.question, cell.group))
        chats, marked, words = read_mixture(rows), read_jsonl(flags, dict), read_marked(flags.parent)
        own = [i for i, flag in enumerate(marked) if flag["flagged"]]
        own.sort(key=lambda i: -(marked[i]["score"] or 0.0))
        told += [
            Example(cell.question, cell.group, i, chats[i].shows_negative, chats[i].prompt[-1].content[:160], chats[i].response,
                    words.get(i))
            for i in own[:EXAMPLES]
        ]  # fmt: skip
    return told


def spent(rows: "Iterable[Run]") -> float:
    """Seconds that the stages of some rows took; a stage that they share (the base model's, the judge's) counts once.

    Such a stage was timed once, so that its time stands in every row; two runs of one that agree to a hundredth of a second
    are rare, or take none.
    """
    return sum(seconds for _, seconds in {entry for row in rows for entry in plan.row_seconds(row).items()})


def outcomes(raw: Mapping[str, Any], rows: "Mapping[Cell, Run]") -> list[Outcome]:
    """What rows say, question by question."""
    from inoculation.rows import counted, unlike

    evaluate, told = raw["evaluate"], []
    for question in dict.fromkeys(cell.question for cell in rows):
        own = {cell: row for cell, row in rows.items() if cell.question == question}
        params = Cell(*question, "base", 0).params(raw)
        traits = plan.traits(params)
        rates = [counted(row) for row in own.values()]
        found = {
            (GROUPS[cell.group].detector, cell.seed): Finding(
                str(GROUPS[cell.group].detector), cell.seed, row.data.tags.get("system_prompt"),
                row.data.tags["detection.reason"],
                *(row.data.metrics.get(name) for name in ("precision", "recall", "flagged")),
            )
            for cell, row in own.items()
            if GROUPS[cell.group].on == "flagged"
        }  # fmt: skip
        told.append(
            Outcome(
                question, rates, verdicts(rates, traits, evaluate["bootstrap"]), list(found.values()), evaluate["system_prompts"], traits,
                plan.judge_name(params), spent(own.values()), unlike([*own.values()]),
            )
        )  # fmt: skip
    return told


class Figure(NamedTuple):
    """A figure of the study."""

    number: int
    title: str
    question: Question
    prompts: tuple[str, ...]
    groups: tuple[str, ...]
    leakage: bool = False
    """Drawn as a line a group instead of a panel a prompt."""


def figures(chosen: Selection, raw: Mapping[str, Any]) -> list[Figure]:
    """The study's sixteen figures (reference section 8), of those mixtures and profiles that were chosen.

    A figure keeps its number whatever else was chosen: 1-6 and 7-12 are the mixtures, 13 and 14 the irrelevant prompts, then
    transfer, then, where answers are sampled under more than two prompts, leakage.
    """
    profile, prompts, every = str(raw["profile"]), tuple(raw["evaluate"]["system_prompts"]), mixtures_of(raw)
    found = []
    for pair in chosen.mixtures:
        question, number = Question(profile, *pair), 1 + every.index(pair)
        found.append(Figure(number, "Q1, B is known", question, prompts[:1], KNOWN))
        found.append(Figure(number + len(every), "Q2, B is unknown", question, prompts[:1], unknown_groups()))
    first, number = Question(profile, *chosen.mixtures[0]), 2 * len(every)
    for prompt in prompts[:2]:
        number += 1
        found.append(Figure(number, "is any prompt enough?", first, (prompt,), (*KNOWN, *IRRELEVANT)))
    for other in chosen.transfer:
        number += 1
        title = f"transfer: {raw['annotator']}'s annotations"
        found.append(Figure(number, title, Question(other, *chosen.mixtures[0]), prompts[:1], unknown_groups()))
    title = "alternatives and leakage: does B come back?"
    found += [
        Figure(LEAKAGE_FROM + every.index(pair), title, Question(profile, *pair), prompts, LEAKAGE, leakage=True)
        for pair in (chosen.mixtures if len(prompts) > 2 else ())
    ]
    return sorted(found, key=lambda figure: figure.number)


def draw_all(folder: Path, wanted: Sequence[Figure], told: Sequence[Outcome], raw: Mapping[str, Any]) -> list[Figure]:
    """Draw figures as PNG, SVG and PDF, `figure-01.png` and so on; those without a cell are left out, older ones go.

    Returns:
        What was drawn.
    """
    from tqdm import tqdm

    from inoculation.figure import draw, draw_leakage

    by = {outcome.question: outcome for outcome in told}
    drawn = []
    for path in folder.glob("figure-*.*"):
        path.unlink()  # of other cells or parameters
    for figure in tqdm(wanted, desc="figures"):
        outcome = by.get(figure.question)
        own = [cell for cell in outcome.cells if cell.group in figure.groups] if outcome else []
        if not own:
            continue
        assert outcome is not None
        (draw_leakage if figure.leakage else draw)(
            [folder / f"figure-{figure.number:02}.{suffix}" for suffix in ("png", "svg", "pdf")], own,
            prompts=figure.prompts, traits=outcome.traits,
            title=f"Figure {figure.number}: {figure.question}\n{figure.title}",
            note=f"judge: {outcome.judge}; 95 % intervals over questions and seeds",
            resamples=raw["evaluate"]["bootstrap"],
        )  # fmt: skip
        drawn.append(figure)
    return drawn


def summary(told: Sequence[Outcome]) -> str:
    """How many claims hold, mixture by mixture, as Markdown: MLflow cuts a longer note."""
    head = " | ".join(VERDICTS)
    lines = [f"| mixture | cells | {head} |", "|---|---|---|---|---|"]
    for outcome in told:
        counts = [sum(one.verdict == name for one in outcome.verdicts) for name in VERDICTS]
        lines.append(f"| {outcome.question} | {len(outcome.cells)} | {' | '.join(map(str, counts))} |")
    return "\n".join([*lines, "", "Every claim: artifacts `verdicts.md` and `report.html`."])


def log_report(name: str, folder: Path, told: Sequence[Outcome]) -> None:
    """Log a folder's report and figures to MLflow: one run of a name in the experiment `study`, replaced by each newer one."""
    from inoculation import effects

    with replacing_run(name):
        import mlflow

        for path in folder.iterdir():
            if path.is_file():  # the folders are parts' own
                mlflow.log_artifact(str(path))
        decided = [one for outcome in told for one in outcome.verdicts]
        for name in VERDICTS:
            mlflow.log_metric(name.replace(" ", "_"), sum(one.verdict == name for one in decided))
        mlflow.log_text("\n\n".join(f"## {o.question}\n\n{effects.markdown(o.verdicts)}" for o in told), "verdicts.md")
        mlflow.set_tag("mlflow.note.content", summary(told))


@contextmanager
def replacing_run(name: str) -> Iterator[None]:
    """A run of the experiment `study`; when it is whole, older ones of its name go."""
    from inoculation import tracking

    with tracking.run("study", name) as started:
        import mlflow

        yield
        older = mlflow.search_runs(
            filter_string=f"attributes.run_name = '{name}' and attributes.run_id != '{started.info.run_id}'",
            output_format="list",
        )
        for run in older:
            mlflow.delete_run(run.info.run_id)
