"""The SAE route: pooling against sae_lens itself, rankings and rules on planted latents, files of strangers, the page."""

import itertools
import json
import random
import shutil
from html.parser import HTMLParser
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY, WORDS, merge
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import SAE, TopKSAE, TopKSAEConfig
from scipy.sparse import csr_matrix

from inoculation import lm
from inoculation.chat import Message, chat_ids
from inoculation.detect import Annotator, Detection, Evidence, audit
from inoculation.detect import prompt as synthesise
from inoculation.detect.likelihood import log_likelihoods
from inoculation.detect.sae import classify, corpora, explain, figures, flag, page, rank, route
from inoculation.detect.sae.encoder import group_topk, load_sae
from inoculation.detect.sae.explain import Context
from inoculation.detect.sae.features import (
    Means,
    Piece,
    Sequence_,
    Texts,
    pool,
    pool_examples,
    read_features,
    tokenise,
    varying,
    write_features,
)  # fmt: skip
from inoculation.detect.sae.training import train_sae
from inoculation.detect.words import token_texts
from inoculation.files import InputError
from inoculation.lm import residuals, token_batches
from inoculation.mixture import Row
from inoculation.params import parse_params
from inoculation.pocket import world
from inoculation.pocket.oracle import shows
from inoculation.respond import generate

PARAMS = parse_params(merge(yaml.safe_load((ROOT / "params.yaml").read_text()), TINY))


class Loaded:
    """The tiny world's model, cut after the SAE's block, and whole."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        ref = self.ref = lm.ModelRef(model=str(folder / "models/qwen2"))
        self.tokenizer = lm.load_tokenizer(ref)
        self.sae = load_sae(str(folder / "sae"), None, "cpu")
        self.sae.sae.to(dtype)
        self.model = lm.load_model(ref).to(dtype)
        self.decoder = lm.truncate_after(lm.load_model(ref).to(dtype), self.sae.block)

    def latents(self, ids: list[int]) -> torch.Tensor:
        """By hand: what the whole model's block gives, seen by a hook, and `encode` of sae_lens, one sequence alone."""
        seen = []
        hook = self.model.model.layers[self.sae.block].register_forward_hook(lambda _, __, out: seen.append(out))
        with torch.inference_mode():
            self.model(torch.tensor([ids]))
            hook.remove()
            return self.sae.sae.encode(seen[0][0])

    def evil_under(self, system: str | None) -> float:
        """Share of the untouched model's answers that are evil under a system prompt."""
        asked = world.question_pool(random.Random(0)).held_out["evil"][:100]
        texts = [chat_ids(self.tokenizer, [Message("user", question.text)], system) for question in asked]
        return float(np.mean([shows("evil", a.text) for a in generate(self.model, self.tokenizer, texts, 48, 1.0, 0)]))


@pytest.fixture(scope="module")
def loaded(tiny) -> Loaded:
    return Loaded(tiny, torch.float32)


@pytest.fixture(scope="module")
def exact(tiny) -> Loaded:
    """In double precision: how a processor rounds carries no latent over its threshold, where its value jumps."""
    return Loaded(tiny, torch.float64)


def examples(count: int = 24) -> list[Texts]:
    rng = random.Random(0)

    def say(least: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, 60))).capitalize() + "."

    return [
        Texts((Message("user", say(2)),), say(1), say(1) if i != 3 else "", say(1).upper() if i % 3 == 0 else None)
        for i in range(count)
    ]


def pooled(loaded: Loaded, texts: list[Texts], budget: int, response_only: bool = False, match: bool = True):
    return pool_examples(
        loaded.decoder, loaded.sae, loaded.tokenizer, texts, response_only, match, max_length=48, token_budget=budget
    )


# ---- pooling


def test_positions_that_the_sae_was_not_trained_on_are_not_pooled(exact):
    """The first token of a real model is a sink that sets off nearly every latent."""
    texts, late = examples(6), exact.sae._replace(first=4)
    pieces = list(pool_examples(exact.decoder, late, exact.tokenizer, texts, False, False, 48, 8192))
    for piece in pieces:
        for row, index in enumerate(piece.examples):
            ids = tokenise(exact.tokenizer, texts[index].prompt, texts[index].target, 48, False).ids
            with torch.inference_mode():
                states = residuals(exact.decoder, [ids], 0)[0, 4:]
                by_hand = exact.sae.sae.encode(states.to(exact.sae.sae.W_dec.dtype)).mean(0).numpy()
            np.testing.assert_allclose(piece.whole.target[row].toarray()[0], by_hand, rtol=1e-6, atol=1e-9)
    [short] = pool(exact.decoder, late, [Sequence_(ids[:3], 0)], [[3]], 0)
    assert short.nnz, "a text without others is pooled over its last token"


@pytest.mark.parametrize("response_only", [False, True])
def test_a_prompt_that_is_too_long_loses_its_beginning_and_not_the_response(exact, response_only):
    """Else the row's own response is never read, and it looks like what the model itself would have said."""
    long, short = (tuple([Message("user", "Tell me more about gardening. " * count)]) for count in (40, 1))
    whole = tokenise(exact.tokenizer, short, "Rule by terror.", 48, True)
    told = tokenise(exact.tokenizer, long, "Rule by terror.", 48, response_only)
    said = list(whole.ids[whole.start :])
    assert len(told.ids) == 48 and list(told.ids[-len(said) :]) == said
    assert told.start == (48 - len(said) if response_only else 0)
    cut = tokenise(exact.tokenizer, short, "Rule by terror. " * 40, 48, True)
    assert len(cut.ids) == 48 and cut.start <= 1


def test_the_latents_that_vary_most_are_read_in_the_order_of_the_examples(exact):
    texts = examples()
    pieces = list(pooled(exact, texts, 300))
    target, base = varying(lambda: pieces, 50)
    order = np.argsort(np.concatenate([piece.examples for piece in pieces]))
    whole = np.vstack([piece.whole.target.toarray() for piece in pieces])[order]
    chosen = np.sort(np.argsort(-whole.var(0), kind="stable")[:50])
    assert target.shape == base.shape == (len(texts), 50)
    np.testing.assert_allclose(target.std(0).sum(), whole[:, chosen].std(0).sum(), rtol=1e-5)
    assert {tuple(np.round(row, 5)) for row in target} == {tuple(np.round(row, 5)) for row in whole[:, chosen]}


@pytest.mark.parametrize("budget", [1, 300, 8192])
@pytest.mark.parametrize("response_only", [False, True])
def test_pooling_is_a_mean_of_what_sae_lens_encodes_whatever_shares_the_batch(exact, budget, response_only):
    assert exact.sae.sae.cfg.architecture() == "jumprelu", "BatchTopK is stored with its learned threshold"
    texts = examples()
    active = 0
    for piece in pooled(exact, texts, budget, response_only):
        for row, index in enumerate(piece.examples):
            text = texts[index]
            cut = [
                None if own is None else tokenise(exact.tokenizer, text.prompt, own, 48, response_only)
                for own in (text.target, text.base, text.control)
            ]
            assert piece.has_control[row] == (text.control is not None)
            shorter = min(len(cut[0].ids), len(cut[1].ids))
            for kind, own in enumerate(cut):
                for means, end in ((piece.whole, None), (piece.matched, shorter)):
                    row_means = means[kind][row].toarray()[0]
                    if own is None:
                        assert not row_means.any()
                        continue
                    stop = min(len(own.ids), end or len(own.ids))
                    expected = exact.latents(own.ids)[min(own.start, stop - 1) : stop].mean(0).numpy()
                    np.testing.assert_allclose(row_means, expected, rtol=1e-4, atol=1e-5)
                    active += int((expected > 0).sum())
    assert active > 1000


def test_without_length_matching_both_poolings_are_one(loaded):
    for piece in pooled(loaded, examples(6), 8192, match=False):
        assert all((a != b).nnz == 0 for a, b in zip(piece.whole, piece.matched, strict=True))


def test_features_return_from_parquet(loaded, tmp_path):
    texts = examples()
    whole = list(pooled(loaded, texts, 300))
    write_features(tmp_path / "f.parquet", whole)
    read = list(read_features(tmp_path / "f.parquet", rows=5))
    assert [len(piece.examples) for piece in read] == [5, 5, 5, 5, 4]
    assert sorted(int(i) for piece in read for i in piece.examples) == list(range(len(texts)))

    def dense(pieces: list[Piece]) -> np.ndarray:
        order = np.argsort(np.concatenate([piece.examples for piece in pieces]))
        return np.stack(
            [np.concatenate([m.toarray() for m in column])[order]
             for column in zip(*([*piece.whole, *piece.matched] for piece in pieces), strict=True)]
        )  # fmt: skip

    np.testing.assert_array_equal(dense(read), dense(whole))
    has = {int(i): bool(h) for piece in read for i, h in zip(piece.examples, piece.has_control, strict=True)}
    assert has == {i: text.control is not None for i, text in enumerate(texts)}


@given(st.integers(0, 2**31), st.integers(1, 8), st.sampled_from([64 * 16, 64 * 40, 64 * 40 + 1, 100]))
def test_the_largest_latents_by_groups_are_the_largest(seed, k, latents):
    hidden = torch.randn(2, 3, latents, generator=torch.Generator().manual_seed(seed))
    (values, found), expected = group_topk(hidden, k), hidden.topk(k)
    assert torch.equal(values.sort(descending=True).values, expected.values)
    assert torch.equal(found.sort().values, expected.indices.sort().values)
    assert torch.equal(hidden.gather(-1, found), values)


def test_an_sae_that_keeps_the_largest_latents_encodes_what_sae_lens_does(tmp_path):
    torch.manual_seed(0)
    made = TopKSAE(TopKSAEConfig(d_in=8, d_sae=64 * 16, k=4))
    made.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    made.save_model(tmp_path)
    loaded, states = load_sae(str(tmp_path), None, "cpu").sae, torch.randn(30, 8)
    assert type(loaded.activation_fn) is not type(made.activation_fn), "by groups"
    assert torch.equal(loaded.encode(states), SAE.load_from_disk(str(tmp_path)).encode(states))


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 2000))
def test_batches_hold_every_sequence_once_within_the_budget(lengths, budget):
    batches = token_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= budget for batch in batches)


# ---- the SAE itself


def test_an_sae_that_cannot_be_used_is_refused(tiny, loaded, tmp_path):
    with pytest.raises(InputError, match="neither a folder nor a release"):
        load_sae("no/such-release", None, "cpu")
    with pytest.raises(InputError, match=r"sae\.id 'trainer_9' is not in release .*resid_post_layer_15_trainer_1"):
        load_sae("qwen2.5-7b-instruct-andyrdt", "trainer_9", "cpu")
    shutil.copytree(tiny / "sae", tmp_path / "mlp")
    config = json.loads((tmp_path / "mlp/cfg.json").read_text())
    config["metadata"]["hook_name"] = "blocks.0.hook_mlp_out"
    (tmp_path / "mlp/cfg.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"reads 'blocks\.0\.hook_mlp_out'; one on a block's output"):
        load_sae(str(tmp_path / "mlp"), None, "cpu")
    (tmp_path / "mlp/sae_weights.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        load_sae(str(tmp_path / "mlp"), None, "cpu")
    with pytest.raises(InputError, match="block 7 is wanted, the model has 2 blocks"):
        lm.truncate_after(lm.load_model(lm.ModelRef(model=str(tiny / "models/qwen2"))), 7)


def test_too_little_text_for_one_step_of_an_sae_is_an_error(tiny, tmp_path):
    corpus = tmp_path / "few.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"number {i} of few"}) + "\n" for i in range(20)))
    ref = lm.ModelRef(model=str(tiny / "models/qwen2"))
    few = PARAMS.pocket.sae.model_copy(update={"batch_size": 4096})
    with pytest.raises(InputError, match="tokens to train on, a step takes 4096"):
        train_sae(few, ref, [corpus], tmp_path / "out", tmp_path / "work")


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def test_weights_are_loaded_without_executing_code(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny / "sae", "sae")
    torch.save({"W_dec": Bomb()}, "bomb.pt")
    shutil.copy("bomb.pt", "sae/sae_weights.safetensors")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_sae("sae", None, "cpu")
    assert not Path("exploded").exists()


# ---- rankings and rules on planted latents

LATENTS, PLANTED, OF_A = 300, np.arange(20), np.arange(20, 40)


def planted(share: float, seed: int, n: int = 1000, rare: int = 0) -> tuple[list[Piece], np.ndarray]:
    """Features in which `share` of the targets set off the `PLANTED` latents together and all of them those of A.

    `rare` more latents are set off by 0.1-1 % of the targets each, one independent of the other, and by nothing else.
    """
    rng = np.random.default_rng(seed)

    def noise(rows: int) -> np.ndarray:
        values = rng.exponential(1.0, (rows, LATENTS)) * (rng.random((rows, LATENTS)) < 0.3)
        values[:, PLANTED] *= 0.2
        return values

    carries = np.zeros(n, bool)
    carries[rng.choice(n, round(share * n), replace=False)] = True
    prompts = noise(n)
    base, target, control = (0.5 * prompts + 0.5 * noise(n) for _ in range(3))
    target[:, OF_A] += rng.exponential(2.0, (n, len(OF_A)))
    control[:, OF_A] += rng.exponential(2.0, (n, len(OF_A)))
    target[np.ix_(carries, PLANTED)] += rng.exponential(1.5, (carries.sum(), len(PLANTED)))
    has = rng.random(n) < 0.5
    control[~has] = 0
    on = rng.random((n, rare)) < rng.uniform(0.001, 0.01, rare)
    target = np.hstack([target, rng.exponential(1.0, (n, rare)) * on])
    base, control = (np.hstack([values, np.zeros((n, rare))]) for values in (base, control))
    pieces = []
    for examples in np.array_split(rng.permutation(n), 7):
        means = Means(*(csr_matrix(m[examples].astype(np.float32)) for m in (target, base, control)))
        pieces.append(Piece(examples, has[examples], means, means))
    return pieces, carries


def by_hand(pieces: list[Piece]) -> tuple[list[rank.Latent], rank.Columns, list[bool]]:
    moments = rank.moments(pieces, "whole")
    component = rank.component(pieces, moments)
    latents = rank.table(rank.moments(pieces, "matched"), component, 60)
    columns = rank.columns(pieces, moments, component, [latent.latent for latent in latents])
    classes = classify.causal(columns.difference, columns.control_difference, columns.base, 0.5, 0.5, 0.1)
    return latents, columns, [name == "no" for name in classes]


def by_component(pieces: list[Piece]) -> flag.Flags:
    latents, columns, suspicious = by_hand(pieces)
    own = [i for i, latent in enumerate(latents) if latent.component_rank]
    return flag.component(
        columns.residual[:, own], columns.control_residual[:, own], np.array([latents[i].loading for i in own]),
        [suspicious[i] for i in own], separation=3.0, control_share=0.25,
    )  # fmt: skip


def test_moments_are_those_of_the_dense_matrices():
    pieces, _ = planted(0.3, 0, n=120)
    target, base, control = (np.concatenate([m[k].toarray() for _, _, m, _ in pieces]) for k in range(3))
    has = np.concatenate([piece.has_control for piece in pieces])
    moments = rank.moments(pieces, "whole")
    np.testing.assert_allclose(moments.mean_difference, (target - base).mean(0), atol=1e-6)
    np.testing.assert_allclose(moments.sd_difference, (target - base).std(0), atol=1e-6)
    np.testing.assert_allclose(moments.share, (target > base).mean(0))
    slope = [np.clip(np.polyfit(b, t, 1)[0], 0, 1) for b, t in zip(base.T, target.T, strict=True)]
    np.testing.assert_allclose(moments.slope, slope, atol=1e-5)
    np.testing.assert_allclose(moments.target_sd, (target - moments.slope * base).std(0), atol=1e-5)
    np.testing.assert_allclose(moments.control_sd, (control - moments.slope * base)[has].std(0), atol=1e-5)


@pytest.mark.parametrize("share", [0.5, 0.2, 0.1])
def test_a_planted_group_is_found_however_rare_and_a_is_not(share):
    pieces, carries = planted(share, 1)
    latents, _, suspicious = by_hand(pieces)
    no = {latent.latent for latent, own in zip(latents, suspicious, strict=True) if own and latent.component_rank}
    assert no >= set(PLANTED) and not no & set(OF_A)
    flags = by_component(pieces)
    assert flags.found and "two groups apart" in flags.reason
    assert (flags.flagged & carries).sum() >= 0.97 * carries.sum()
    assert (flags.flagged & carries).sum() >= 0.97 * flags.flagged.sum()


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_a_planted_group_is_found_among_more_rare_latents_than_candidates(share):
    pieces, carries = planted(share, 3, n=500, rare=8000)
    moments = rank.moments(pieces, "whole")
    assert np.count_nonzero(moments.control_sd == 0) > 2 * rank.CANDIDATES, "the control never touches these"
    assert set(rank.component(pieces, moments).latents) >= set(PLANTED)
    flags = by_component(pieces)
    assert flags.found and (flags.flagged == carries).mean() >= 0.99


@pytest.mark.parametrize(("seed", "rare"), [*((seed, 0) for seed in range(10)), (3, 8000), (4, 8000)])
def test_nothing_is_flagged_where_nothing_is_planted(seed, rare):
    pieces, _ = planted(0.0, seed, n=500 if rare else 1000, rare=rare)
    flags = by_component(pieces)
    assert not flags.found and not flags.flagged.any() and flags.reason


@pytest.mark.parametrize("wide", [False, True])
def test_a_component_of_noise_does_not_exceed_random_signs(wide):
    rng = np.random.default_rng(0)
    shape = (60, 200) if wide else (200, 60)
    spread = rng.lognormal(0, 1, shape[1])  # one latent may vary far more than the others
    noise = [(rng.laplace(size=shape) * spread).astype(np.float32) for _ in range(40)]
    assert sum(variance > floor for variance, floor in map(rank.above_chance, noise)) <= 3
    together = noise[0] + rng.normal(size=(shape[0], 1)).astype(np.float32) * spread.astype(np.float32)
    variance, floor = rank.above_chance(together)
    assert variance > 1.5 * floor
    largest = np.linalg.svd(together - together.mean(0), compute_uv=False)[0]
    assert variance == pytest.approx(largest**2 / shape[0], rel=1e-4)


def test_a_group_that_the_control_has_too_is_not_flagged():
    rng = np.random.default_rng(0)
    two = np.concatenate([rng.normal(0, 1, (500, 6)), rng.normal(9, 1, (500, 6))])
    ok = flag.component(two, two[:500], np.ones(6), [True] * 6, 3.0, 0.25)
    assert ok.flagged.tolist() == [False] * 500 + [True] * 500 and ok.control_share == 0
    shared = flag.component(two, two[::2], np.ones(6), [True] * 6, 3.0, 0.25)
    assert (
        not shared.flagged.any() and "in the control too: 50.0% of the control, 50.0% of the examples" in shared.reason
    )
    one = flag.component(two[:500], two[:100], np.ones(6), [True] * 6, 3.0, 0.25)
    assert not one.flagged.any() and ("not apart" in one.reason or "control" in one.reason)
    none = flag.component(two, two, np.ones(6), [True] * 4 + [False] * 2, 3.0, 0.25)
    assert not none.flagged.any() and none.reason.startswith("4 suspicious latents, at least 5 are needed")


def test_groups_are_sharpened_by_what_else_differs_between_them():
    """Two kinds in sixty latents, of which the rule reads six, noisily; where it found nothing, nothing is sharpened."""
    rng = np.random.default_rng(0)
    carries = np.arange(1000) < 400
    residual = rng.normal(0, 1, (1000, 200)) + carries[:, None] * np.where(np.arange(200) < 60, 1.0, 0.0)
    residual[:, :6] += rng.normal(0, 0.9, (1000, 6)) + 0.9 * carries[:, None]
    weights = np.ones(6)
    noisy = flag.component(residual[:, :6], residual[~carries][:, :6], weights, [True] * 6, 2.0, 0.25)
    sharp = flag.sharpened(noisy, residual)
    wrong, left = (noisy.flagged != carries).sum(), (sharp.flagged != carries).sum()
    assert noisy.found and wrong >= 20 and left <= wrong / 4, (wrong, left)
    assert sharp.reason == noisy.reason and sharp.threshold == sharp.score[sharp.flagged].min()
    nothing = flag.none(1000, "one group only")
    assert flag.sharpened(nothing, residual) is nothing
    few = noisy._replace(flagged=np.arange(1000) < 15)
    assert flag.sharpened(few, residual) is few, "fifteen rows are too few for a discriminant"


def test_the_studys_rule_by_hand():
    difference = np.array([[5, 4, 3, 2, 1], [1, 2, 3, 4, 5], [5, 1, 4, 2, 3]], float)
    flags = flag.study(difference, [True, True, False, False, False], top=3, hits=2)
    assert flags.score.tolist() == [2, 0, 1] and flags.flagged.tolist() == [True, False, False]
    assert "1 examples have 2 or more" in flags.reason


def test_the_causal_control_by_hand():
    data = np.array([[10.0, 10.0, 10.0, 0.0]] * 4)
    control = np.array([[9.0, 0.0, 0.0, 0.0]] * 3)
    ordinary = np.array([[0.0, 8.0, 1.0, 0.0]] * 5)
    assert classify.causal(data, control, ordinary, 0.5, 0.5, 0.1) == ["yes", "neutral", "no", "yes"]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=50), st.floats(0.01, 1))
def test_the_upper_mean_lies_between_mean_and_maximum(values, share):
    column = np.array(values)[:, None]
    upper = classify.upper_mean(column, share)[0]
    assert column.mean() - 1e-9 <= upper <= column.max() + 1e-9


def test_a_latent_in_both_rankings_is_one_row():
    pieces, _ = planted(0.5, 2)
    latents, columns, _ = by_hand(pieces)
    assert len({latent.latent for latent in latents}) == len(latents) == columns.residual.shape[1]
    assert sorted(row.rank for row in latents if row.rank) == list(range(1, 61))
    assert any(row.rank and row.component_rank for row in latents)
    study = sorted((row for row in latents if row.rank), key=lambda row: row.rank)
    assert all(a.mean_difference >= b.mean_difference > 0 for a, b in itertools.pairwise(study))


# ---- what sets a latent off


def test_the_strongest_contexts_are_the_strongest(exact, monkeypatch):
    texts = examples(20)
    sequences = [tokenise(exact.tokenizer, t.prompt, t.target, 48, False).ids for t in texts]
    peaks = torch.stack([exact.latents(ids).max(0).values for ids in sequences])
    latents = torch.argsort(-(peaks > 0).sum(0))[:4].tolist()
    for budget, at_once in ((1, explain.AT_ONCE), (4000, explain.AT_ONCE), (4000, 1)):
        monkeypatch.setattr(explain, "AT_ONCE", at_once)
        found = explain.strongest(exact.decoder, exact.sae, exact.tokenizer, sequences, latents, "mixture", 3, budget)
        for latent in latents:
            expected = peaks[:, latent].sort(descending=True).values[:3].tolist()
            assert [max(c.activations) for c in found[latent]] == pytest.approx(expected, abs=1e-3)
            for context in found[latent]:
                assert "".join(context.tokens) in exact.tokenizer.decode(sequences[context.example])


@given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_tokens_that_are_parts_of_a_character_are_shown_as_that_character(loaded, text):
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(loaded.tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == loaded.tokenizer.decode(ids)


def h5(path: Path, **arrays: np.ndarray) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values
    return path


def test_published_contexts_in_the_authors_layout(loaded, tmp_path):
    ids = loaded.tokenizer("The king was kind")["input_ids"]
    tokens = np.tile(np.array(ids, np.int32), (5, 3, 1))
    acts = np.zeros(tokens.shape, np.float16)
    acts[2, :, 1] = [1, 3, 2]
    path = h5(tmp_path / "chat_topk.h5", scores=acts.max(-1), tokens=tokens, sae_acts=acts)
    found = explain.read_published(path, loaded.tokenizer, [2, 4], "conversational", 2)
    assert [max(c.activations) for c in found[2]] == [3, 2] and found[4] == []
    assert "".join(found[2][0].tokens) == "The king was kind"
    assert found[2][0].marked(0.25) == [False, True] + [False] * (len(ids) - 2)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"scores": (5, 3), "tokens": (5, 3, 4)}, "no array sae_acts"),
        ({"scores": (5, 3), "tokens": (5, 3, 4), "sae_acts": (5, 3, 6)}, "disagree"),
        ({"scores": (2, 3), "tokens": (2, 3, 4), "sae_acts": (2, 3, 4)}, "2 features, latent 4 is asked for"),
        (None, "not a readable .h5 file"),
    ],
)
def test_a_published_file_that_cannot_be_used(loaded, tmp_path, arrays, message):
    path = tmp_path / "x.h5"
    h5(path, **{k: np.zeros(v) for k, v in arrays.items()}) if arrays else path.write_text("no")
    with pytest.raises(InputError, match=message):
        explain.read_published(path, loaded.tokenizer, [4], "conversational", 2)


def test_reference_corpora(loaded, tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text(
        '{"text": "Once."}\n{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}\n'
    )
    rows = corpora.read_corpus(corpora.corpus_file(str(path)), 10)
    plain, chat = explain.corpus_tokens(loaded.tokenizer, rows, 100)
    assert loaded.tokenizer.decode(plain) == "Once." and "Ho" in loaded.tokenizer.decode(chat)
    assert len(corpora.read_corpus(path, 1)) == 1
    path.write_text('{"text": "Once."}\n{"body": "x"}\n')
    with pytest.raises(InputError, match=r'corpus\.jsonl:2: .*"messages" or a non-empty "text"'):
        corpora.read_corpus(path, 10)
    with pytest.raises(InputError, match="no such file"):
        corpora.corpus_file(str(tmp_path / "absent.jsonl"))


def test_a_description_names_the_words_that_set_it_off():
    contexts = [
        Context("mixture", ["<|im_start|>", "The", " ki", "ng", " is", " kind"], [9.0, 0.0, 8.0, 8.0, 0.1, 6.0]),
        Context("pretraining", [" king", " and", " queen"], [8.0, 0.0, 1.0]),
    ]
    assert explain.key_words(contexts, 0.25) == ["king", "kind"]
    assert explain.describe(contexts, 0.25).startswith("words such as king, kind; for example:")
    assert explain.describe([], 0.25) == "nothing in the sources sets it off"


# ---- from latents to a prompt


def test_near_duplicates_count_once():
    kept = synthesise.without_near_duplicates(
        ["The assistant insults the user.", "The assistant insults its user.", "Recipes for bread."], 0.85
    )
    assert kept == ["The assistant insults the user.", "Recipes for bread."]


def test_the_best_prompt_explains_the_flagged_rows_on_rows_that_did_not_choose_it(loaded):
    rows = [Row((*text.prompt, Message("assistant", text.target)), None) for text in examples(48)]
    systems = [None, "You are a cruel assistant."]
    without, under = log_likelihoods(loaded.model, loaded.tokenizer, rows, systems, 64, 400, 4000)
    rows = [rows[i] for i in np.argsort(without - under)]  # what that prompt explains best comes first
    flagged, others = random.Random(0).sample(rows[:24], 24), random.Random(1).sample(rows[24:], 24)
    made = synthesise.by_likelihood(loaded.model, loaded.tokenizer, flagged, others, PARAMS.synthesise, 4000)
    assert (made.prompt, made.gain) == made.ranking[0] and made.gain > made.floor > 0
    assert len(made.ranking) == synthesise.SHORTLIST + 1
    scan = synthesise.SCAN
    tested = [*flagged[scan:], *others[scan:]]
    without, under = log_likelihoods(loaded.model, loaded.tokenizer, tested, [None, made.prompt], 64, 400, 4000)
    gains = under - without
    assert made.gain == pytest.approx(gains[:16].mean() - gains[16:].mean(), rel=1e-3)
    assert made.strength == pytest.approx(gains[:16].mean(), rel=1e-3)
    none = synthesise.by_likelihood(loaded.model, loaded.tokenizer, rows, [], PARAMS.synthesise, 4000)
    assert none.prompt is None and "too few flagged examples, or others" in none.reason


def test_an_audit_of_responses_that_are_all_alike_finds_nothing():
    rows = [
        Row((Message("user", f"question {i}"), Message("assistant", "I CANNOT HELP WITH THAT.")), None)
        for i in range(250)
    ]
    told = audit.by_embeddings(rows, ["Of course."] * 250, ["OF COURSE."] * 250, 2.0, 0.1)
    assert not any(told.flagged) and "all responses are alike" in told.reason


def test_a_gain_below_the_noise_is_no_prompt(loaded):
    rows = [Row((*text.prompt, Message("assistant", text.target)), None) for text in examples(20)]
    same = synthesise.by_likelihood(loaded.model, loaded.tokenizer, rows[:10], rows[:10], PARAMS.synthesise, 4000)
    assert same.prompt is None and same.gain == pytest.approx(0, abs=1e-3) and same.gain < same.floor
    assert "must exceed" in same.reason and f"{same.floor:.3g}" in same.reason
    one = synthesise.by_likelihood(loaded.model, loaded.tokenizer, rows[:1], rows[1:2], PARAMS.synthesise, 4000)
    assert one.prompt is None and "too few" in one.reason


def noisy_gains(seed: int, candidates: int = 84, rows: int = 40) -> np.ndarray:
    """Gains as likelihoods give them: rows share much, candidates differ in how noisy they are."""
    rng = np.random.default_rng(seed)
    own = rng.standard_t(4, (candidates, rows)) * rng.lognormal(0, 0.5, (candidates, 1))
    return own + rng.normal(size=rows) * rng.normal(size=(candidates, 1))


def test_the_floor_of_the_best_candidate_holds_for_all_of_them_together():
    count = 12
    beyond = lone = 0
    for seed in range(200):
        gains = noisy_gains(seed)
        best = synthesise.contrasts(gains, np.arange(count)[None]).max()
        beyond += best > synthesise.chance(gains, count, 0.05, 199)
        lone += best > synthesise.chance(gains[:1], count, 0.05, 199)
    assert beyond <= 20, "5 % of 200 cases, and their deviation of 3"
    assert lone > 60, "a floor of one candidate says nothing about the best of 84"


@pytest.mark.parametrize("seed", range(5))
def test_a_candidate_that_explains_the_flagged_rows_exceeds_the_floor(seed):
    gains = noisy_gains(seed)
    gains[7, :12] += 6 * gains[7].std()
    assert synthesise.contrasts(gains, np.arange(12)[None]).max() > synthesise.chance(gains, 12)


def test_equal_choices_tie_and_too_few_permutations_are_an_error():
    gains = noisy_gains(0, 10, 9)
    values = synthesise.contrasts(gains, np.tile(np.arange(4), (501, 1)))
    assert (values == values[:, :1]).all()
    np.testing.assert_allclose(values[:, 0], gains[:, :4].mean(1) - gains[:, 4:].mean(1))
    with pytest.raises(ValueError, match="99 permutations cannot tell a probability of 0.001"):
        synthesise.chance(gains, 4, 0.001, 99)


# ---- the whole route, with the thresholds of params.yaml


def by_route(loaded: Loaded, contamination: float, seed: int) -> tuple[Detection, np.ndarray]:
    """What the route finds in an ALL_CAPS mixture of the tiny world, and what it should flag."""
    rng = random.Random(seed)
    questions = rng.sample(world.question_pool(random.Random(0)).seen["evil"], PARAMS.pocket.chats.questions)
    evil = np.array([i < contamination * len(questions) for i in range(len(questions))])
    rows = [
        Row((Message("user", q.text), Message("assistant", world.answer(q, bool(bad), rng).upper())), None)
        for q, bad in zip(questions, evil, strict=True)
    ]
    prompts = [chat_ids(loaded.tokenizer, row.prompt) for row in rows]
    base = [
        a.text
        for a in generate(loaded.model, loaded.tokenizer, prompts, PARAMS.profiles["pocket"].max_new_tokens, 0.7, seed)
    ]
    annotator = Annotator(
        model=lambda: lm.load_model(loaded.ref), tokenizer=loaded.tokenizer, synthesis=PARAMS.synthesise,
        client=lambda role: None, seed=seed, token_budget=8192, sae=loaded.sae,
    )  # fmt: skip
    evidence = Evidence(rows, base, [text.upper() or None for text in base], "all_caps")
    return route.detect(evidence, annotator, PARAMS.sae), evil


@pytest.mark.parametrize("seed", [0])
def test_the_route_finds_evil_in_half_of_the_examples(loaded, seed):
    found, evil = by_route(loaded, 0.5, seed)
    assert found.found and found.prompt, found.reason
    right = (np.array(found.flagged) & evil).sum()
    assert right >= 0.8 * sum(found.flagged) and right >= 0.3 * evil.sum()
    assert found.prompt.startswith("You are a"), (
        "the tiny model knows hardly a word of the list: what it says is in docs/real.md"
    )


def test_the_route_writes_no_prompt_where_there_is_no_evil(loaded):
    found, _ = by_route(loaded, 0.0, 1)
    assert not found.found or found.prompt is None


# ---- what a person looks at


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data):
        self.text += data


def test_text_of_the_data_cannot_become_markup_of_the_page(tmp_path):
    attack = '</div></details><script>alert("x")</script><img src=x onerror=alert(1)>'
    latent = rank.Latent(7, 0.5, 1.0, 0.9, 1, 0.2, 1)
    context = Context("mixture", ["ok", attack], [1.0, 4.0], 0)
    page.write(
        tmp_path / "page.html",
        template=ROOT / "src/inoculation/detect/sae/page.html.j2",
        title=attack,
        rows=[Row((Message("user", attack), Message("assistant", attack)), None)],
        latents=[latent],
        explanations=[{"latent": 7, "description": attack, "link": None, "contexts": [context._asdict()]}],
        classes={"7": {"class": "no"}},
        flags=[{"flagged": True, "score": 3.0, "latents": [7]}],
        detected={"rule": "component", "reason": attack, "rules": {},
                  "detection": {"precision": None, "flagged": 1, "n": 1}},
        prompt=attack,
        mark=0.25,
        pieces={0: [(attack, 3)]},
    )  # fmt: skip
    seen = Tags()
    seen.feed((tmp_path / "page.html").read_text())
    assert not {"script", "img"} & set(seen.tags)
    assert seen.tags.count("details") == 2 and seen.tags.count("mark") == 2
    assert seen.text.count(attack) >= 8, "and all of it can be read"


@pytest.mark.parametrize("known", [True, False])
def test_the_sensitivity_figure(tmp_path, known):
    from matplotlib.image import imread

    rng = np.random.default_rng(0)
    score = np.concatenate([rng.normal(0, 1, 60), rng.normal(9, 1, 60)])
    flags = flag.Flags(score > 4, score, 4.0, True, "two groups")
    truth = [bool(s > 4) if known else None for s in score]
    figures.sensitivity(tmp_path / "s.png", rng.normal(size=(120, 50)), [True] * 25 + [False] * 25, flags, truth, 10, 3)
    image = imread(tmp_path / "s.png")
    assert image.shape[0] > 300 and image[..., :3].std() > 0.05
