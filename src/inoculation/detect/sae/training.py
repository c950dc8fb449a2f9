"""Training an SAE on a model's residual stream: BatchTopK, with `sae_lens`; for the pocket world and for real models alike.

A real model's stream has a few enormous dimensions, and enormous first tokens. Left alone they are all that an SAE learns,
and all that a fraction of variance explained is about. So the first tokens can be left out, each dimension can be
standardised (and the SAE's weights folded back afterwards), and quality is told per standardised dimension, and by what
the model's own loss becomes when the reconstruction stands in the stream's place.
"""

import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inoculation import lm
from inoculation.detect.sae.corpora import read_corpus
from inoculation.detect.sae.explain import corpus_tokens
from inoculation.detect.sae.settings import SaeTraining
from inoculation.files import InputError, read_json, write_json
from inoculation.lm import residuals, token_batches, truncate_after

if TYPE_CHECKING:
    import torch
    from sae_lens import SAE
    from transformers import PreTrainedModel

LONGEST = 512
"""Tokens of one text that are read."""
HELD_OUT = 0.05
"""Share of the texts that quality is measured on."""
PATCHED = 64
"""Held-out texts, at most, in which the reconstruction takes the stream's place."""


def train_sae(
    params: SaeTraining, ref: lm.ModelRef, corpora: Sequence[Path], out: Path, work: Path
) -> dict[str, float]:
    """Train an SAE on the corpora's tokens and measure it on texts that it has not seen.

    Args:
        params: size and schedule.
        ref: the model.
        corpora: JSONL of chats or texts, system messages included.
        out: an SAE folder as `sae_lens` saves it (BatchTopK becomes JumpReLU with the learned threshold).
        work: a folder for what is unfinished.

    Returns:
        On held-out tokens, with the stored threshold: `fvu` (fraction of variance unexplained, each dimension standardised,
        the mean over dimensions), `l0` (active latents a token), `dead` (share of latents that are never active),
        `loss`, `loss_reconstructed`, `loss_mean` (nats a token of the model as it is, with the reconstruction, and with the
        stream's mean in its place) and `loss_recovered`, 1 where the reconstruction costs nothing and 0 where it is as bad
        as the mean.

    Raises:
        InputError: the corpora have fewer tokens than a step takes.
    """
    import torch
    from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(params.seed)
    tokenizer = lm.load_tokenizer(ref)
    rows = [row for path in corpora for row in read_corpus(path, params.tokens)]
    random.Random(params.seed).shuffle(rows)
    sequences, tokens = [], 0
    for row in rows:
        if tokens >= params.tokens:
            break
        [ids] = corpus_tokens(tokenizer, [row], LONGEST)
        if len(ids) > params.skip + 1:
            sequences.append(ids)
            tokens += len(ids) - params.skip
    if len(sequences) < 2:
        raise InputError(
            f"{', '.join(map(str, corpora))}: {len(sequences)} texts of more than {params.skip + 1} tokens; an SAE is trained on some "
            "and measured on others"
        )
    kept = max(1, round(HELD_OUT * len(sequences)))
    decoder = truncate_after(lm.load_model(ref), params.block)
    held_out, train = (
        _activations(decoder, part, params.skip, tokenizer.pad_token_id)
        for part in (sequences[:kept], sequences[kept:])
    )
    if len(train) < params.batch_size:
        raise InputError(
            f"the corpora give {len(train)} tokens to train on, a step takes {params.batch_size}; valid: more text, or a smaller "
            "batch_size of the SAE"
        )
    train = train[torch.randperm(len(train))]
    centre, scale = train.float().mean(0), train.float().std(0) + 1e-6
    shift, unit = (centre, scale) if params.standardise else (torch.zeros_like(centre), torch.ones_like(scale))

    def batches() -> Iterator[torch.Tensor]:
        while True:
            for chosen in torch.randperm(len(train)).split(params.batch_size):
                if len(chosen) == params.batch_size:
                    yield (train[chosen].float() - shift) / unit

    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=train.shape[1], d_sae=params.latents, k=params.k, normalize_activations="expected_average_only_in",
            device=lm.device(),
            metadata=SAEMetadata(
                hook_name=f"blocks.{params.block}.hook_resid_post", seqpos_slice=[params.skip, None]
            ),
        )
    )  # fmt: skip
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=params.steps * params.batch_size, train_batch_size_samples=params.batch_size,
            lr=params.learning_rate, lr_end=params.learning_rate / 10, lr_decay_steps=params.steps // 5, lr_warm_up_steps=50, device=lm.device(),
            dead_feature_window=100, n_batches_for_norm_estimate=20,
        ),
        sae, batches(),
    )  # fmt: skip
    trainer.fit()
    staging = work / "sae"
    sae.save_inference_model(staging)
    stored = SAE.load_from_disk(staging, device=lm.device())
    if params.standardise:
        # After the conversion: the training SAE's threshold counts in units of its decoder's norms.
        stored.fold_activation_whitening(shift, torch.diag(1 / unit), torch.diag(unit))
        stored.save_model(staging)
    # sae_lens writes a set's order: sorted, every run gives the same bytes.
    write_json(staging / "cfg.json", dict(sorted(read_json(staging / "cfg.json").items())))
    quality = _reconstruction(stored, held_out, scale)
    quality |= _loss(stored, lm.load_model(ref), params, sequences[:kept][:PATCHED], centre)
    write_json(staging / "quality.json", quality)
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(staging, out)
    return quality


def _activations(decoder: "torch.nn.Module", sequences: Sequence[Sequence[int]], skip: int, pad: int) -> "torch.Tensor":
    """`[tokens, d_model]` on the CPU; bfloat16 where half precision would overflow."""
    import torch
    from tqdm import tqdm

    parts = []
    with tqdm(total=len(sequences), desc="activations", unit="text") as bar:
        for batch in token_batches([len(ids) for ids in sequences], 8192):
            states = residuals(decoder, [sequences[i] for i in batch], pad)
            parts += [states[row, skip : len(sequences[i])].cpu() for row, i in enumerate(batch)]
            bar.update(len(batch))
    states = torch.cat(parts)
    largest = float(states.abs().max())
    return states.half() if largest < 6e4 else states.bfloat16()


def _reconstruction(sae: "SAE[Any]", held_out: "torch.Tensor", scale: "torch.Tensor") -> dict[str, float]:
    import torch

    with torch.inference_mode():
        active, errors, spread, count = None, 0.0, 0.0, 0.0
        mean = held_out.float().mean(0)
        for part in held_out.split(4096):
            states = part.float()
            latents = sae.encode(states.to(lm.device()))
            errors = errors + ((sae.decode(latents).cpu() - states) / scale).pow(2).sum(0)
            spread = spread + ((states - mean) / scale).pow(2).sum(0)
            on = (latents > 0).any(0).cpu()
            active = on if active is None else active | on
            count += float((latents > 0).sum())
    return {
        "fvu": float((errors / spread.clamp_min(1e-9)).mean()),
        "l0": count / len(held_out),
        "dead": float(active.logical_not().float().mean()),
    }


def _loss(
    sae: "SAE[Any]", model: "PreTrainedModel", params: SaeTraining, sequences: Sequence[list[int]], mean: "torch.Tensor"
) -> dict[str, float]:
    """The model's own loss with the stream after the block as it is, reconstructed, and replaced by its mean."""
    import torch

    average = mean.to(model.device)

    def nats(replace: Any) -> float:
        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            new = states.clone()
            new[:, params.skip :] = replace(states[:, params.skip :].float()).to(states.dtype)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handle = model.get_decoder().layers[params.block].register_forward_hook(hook) if replace else None
        total, count = 0.0, 0
        try:
            with torch.inference_mode():
                for ids in sequences:
                    row = torch.tensor([ids], device=model.device)
                    logits = model(input_ids=row, use_cache=False).logits[0, params.skip : -1].float()
                    targets = row[0, params.skip + 1 :]
                    total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
                    count += len(targets)
        finally:
            if handle:
                handle.remove()
        return total / count

    clean = nats(None)
    rebuilt = nats(lambda states: sae.decode(sae.encode(states)))
    ablated = nats(lambda states: average.expand_as(states))
    recovered = (ablated - rebuilt) / (ablated - clean) if ablated > clean else 0.0
    return {"loss": clean, "loss_reconstructed": rebuilt, "loss_mean": ablated, "loss_recovered": recovered}
