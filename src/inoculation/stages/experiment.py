"""Stages of one experiment cell: its training chats, adapter, answers, judgements and report."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inoculation import cell, groups, mixture, traits
from inoculation.chat import Message, parse_messages
from inoculation.files import InputError, read_json, read_jsonl, write_json, write_jsonl
from inoculation.params import Params
from inoculation.stages.roles import client


def assign(params: Params, group: str) -> None:
    """Give every row of the mixture its system prompt, and say in a summary beside it what was decided and by whom."""
    rows = mixture.read_mixture(cell.mixture_dir(params) / "mixture.jsonl")
    detector = groups.GROUPS[group].detector
    prompts = {"inoculation": params.inoculation, "irrelevant": params.prompts["irrelevant"]}
    flags = detected = None
    if detector:
        found = (
            cell.sae_dir(params) if detector == "sae" else cell.audit_dir(params) / params.world.roles.auditor.method
        )
        made = read_json(found / "prompt.json")
        if made["prompt"] is None:
            raise InputError(
                f"group {group} has nothing to train under: {made['reason']}. {found / 'page.html'} shows what was seen"
            )
        prompts[detector] = made["prompt"]
        flags = [row["flagged"] for row in read_jsonl(found / "flags.jsonl", dict)]
        detected = read_json(found / "detection.json")["detection"]
    chats = groups.assign(rows, group, prompts, flags, params.seed)
    path = cell.mixture_dir(params) / "assign" / f"{group}.jsonl"
    write_jsonl(
        path,
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
    inoculated = sum(chat.system is not None for chat in chats)
    write_json(
        path.with_suffix(".json"),
        {
            "examples": len(chats),
            "with_system_prompt": inoculated,
            "system_prompt": prompts.get(groups.GROUPS[group].prompt),
            "detection": detected,
        },
    )
    print(f"{group}: {len(chats)} training chats, {inoculated} with a system prompt")


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
        if "loss" in metrics:  # the last report is about speed: the same training gives the same file
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


def judge(params: Params) -> None:
    """Score every response for the traits it is judged for."""
    from inoculation.report import Judgement

    responses = read_jsonl(cell.group_dir(params) / "responses.jsonl", dict)
    judged = (
        _judged_by_llm(params, responses) if params.world.roles.judge.method == "llm" else _judged(params, responses)
    )
    oracle = _oracle() if params.profile == "pocket" else None

    def judgement(response: dict[str, Any], scores: dict[str, float | None]) -> Judgement:
        text = response["text"]
        exact: dict[str, float | None] = {"all_caps": 100.0 * traits.is_all_caps(text)}
        asked = (response["trait"], "source_citing")
        return Judgement(
            response["prompt"], response["trait"], response["question"], response["sample"], text, response["finished"],
            scores=exact | scores,
            oracle=exact | {name: 100.0 * oracle(name, text) for name in asked} if oracle else {},
        )  # fmt: skip

    write_jsonl(
        cell.group_dir(params) / "judgements.jsonl",
        (judgement(response, scores)._asdict() for response, scores in zip(responses, judged, strict=True)),
    )


def _judged(params: Params, responses: list[dict[str, Any]]) -> list[dict[str, float | None]]:
    """Scores of the embedded judge: the asked trait and SOURCE_CITING."""
    from inoculation.judge import embedded

    judges = embedded.load(read_json(cell.mixture_dir(params) / "judge" / "judge.json"))
    vectors = embedded.embed([response["text"] for response in responses])
    learned = {trait: judge.scores(vectors) for trait, judge in judges.items()}
    return [
        {name: learned[name][index] for name in (response["trait"], "source_citing")}
        for index, response in enumerate(responses)
    ]


def _judged_by_llm(params: Params, responses: list[dict[str, Any]]) -> list[dict[str, float | None]]:
    """Scores of the LLM judge: the asked trait, SOURCE_CITING and coherence."""
    from inoculation.judge import llm

    judge_client = client(params, "judge", required=True)
    rubrics = {
        trait: traits.read_evaluation(cell.profile_dir(params) / "traits", files.evaluation).eval_prompt
        for trait, files in params.negative_traits.items()
    }
    items = [
        item
        for response in responses
        for item in (
            llm.Item(rubrics[response["trait"]], llm.NUMBER, response["question"], response["text"]),
            llm.Item(llm.CITING, llm.YES_NO, response["question"], response["text"]),
            llm.Item(llm.COHERENT, llm.NUMBER, response["question"], response["text"]),
        )
    ]
    scores = llm.judge(judge_client, items)
    return [
        {response["trait"]: own[0], "source_citing": own[1], llm.COHERENCE: own[2]}
        for response, own in zip(responses, zip(*[iter(scores)] * 3, strict=True), strict=True)
    ]


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
    assigned = read_json(cell.assignment_summary(params))
    summary = summarise(judgements, evaluate.threshold, evaluate.bootstrap, params.seed)
    metrics = {
        **summary,
        "judge": quality,
        "training": {key: value for key, value in training.items() if key != "log"},
    }
    if assigned["detection"]:
        metrics["detection"] = assigned["detection"]
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
        detected = {"detection": assigned["detection"]} if assigned["detection"] else {}
        numbers = tracking.flatten({**summary, "judge": quality, **detected}, "")
        mlflow.log_metrics({k.replace(".", "/"): v for k, v in numbers.items() if v is not None})
        tracking.log_table(pd.DataFrame([_flat_judgement(j) for j in judgements]), "judgements.json")
        mlflow.log_dict(questions, "questions.json")
        mlflow.log_dict(metrics, "metrics.json")
        mlflow.log_dict(assigned, "assignment.json")
        if assigned["system_prompt"]:
            mlflow.set_tag("system_prompt", assigned["system_prompt"])
        if groups.GROUPS[params.group].detector == "sae":
            _log_sae(params)
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


def _log_sae(params: Params) -> None:
    """The feature table, the flags, the sensitivity figure and the page on the active row."""
    import mlflow
    import pandas as pd

    from inoculation import tracking

    folder = cell.sae_dir(params)
    latents = pd.DataFrame(read_json(folder / "latents.json"))
    classes = read_json(folder / "classes.json")["classes"]
    explanations = read_jsonl(folder / "explanations.jsonl", dict)
    latents["class"] = [classes[str(latent)]["class"] for latent in latents["latent"]]
    latents["description"] = [row["description"] for row in explanations]
    latents["link"] = [row["link"] for row in explanations]
    tracking.log_table(latents, "latents.json")
    flags = pd.DataFrame(read_jsonl(folder / "flags.jsonl", dict))
    tracking.log_table(flags.assign(latents=flags["latents"].map(str)), "flags.json")
    for name in ("sensitivity.png", "page.html"):
        mlflow.log_artifact(str(folder / name), "sae")


def compare(params: Params) -> None:
    """Print a Markdown table of every cell so far that differs from params.yaml in group and seed alone."""
    from statistics import mean, stdev

    from inoculation import tracking

    tracking.connect(tracking.cell_experiment(params))
    rows = tracking.sibling_rows(params)
    columns = [(prompt, trait) for prompt in params.evaluate.system_prompts for trait in _traits(params)]
    for judge, prefix in ((_judge_name(params), ""), ("exact oracle", "oracle/")):
        names = [f"{prefix}{prompt}/{trait}/rate" for prompt, trait in columns]
        if not any(name in row.data.metrics for row in rows for name in names):
            continue
        print(f"\n{cell.mixture_name(params)}, judge: {judge}; mean rate ± sample standard deviation over seeds\n")
        print("| group | seeds |" + "".join(f" {prompt}: {trait} |" for prompt, trait in columns))
        print("|---|---|" + "---|" * len(columns))
        for group in groups.GROUPS:
            chosen = [row for row in rows if row.data.params["group"] == group]
            if chosen:
                values = [[row.data.metrics[name] for row in chosen if name in row.data.metrics] for name in names]
                cells = [
                    (f" {mean(v):.2f} ± {stdev(v):.2f} |" if len(v) > 1 else f" {v[0]:.2f} |") if v else " - |"
                    for v in values
                ]
                print(f"| `{group}` | {len(chosen)} |" + "".join(cells))


def _traits(params: Params) -> list[str]:
    """The traits of a figure or table in their order: A, B, then C."""
    negative = params.mixture.negative
    return [params.mixture.positive, negative, *(trait for trait in params.negative_traits if trait != negative)]


def _flat_judgement(judgement: Any) -> dict[str, Any]:
    row = judgement._asdict()
    scores, oracle = row.pop("scores"), row.pop("oracle")
    return row | {f"score/{k}": v for k, v in scores.items()} | {f"oracle/{k}": v for k, v in oracle.items()}


def _judge_name(params: Params) -> str:
    role = params.world.roles.judge
    return str(role.model) if role.method == "llm" else "embedded"


def _figure_note(params: Params) -> str:
    note = f"judge: {_judge_name(params)}; marks pool the seeds, bars are 95 % intervals over questions"
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
