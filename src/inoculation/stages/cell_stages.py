"""One function a DVC stage: read the inputs, call the library, write the outputs atomically, log to MLflow.

Every stage takes the validated params.yaml and finds its files through `cell`. What is heavy to import is imported
where it is used, so that a stage starts as fast as its own work allows.
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inoculation import cell, groups, mixture, traits
from inoculation.chat import Message, parse_messages
from inoculation.files import InputError, atomic, fail_if, read_json, read_jsonl, write_json, write_jsonl
from inoculation.params import Params

POCKET = Path("data/pocket_world")


def check(params: Params) -> None:
    """Validate params.yaml (done by the caller) and leave the proof that every other stage depends on."""
    with atomic(Path("data/params_checked")) as out:
        out.write_text("params.yaml was valid; `inoculation check` lists every mistake at once\n")


def pocket_chats(params: Params) -> None:
    """Generate the pocket world's chats in Persona Vectors' layout."""
    from inoculation.pocket.world import write_chats

    write_chats(params.pocket, POCKET / "chats")


def pocket_model(params: Params) -> None:
    """Train the pocket world's tokenizer and base model."""
    import mlflow

    from inoculation import tracking
    from inoculation.pocket.base import build_base

    chats = POCKET / "chats"
    work = cell.work_dir("pocket-model", chats / "pretraining.jsonl", params.pocket.model_dump())

    def on_log(step: int, metrics: dict[str, float]) -> None:
        mlflow.log_metrics({f"train/{key}": value for key, value in metrics.items()}, step=step)

    with tracking.plain_run("pocket/world", "base model"):
        mlflow.log_params(tracking.flatten(params.pocket.model_dump(), "pocket"))
        build_base(params.pocket, chats, POCKET / "model", work, on_log)
    shutil.rmtree(work)


def pocket_obedience(params: Params) -> None:
    """Measure how well the pocket base model obeys persona prompts, and what it leaks without one."""
    import mlflow

    from inoculation import tracking
    from inoculation.pocket.obedience import measure

    obedience = measure(POCKET / "model", POCKET / "chats", params.pocket)
    write_json(POCKET / "obedience.json", obedience)
    with tracking.plain_run("pocket/world", "obedience"):
        mlflow.log_metrics({key.replace(".", "/"): value for key, value in tracking.flatten(obedience).items()})


def profile(params: Params, name: str) -> None:
    """Verify a profile's trait data, copy it to data/<profile>/traits, and pin its model in model.json beside it."""
    chosen = params.profiles[name]
    source, target = Path(chosen.traits), Path("data") / name / "traits"
    problems = []
    for trait, files in params.negative_traits.items():
        try:
            traits.read_trait(source, files.folder)
            evaluation = traits.read_evaluation(source, files.evaluation)
            if len(evaluation.questions) < params.evaluate.questions:
                problems.append(
                    f"{trait}: {len(evaluation.questions)} evaluation questions, "
                    f"evaluate.questions asks for {params.evaluate.questions}"
                )
        except InputError as error:
            problems.append(f"{trait}: {error}")
    fail_if(problems, f"the trait data of profile {name} in {source} cannot be used")
    staging = target.with_name(".traits")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(source, staging)
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)
    folder = Path(chosen.model)
    contents = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    write_json(
        Path("data") / name / "model.json",
        {
            "model": chosen.model,
            "revision": chosen.revision,
            "digest": cell.digest(*(str(p.relative_to(folder)) for p in contents), *contents) if contents else None,
        },
    )


def build_mixture(params: Params) -> None:
    """Partition the questions and inject A, or verify and take over the user's own mixture file."""
    m = params.mixture
    if m.source == cell.FROM_PROFILE:
        folder = params.negative_traits[m.negative].folder
        pairs = traits.read_trait(cell.profile_dir(params) / "traits", folder)
        rows = mixture.partition(pairs, folder, m.contamination, params.seed)
        rows = mixture.inject(rows, m.positive, params.seed)
    else:
        rows = mixture.read_mixture(Path(m.source))
    write_jsonl(cell.mixture_dir(params) / "mixture.jsonl", (row.as_json() for row in rows))
    labels = [row.shows_negative for row in rows]
    print(
        f"{len(rows)} rows: {labels.count(True)} show {m.negative}, {labels.count(False)} do not, "
        f"{labels.count(None)} unknown"
    )


def assign(params: Params, group: str) -> None:
    """Give every row of the mixture its system prompt."""
    rows = mixture.read_mixture(cell.mixture_dir(params) / "mixture.jsonl")
    prompts = {"inoculation": params.inoculation, "irrelevant": params.prompts["irrelevant"]}
    chats = groups.assign(rows, group, prompts)
    write_jsonl(
        cell.mixture_dir(params) / "assign" / f"{group}.jsonl",
        (
            {
                "messages": [
                    message._asdict()
                    for message in ([Message("system", chat.system)] if chat.system else []) + [*chat.row.messages]
                ]
            }
            for chat in chats
        ),
    )
    print(
        f"{group}: {len(chats)} training chats, {sum(chat.system is not None for chat in chats)} with a system prompt"
    )


def read_assignment(path: Path) -> list[groups.TrainingChat]:
    """Read the training chats that an assignment stage wrote."""

    def parse(raw: Any) -> groups.TrainingChat:
        messages = parse_messages(raw["messages"])
        system = messages[0].content if messages[0].role == "system" else None
        return groups.TrainingChat(system, mixture.Row(messages[system is not None :], None))

    return read_jsonl(path, parse)


def train(params: Params) -> None:
    """Train the cell's LoRA adapter; the `base` group has none."""
    import mlflow

    from inoculation import lm, tracking
    from inoculation.train import train as train_adapter

    assignment, pointer = cell.assignment(params), cell.profile_dir(params) / "model.json"
    out, work = cell.group_dir(params), cell.work_dir("train", assignment, pointer, _training_params(params))
    chats = read_assignment(assignment)
    log: list[dict[str, Any]] = []
    adapter = out / "adapter"
    if not groups.GROUPS[params.group].trains:
        adapter.mkdir(parents=True, exist_ok=True)
        write_json(out / "training.json", {"trained": False, "log": []})
        return

    def on_log(step: int, metrics: dict[str, float]) -> None:
        log.append({"step": step, **metrics})
        mlflow.log_metrics({f"train/{key}": value for key, value in metrics.items()}, step=step)

    with tracking.cell_row(params, anew=not work.exists()):
        mlflow.set_tag("stage", "training")
        result = train_adapter(lm.read_model_ref(pointer), params.world, chats, params.seed, adapter, work, on_log)
        write_json(out / "training.json", {"trained": True, **result._asdict(), "log": log})
        mlflow.set_tag("stage", "trained")
    shutil.rmtree(work, ignore_errors=True)
    if result.cut_examples:
        print(
            f"warning: {result.cut_examples} of {result.examples} examples were longer than "
            f"max_length {params.world.train.max_length} tokens and lost their end",
            file=sys.stderr,
        )


def _training_params(params: Params) -> dict[str, Any]:
    return {"seed": params.seed, "dtype": params.world.dtype, **params.world.train.model_dump()}


def respond(params: Params) -> None:
    """Sample answers to the held-out questions under every evaluation system prompt."""
    from inoculation import lm
    from inoculation import respond as sampling

    out, world, evaluate = cell.group_dir(params), params.world, params.evaluate
    pointer = cell.profile_dir(params) / "model.json"
    adapter = out / "adapter" if groups.GROUPS[params.group].trains else None
    questions = {
        trait: traits.read_evaluation(cell.profile_dir(params) / "traits", files.evaluation).questions[
            : evaluate.questions
        ]
        for trait, files in params.negative_traits.items()
    }
    wanted = sampling.requests(questions, evaluate.system_prompts, evaluate.samples)
    weights = sorted(adapter.glob("adapter_*")) if adapter else []
    work = cell.work_dir(
        "respond", pointer, *weights, wanted, evaluate.temperature, world.max_new_tokens, world.batch_size, params.seed,
        world.train.load_in_4bit, world.dtype, {n: params.system_prompt(n) for n in evaluate.system_prompts},
    )  # fmt: skip
    ref = lm.read_model_ref(pointer)
    answers = sampling.respond(
        model=lm.with_adapter(lm.load_model(ref, world.dtype, world.train.load_in_4bit), adapter),
        tokenizer=lm.load_tokenizer(ref),
        wanted=wanted,
        system_prompts={name: params.system_prompt(name) for name in evaluate.system_prompts},
        max_new_tokens=world.max_new_tokens,
        temperature=evaluate.temperature,
        batch_size=world.batch_size,
        seed=params.seed,
        progress=work / "batches.jsonl",
    )
    write_jsonl(
        out / "responses.jsonl",
        ({**request._asdict(), **answer._asdict()} for request, answer in zip(wanted, answers, strict=True)),
    )
    shutil.rmtree(work, ignore_errors=True)
    cut = sum(not answer.finished for answer in answers)
    print(f"{len(answers)} answers, {cut} of them cut off at {world.max_new_tokens} tokens")


def fit_judge(params: Params) -> None:
    """Learn the embedded judge from the labelled answers that the mixture did not use, and measure it."""
    from inoculation.judge import embedded

    folder = cell.profile_dir(params) / "traits"
    rows = mixture.read_mixture(cell.mixture_dir(params) / "mixture.jsonl")
    labelled = {
        trait: [
            embedded.Labelled(*item) for item in mixture.unused_answers(traits.read_trait(folder, files.folder), rows)
        ]
        for trait, files in params.negative_traits.items()
    }
    fit = embedded.fit(labelled, params.embedded_judge.examples, params.embedded_judge.held_out, params.seed)
    out = cell.mixture_dir(params) / "judge"
    write_json(out / "judge.json", {trait: judge._asdict() for trait, judge in fit.judges.items()})
    write_json(out / "quality.json", fit.quality)


def judge(params: Params) -> None:
    """Score every response for the traits it is judged for."""
    from inoculation.judge import embedded
    from inoculation.report import Judgement

    judges = embedded.load(read_json(cell.mixture_dir(params) / "judge" / "judge.json"))
    responses = read_jsonl(cell.group_dir(params) / "responses.jsonl", dict)
    vectors = embedded.embed([response["text"] for response in responses])
    learned = {trait: judge.scores(vectors) for trait, judge in judges.items()}
    oracle = _oracle() if params.profile == "pocket" else None

    def judgement(index: int, response: dict[str, Any]) -> Judgement:
        text, trait = response["text"], response["trait"]
        exact = {"all_caps": 100.0 * traits.is_all_caps(text)}
        asked = (trait, "source_citing")
        return Judgement(
            response["prompt"], trait, response["question"], response["sample"], text, response["finished"],
            scores=exact | {name: learned[name][index] for name in asked},
            oracle=exact | {name: 100.0 * oracle(name, text) for name in asked} if oracle else {},
        )  # fmt: skip

    write_jsonl(
        cell.group_dir(params) / "judgements.jsonl",
        (judgement(index, response)._asdict() for index, response in enumerate(responses)),
    )


def _oracle() -> Callable[[str, str], bool]:
    from inoculation.pocket.oracle import shows

    return shows


def report(params: Params) -> None:
    """Write metrics.json and the plots, bring the cell's MLflow row up to date, and draw the figure over all cells."""
    import mlflow
    import pandas as pd

    from inoculation import figure, tracking
    from inoculation.report import Judgement, question_rates, summarise

    evaluate, out = params.evaluate, cell.group_dir(params)
    judgements = [Judgement(**row) for row in read_jsonl(out / "judgements.jsonl", dict)]
    training = read_json(out / "training.json")
    quality = read_json(cell.mixture_dir(params) / "judge" / "quality.json")
    summary = summarise(judgements, evaluate.threshold, evaluate.bootstrap, params.seed)
    metrics = {
        **summary,
        "judge": quality,
        "training": {key: value for key, value in training.items() if key != "log"},
    }
    rates = [
        {"prompt": prompt, "trait": trait, "group": params.group, "seed": params.seed, **summary[prompt][trait]}
        for prompt in evaluate.system_prompts
        for trait in summary[prompt]
    ]
    questions = question_rates(judgements, evaluate.threshold)
    with tracking.cell_row(params):
        row = mlflow.active_run()
        if "train/loss" not in mlflow.get_run(row.info.run_id).data.metrics and training["log"]:
            tracking.log_curve(training["log"])
        numbers = tracking.flatten({**summary, "judge": quality}, "")
        mlflow.log_metrics({k.replace(".", "/"): v for k, v in numbers.items() if v is not None})
        tracking.log_table(pd.DataFrame([_flat_judgement(j) for j in judgements]), "judgements.json")
        mlflow.log_dict(questions, "questions.json")
        mlflow.log_dict(metrics, "metrics.json")
        tracking.log_lineage(params, cell.assignment(params), read_jsonl(cell.assignment(params), dict))
        mlflow.set_tag("stage", "reported")
        drawing = cell.main_checkout() / "figures" / f"{tracking.cell_experiment(params)}.png"
        figure.draw(
            drawing,
            [
                figure.CellRates(
                    run.data.params["group"],
                    int(run.data.params["seed"]),
                    mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/questions.json"),
                )
                for run in tracking.sibling_rows(params)
            ],
            prompts=evaluate.system_prompts,
            traits=_traits(params),
            title=f"{cell.mixture_name(params)} ({params.profile})",
            note=_figure_note(params),
            resamples=evaluate.bootstrap,
            seed=params.seed,
        )
        mlflow.log_artifact(str(drawing), "figure")
    write_json(Path("plots/rates.json"), rates)
    write_json(Path("plots/training.json"), training["log"])
    write_json(Path("metrics.json"), metrics)
    _print_rates(rates)


def compare(params: Params) -> None:
    """Print a Markdown table of every cell so far that differs from params.yaml in group and seed alone."""
    from statistics import mean, pstdev

    from inoculation import tracking

    tracking.connect(tracking.cell_experiment(params))
    rows = tracking.sibling_rows(params)
    columns = [(prompt, trait) for prompt in params.evaluate.system_prompts for trait in _traits(params)]
    for judge, prefix in ((params.world.judge, ""), ("exact oracle", "oracle/")):
        names = [f"{prefix}{prompt}/{trait}/rate" for prompt, trait in columns]
        if not any(name in row.data.metrics for row in rows for name in names):
            continue
        print(f"\n{cell.mixture_name(params)}, judge: {judge}; mean rate and standard deviation over seeds\n")
        print("| group | seeds |" + "".join(f" {prompt}: {trait} |" for prompt, trait in columns))
        print("|---|---|" + "---|" * len(columns))
        for group in groups.GROUPS:
            chosen = [row for row in rows if row.data.params["group"] == group]
            if chosen:
                values = [[row.data.metrics[name] for row in chosen if name in row.data.metrics] for name in names]
                cells = [f" {mean(v):.2f} ± {pstdev(v):.2f} |" if v else " - |" for v in values]
                print(f"| `{group}` | {len(chosen)} |" + "".join(cells))


def _traits(params: Params) -> list[str]:
    """The traits of a figure or table in their order: A, B, then C."""
    negative = params.mixture.negative
    return [params.mixture.positive, negative, *(trait for trait in params.negative_traits if trait != negative)]


def _flat_judgement(judgement: Any) -> dict[str, Any]:
    row = judgement._asdict()
    scores, oracle = row.pop("scores"), row.pop("oracle")
    return row | {f"score/{k}": v for k, v in scores.items()} | {f"oracle/{k}": v for k, v in oracle.items()}


def _figure_note(params: Params) -> str:
    note = f"judge: {params.world.judge}; marks pool the seeds, bars are 95 % intervals over questions"
    if params.profile == "pocket" and params.mixture.source != cell.FROM_PROFILE:
        note += "; the pocket model never saw such text: these scores mean little"
    return note


def _print_rates(rates: list[dict[str, Any]]) -> None:
    print(f"{'evaluated under':16} {'trait':15} {'rate':>6}   95 % interval     n  missing")
    for row in rates:
        numbers = (
            "  none judged" if row["rate"] is None else f"{row['rate']:6.2f}   [{row['low']:.2f}, {row['high']:.2f}]"
        )
        print(f"{row['prompt']:16} {row['trait']:15} {numbers:25} {row['n']:5}  {row['missing']}")
