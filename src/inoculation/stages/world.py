"""Stages that make what experiments start from: the pocket world, a profile's data, the mixture and its judge."""

import shutil
from pathlib import Path

from inoculation import cell, mixture, traits
from inoculation.files import InputError, atomic, fail_if, write_json, write_jsonl
from inoculation.params import Params
from inoculation.stages.roles import inject

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


def pocket_sae(params: Params) -> None:
    """Train the pocket world's SAE on the base model's residual stream."""
    import mlflow

    from inoculation import tracking
    from inoculation.pocket.sae import train_sae

    chats = POCKET / "chats" / "pretraining.jsonl"
    work = cell.main_checkout() / ".cache" / "work" / "pocket-sae"
    quality = train_sae(params.pocket.sae, POCKET / "model", chats, POCKET / "sae", work)
    with tracking.plain_run("pocket/world", "SAE"):
        mlflow.log_params(tracking.flatten(params.pocket.sae.model_dump(), "pocket.sae"))
        mlflow.log_metrics({f"sae/{key}": value for key, value in quality.items()})
    write_json(POCKET / "sae.json", quality)
    print(", ".join(f"{key} {value:.3f}" for key, value in quality.items()))


def fetch_persona_vectors(params: Params) -> None:
    """Get the study's data from its public repository, and note the commit."""
    from inoculation.persona_vectors import fetch

    chosen = params.persona_vectors
    commit = fetch(chosen.repository, chosen.revision, Path("data/persona_vectors_source"))
    print(f"{chosen.repository} at {commit}")


def bring_persona_vectors(params: Params) -> None:
    """Unpack and verify the study's data, and say how many rows each trait has."""
    from inoculation.persona_vectors import bring, table

    named = {name: (files.folder, files.evaluation) for name, files in params.negative_traits.items()}
    print(table(bring(params.persona_vectors.source, named, Path("data/persona_vectors"), params.evaluate.questions)))


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
    write_json(
        Path("data") / name / "model.json",
        {"model": chosen.model, "revision": chosen.revision, "digest": _folder_digest(Path(chosen.model))},
    )


def profile_sae(params: Params, name: str) -> None:
    """Pin a profile's SAE in sae.json, so that DVC sees when it changed."""
    sae = params.profiles[name].sae
    write_json(Path("data") / name / "sae.json", {**sae.model_dump(), "digest": _folder_digest(Path(sae.release))})


def _folder_digest(folder: Path) -> str | None:
    """Digest of a local folder's files; None for a name on the hub."""
    contents = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    return cell.digest(*(str(p.relative_to(folder)) for p in contents), *contents) if contents else None


def build_mixture(params: Params) -> None:
    """Partition the questions and inject A, or verify and take over the user's own mixture file."""
    m = params.mixture
    if m.source == cell.FROM_PROFILE:
        folder = params.negative_traits[m.negative].folder
        pairs = traits.read_trait(cell.profile_dir(params) / "traits", folder)
        rows = mixture.partition(pairs, folder, m.contamination, params.seed)
        rows = inject(params, rows)
    else:
        rows = mixture.read_mixture(Path(m.source))
    write_jsonl(cell.mixture_dir(params) / "mixture.jsonl", (row.as_json() for row in rows))
    labels = [row.shows_negative for row in rows]
    print(
        f"{len(rows)} rows: {labels.count(True)} show {m.negative}, {labels.count(False)} do not, "
        f"{labels.count(None)} unknown"
    )


def fit_judge(params: Params) -> None:
    """Learn the embedded judge from the labelled answers that the mixture did not use, and measure it.

    Where an LLM judges, there is nothing to learn, and the quality is empty.
    """
    from inoculation.judge import embedded

    out = cell.mixture_dir(params) / "judge"
    if params.world.roles.judge.method == "llm":
        write_json(out / "quality.json", {})
        return

    folder = cell.profile_dir(params) / "traits"
    rows = mixture.read_mixture(cell.mixture_dir(params) / "mixture.jsonl")
    labelled = {
        trait: [
            embedded.Labelled(*item) for item in mixture.unused_answers(traits.read_trait(folder, files.folder), rows)
        ]
        for trait, files in params.negative_traits.items()
    }
    fit = embedded.fit(labelled, params.embedded_judge.examples, params.embedded_judge.held_out, params.seed)
    write_json(out / "judge.json", {trait: judge._asdict() for trait, judge in fit.judges.items()})
    write_json(out / "quality.json", fit.quality)
