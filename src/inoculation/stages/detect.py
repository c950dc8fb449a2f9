"""Stages that find an unknown B before any training: base responses, the SAE route, the audit.

None of them reads provenance to decide anything; where it is known, `detection.json` says how good the flags are.
"""

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from inoculation import cell, mixture
from inoculation.files import InputError, atomic, fail_if, read_json, read_jsonl, write_json, write_jsonl
from inoculation.params import Params
from inoculation.stages.roles import client, inject

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from inoculation.sae.explain import Context


def _rows(params: Params) -> list[mixture.Row]:
    return mixture.read_mixture(cell.mixture_dir(params) / "mixture.jsonl")


def base_responses(params: Params) -> None:
    """The untouched model's answer to every prompt of the mixture."""
    from inoculation import lm
    from inoculation.respond import continue_chats

    world, rows = params.world, _rows(params)
    ref = lm.read_model_ref(cell.profile_dir(params) / "model.json")
    prompts = [row.prompt for row in rows]
    work = cell.work_dir(
        "base-responses", ref, [[list(message) for message in prompt] for prompt in prompts], params.seed,
        params.base_responses.temperature, world.max_new_tokens, world.batch_size, world.dtype,
    )  # fmt: skip
    answers = continue_chats(
        model=lm.load_model(ref, world.dtype, world.train.load_in_4bit),
        tokenizer=lm.load_tokenizer(ref),
        chats=[(prompt, None) for prompt in prompts],
        max_new_tokens=world.max_new_tokens,
        temperature=params.base_responses.temperature,
        batch_size=world.batch_size,
        seed=params.seed,
        progress=work / "batches.jsonl",
    )
    write_jsonl(cell.mixture_dir(params) / "base_responses.jsonl", (answer._asdict() for answer in answers))
    shutil.rmtree(work, ignore_errors=True)
    print(f"{len(answers)} base responses, {sum(not a.finished for a in answers)} cut at {world.max_new_tokens} tokens")


def _base_texts(params: Params, count: int) -> list[str]:
    texts = [row["text"] for row in read_jsonl(cell.mixture_dir(params) / "base_responses.jsonl", dict)]
    if len(texts) != count:
        raise InputError(f"{len(texts)} base responses for {count} rows; run the base_responses stage again")
    return texts


def _control(params: Params, rows: Sequence[mixture.Row], base: Sequence[str]) -> list[str | None]:
    """A seeded choice of the base responses with A injected; None for the others."""
    import random

    usable = [index for index, text in enumerate(base) if text.strip()]
    chosen = sorted(
        random.Random(f"control/{params.seed}").sample(usable, min(params.sae.control_examples, len(usable)))
    )
    answers = [rows[i].with_response(base[i])._replace(source_dataset=None) for i in chosen]
    control: list[str | None] = [None] * len(rows)
    for index, row in zip(chosen, inject(params, answers), strict=True):
        control[index] = row.response
    return control


def sae_features(params: Params) -> None:
    """Mean latents of target, base and control responses."""
    from inoculation import lm
    from inoculation.sae.encoder import load_sae, truncate_after
    from inoculation.sae.features import Texts, pool_examples, write_features

    rows, s = _rows(params), params.sae
    base = _base_texts(params, len(rows))
    control = _control(params, rows, base)
    ref = lm.read_model_ref(cell.profile_dir(params) / "model.json")
    sae = load_sae(params.world.sae.release, params.world.sae.id, lm.device())
    pieces = pool_examples(
        truncate_after(lm.load_model(ref, params.world.dtype, False), sae.block),
        sae,
        lm.load_tokenizer(ref),
        [Texts(row.prompt, row.response, b, c) for row, b, c in zip(rows, base, control, strict=True)],
        response_only=s.pool == "response_tokens",
        length_match=s.length_match,
        max_length=s.max_length,
        token_budget=s.token_budget,
    )
    write_features(cell.sae_dir(params) / "features.parquet", pieces)


def sae_rank(params: Params) -> None:
    """The latents that tell the data from the base model, and every example's values on them."""
    import numpy as np

    from inoculation.sae import rank
    from inoculation.sae.features import read_features

    out = cell.sae_dir(params)
    features = out / "features.parquet"
    moments = rank.moments(read_features(features), "whole")
    study = rank.moments(read_features(features), "matched")
    component = rank.component(read_features(features), moments)
    latents = rank.table(study, component, params.sae.latents)
    if not latents:
        raise InputError("no latent tells the data from the base model")
    print(f"variance along the component: {component.variance:.1f}; with random signs at most {component.floor:.1f}")
    columns = rank.columns(read_features(features), moments, component, [latent.latent for latent in latents])
    write_json(out / "latents.json", [latent._asdict() for latent in latents])
    with atomic(out / "columns.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **columns._asdict())


def _latents(params: Params) -> list[Any]:
    from inoculation.sae.rank import Latent

    return [Latent(**row) for row in read_json(cell.sae_dir(params) / "latents.json")]


def _columns(params: Params) -> "dict[str, np.ndarray]":
    import numpy as np

    with np.load(cell.sae_dir(params) / "columns.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def sae_explain(params: Params) -> None:
    """The strongest contexts of each latent in three sources, and its description."""
    from inoculation import lm
    from inoculation.sae import explain
    from inoculation.sae.encoder import load_sae, truncate_after
    from inoculation.sae.features import tokenise

    out, s = cell.sae_dir(params), params.sae
    explainer = client(params, "explainer")
    corpora = {"conversational": params.world.sae.conversational, "pretraining": params.world.sae.pretraining}
    files = {source: explain.corpus_file(spec) for source, spec in corpora.items()}
    texts = {k: explain.read_corpus(f, s.corpus) for k, f in files.items() if f.suffix != ".h5"}
    latents = [row.latent for row in _latents(params)]
    rows = _rows(params)
    ref = lm.read_model_ref(cell.profile_dir(params) / "model.json")
    tokenizer = lm.load_tokenizer(ref)
    sae = load_sae(params.world.sae.release, params.world.sae.id, lm.device())
    decoder = truncate_after(lm.load_model(ref, params.world.dtype, False), sae.block)
    sequences = {k: explain.corpus_tokens(tokenizer, corpus, s.max_length) for k, corpus in texts.items()}
    sequences["mixture"] = [tokenise(tokenizer, row.prompt, row.response, s.max_length, False).ids for row in rows]
    contexts: dict[int, list[Context]] = {latent: [] for latent in latents}
    for source in (*corpora, "mixture"):
        found = (
            explain.strongest(decoder, sae, tokenizer, sequences[source], latents, source, s.contexts, s.token_budget)
            if source in sequences
            else explain.read_published(files[source], tokenizer, latents, source, s.contexts)
        )
        for latent, own in found.items():
            contexts[latent] += own
    descriptions = (
        explain.describe_with_llm(explainer, [contexts[latent] for latent in latents], s.mark)
        if explainer
        else [explain.describe(contexts[latent], s.mark) for latent in latents]
    )
    write_jsonl(
        out / "explanations.jsonl",
        (
            {
                "latent": latent,
                "description": description,
                "link": f"https://www.neuronpedia.org/{sae.neuronpedia}/{latent}" if sae.neuronpedia else None,
                "contexts": [context._asdict() for context in contexts[latent]],
            }
            for latent, description in zip(latents, descriptions, strict=True)
        ),
    )


def sae_classify(params: Params) -> None:
    """Which latents are explained by the known A."""
    from inoculation.sae import classify

    out, c, positive = cell.sae_dir(params), params.sae.classify, params.mixture.positive
    role = params.world.roles.classifier
    columns = _columns(params)
    explanations = read_jsonl(out / "explanations.jsonl", dict)
    classes: dict[str, list[str]] = {}
    if role.method == "embedded" or c.both:
        classes["embedded"] = classify.causal(
            columns["difference"],
            columns["control_difference"],
            columns["base"],
            c.explained_by_a,
            c.neutral,
            c.top_share,
        )
    if role.method == "llm" or c.both:
        classes["llm"] = classify.with_llm(
            client(params, "classifier", required=True), positive, [row["description"] for row in explanations]
        )
    agreement = None
    if c.both:
        agreement = sum(a == b for a, b in zip(*classes.values(), strict=True)) / len(explanations)
        print(f"the two classifiers agree on {agreement:.0%} of {len(explanations)} latents")
    write_json(
        out / "classes.json",
        {
            "method": role.method,
            "agreement": agreement,
            "classes": {
                str(row["latent"]): {name: own[i] for name, own in classes.items()} | {"class": classes[role.method][i]}
                for i, row in enumerate(explanations)
            },
        },
    )
    counts = {name: classes[role.method].count(name) for name in ("yes", "neutral", "no")}
    print("latents by class: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


def _suspicious(params: Params) -> list[bool]:
    classes = read_json(cell.sae_dir(params) / "classes.json")["classes"]
    return [classes[str(row.latent)]["class"] == "no" for row in _latents(params)]


def sae_flag(params: Params) -> None:
    """Flag the examples, by both rules; the chosen one counts."""
    import numpy as np

    from inoculation import detection
    from inoculation.sae import figures, flag

    out, f = cell.sae_dir(params), params.sae.flag
    rows, latents, columns, suspicious = _rows(params), _latents(params), _columns(params), _suspicious(params)
    study = [i for i, row in enumerate(latents) if row.rank is not None]
    own = [i for i, row in enumerate(latents) if row.component_rank is not None]
    flags = {
        "study": flag.study(columns["matched_difference"][:, study], [suspicious[i] for i in study], f.study_top, f.study_hits),
        "component": flag.component(
            columns["residual"][:, own], columns["control_residual"][:, own],
            np.array([latents[i].loading for i in own]), [suspicious[i] for i in own], f.separation, f.control_share,
        ),
    }  # fmt: skip
    chosen = flags[f.rule]
    top = np.argsort(-columns["residual"] * np.asarray(suspicious), axis=1, kind="stable")[:, :5]
    write_jsonl(
        out / "flags.jsonl",
        (
            {
                "flagged": bool(chosen.flagged[i]),
                "score": float(chosen.score[i]),
                "study": bool(flags["study"].flagged[i]),
                "component": bool(flags["component"].flagged[i]),
                "latents": [latents[j].latent for j in top[i] if suspicious[j] and columns["residual"][i, j] > 0],
            }
            for i in range(len(rows))
        ),
    )
    truth = [row.shows_negative for row in rows]
    quality = {name: detection.quality(list(map(bool, own.flagged)), truth) for name, own in flags.items()}
    write_json(
        out / "detection.json",
        {
            "rule": f.rule,
            "found": chosen.found,
            "reason": chosen.reason,
            "threshold": chosen.threshold,
            "separation": chosen.separation,
            "control_share": chosen.control_share,
            "detection": quality[f.rule],
            "rules": quality,
        },
    )
    figures.sensitivity(
        out / "sensitivity.png", columns["matched_difference"][:, study], [suspicious[i] for i in study],
        flags["component"], truth, f.study_top, f.study_hits,
    )  # fmt: skip
    print(f"rule {f.rule}: {int(chosen.flagged.sum())} of {len(rows)} examples flagged; {chosen.reason}")


def sae_synthesise(params: Params) -> None:
    """Write one inoculation prompt from the suspicious latents and register it; `null` with its reason if there is none."""
    from inoculation import tracking
    from inoculation.sae import synthesise

    out = cell.sae_dir(params)
    writer = client(params, "synthesiser")
    detected = read_json(out / "detection.json")
    if not detected["found"]:
        write_json(out / "prompt.json", {"prompt": None, "reason": f"no example is flagged: {detected['reason']}"})
        print(f"no prompt: {detected['reason']}")
        return
    rows = _rows(params)
    flags = [row["flagged"] for row in read_jsonl(out / "flags.jsonl", dict)]
    suspicious, latents = _suspicious(params), _latents(params)
    ranked = [
        explanation["description"]
        for explanation, no, latent in zip(
            read_jsonl(out / "explanations.jsonl", dict), suspicious, latents, strict=True
        )
        if no and (latent.component_rank if params.sae.flag.rule == "component" else latent.rank) is not None
    ]
    descriptions = synthesise.without_near_duplicates(ranked, params.sae.near_duplicate)
    made = (
        synthesise.with_llm(writer, params.mixture.positive, descriptions)
        if writer
        else _by_likelihood(params, rows, flags)
    )
    write_json(out / "prompt.json", {**made._asdict(), "descriptions": descriptions})
    if made.prompt is None:
        print(f"no prompt: {made.reason}")
        return
    tracking.register_prompt(
        params,
        "sae",
        made.prompt,
        {
            "sae": f"{params.world.sae.release} {params.world.sae.id or ''}".strip(),
            "features": " ".join(str(row.latent) for row, no in zip(latents, suspicious, strict=True) if no),
            **{f"classify.{key}": value for key, value in params.sae.classify.model_dump().items()},
            **{f"flag.{key}": value for key, value in params.sae.flag.model_dump().items()},
        },
    )
    print(f"prompt: {made.prompt}")


def _by_likelihood(params: Params, rows: Sequence[mixture.Row], flags: Sequence[bool]) -> Any:
    """The candidate prompt that explains a seeded choice of flagged examples best."""
    import random

    from inoculation import lm
    from inoculation.sae.synthesise import by_likelihood

    rng = random.Random(f"synthesise/{params.seed}")
    flagged = [row for row, flag in zip(rows, flags, strict=True) if flag]
    others = [row for row, flag in zip(rows, flags, strict=True) if not flag]
    rng.shuffle(flagged)
    rng.shuffle(others)
    ref = lm.read_model_ref(cell.profile_dir(params) / "model.json")
    model = lm.load_model(ref, params.world.dtype, params.world.train.load_in_4bit)
    tokenizer: PreTrainedTokenizerBase = lm.load_tokenizer(ref)
    return by_likelihood(model, tokenizer, flagged, others, params.world.train.max_length, params.sae.token_budget)


def sae_page(params: Params) -> None:
    """A page that a person can read: every latent, every flagged example, and why."""
    from inoculation.sae import page

    out = cell.sae_dir(params)
    page.write(
        out / "page.html",
        title=f"{cell.mixture_name(params)} ({params.profile}, seed {params.seed})",
        rows=_rows(params),
        latents=_latents(params),
        explanations=read_jsonl(out / "explanations.jsonl", dict),
        classes=read_json(out / "classes.json")["classes"],
        flags=read_jsonl(out / "flags.jsonl", dict),
        detected=read_json(out / "detection.json"),
        prompt=read_json(out / "prompt.json")["prompt"],
        mark=params.sae.mark,
    )


def audit(params: Params, method: str) -> None:
    """Read every example, without or with an LLM, flag the suspicious ones and write a prompt from them."""
    import random

    from inoculation import audit as auditing
    from inoculation import detection, tracking

    out, a, rows = cell.audit_dir(params) / method, params.audit, _rows(params)
    writer = client(params, "synthesiser")  # before anything is paid for: is its key there?
    if method == "llm":
        auditor = client(params, "auditor", required=True)
        verdict = auditing.with_llm(auditor, params.mixture.positive, rows)
    else:
        base = _base_texts(params, len(rows))
        verdict = auditing.embedded(rows, base, _control(params, rows, base), a.separation, a.control_share)
    flags = verdict.flagged
    quality = detection.quality(flags, [row.shows_negative for row in rows])
    print(f"{sum(flags)} of {len(rows)} examples flagged; {verdict.reason}")
    fail_if([] if any(flags) else [verdict.reason], "the audit flagged no example, so that there is no prompt to write")
    chosen = [row for row, flag in zip(rows, flags, strict=True) if flag]
    random.Random(f"audit/{params.seed}").shuffle(chosen)
    made = (
        auditing.prompt_with_llm(writer, params.mixture.positive, chosen[: a.prompt_examples])
        if writer
        else _by_likelihood(params, rows, flags)
    )
    if made.prompt is None:
        raise InputError(f"the audit flagged {sum(flags)} examples, but no prompt explains them: {made.reason}")
    write_jsonl(
        out / "flags.jsonl",
        ({"flagged": flag, "score": score} for flag, score in zip(flags, verdict.scores, strict=True)),
    )
    write_json(out / "detection.json", {"method": method, "reason": verdict.reason, "detection": quality})
    write_json(out / "prompt.json", made._asdict())
    tracking.register_prompt(
        params,
        "audit",
        made.prompt,
        {"method": method, "auditor": str(params.world.roles.auditor.model), **a.model_dump()},
    )
    print(f"prompt: {made.prompt}")
