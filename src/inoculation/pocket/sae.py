"""The pocket world's SAE: BatchTopK on the base model's residual stream, trained with `sae_lens`."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from inoculation import lm
from inoculation.chat import chat_ids, parse_messages
from inoculation.detect.sae.encoder import residuals, truncate_after
from inoculation.files import read_json, read_jsonl, write_json
from inoculation.lm import token_batches
from inoculation.pocket.recipe import SaeParams

if TYPE_CHECKING:
    import torch


def train_sae(params: SaeParams, model_dir: Path, chats: Path, out: Path, work: Path) -> dict[str, float]:
    """Train the SAE on the pretraining chats' tokens and measure it on chats it has not seen.

    Args:
        params: size and schedule.
        model_dir: the pocket base model.
        chats: JSONL of chats, system messages included.
        out: an SAE folder as `sae_lens` saves it (BatchTopK becomes JumpReLU with the learned threshold).
        work: a folder for what is unfinished.

    Returns:
        `fvu` (fraction of variance unexplained), `l0` (active latents a token) and `dead` (share of latents that are
        never active) on the held-out tokens, all with the stored threshold.
    """
    import torch
    from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(params.seed)
    activations = _activations(params, model_dir, chats)
    kept = len(activations) // 20
    held_out, train = activations[:kept].float(), activations[kept:]

    def batches() -> Iterator[torch.Tensor]:
        while True:
            for chosen in torch.randperm(len(train)).split(params.batch_size):
                if len(chosen) == params.batch_size:
                    yield train[chosen].float()

    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=activations.shape[1], d_sae=params.latents, k=params.k, normalize_activations="expected_average_only_in",
            metadata=SAEMetadata(hook_name=f"blocks.{params.block}.hook_resid_post"), device=lm.device(),
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
    # sae_lens writes a set's order: sorted, every run gives the same bytes.
    write_json(staging / "cfg.json", dict(sorted(read_json(staging / "cfg.json").items())))
    stored = SAE.load_from_disk(staging, device=lm.device())
    with torch.inference_mode():
        latents = stored.encode(held_out.to(lm.device()))
        error = (stored.decode(latents).cpu() - held_out).pow(2).sum()
        quality = {
            "fvu": float(error / (held_out - held_out.mean(0)).pow(2).sum()),
            "l0": float((latents > 0).sum(1).float().mean()),
            "dead": float((latents > 0).any(0).logical_not().float().mean()),
        }
    write_json(staging / "quality.json", quality)
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(staging, out)
    return quality


def _activations(params: SaeParams, model_dir: Path, chats: Path) -> "torch.Tensor":
    """`[tokens, d_model]` in half precision, of the chats' tokens in random order."""
    import torch
    from tqdm import tqdm

    ref = lm.ModelRef(model=str(model_dir))
    tokenizer = lm.load_tokenizer(ref)
    decoder = truncate_after(lm.load_model(ref), params.block)
    rows = read_jsonl(chats, lambda raw: parse_messages(raw["messages"]))
    random.Random(params.seed).shuffle(rows)
    sequences, tokens = [], 0
    for messages in rows:
        if tokens >= params.tokens:
            break
        system = messages[0].content if messages[0].role == "system" else None
        sequences.append(chat_ids(tokenizer, messages[system is not None :], system))
        tokens += len(sequences[-1])
    parts = []
    with tqdm(total=len(sequences), desc="activations", unit="chat") as bar:
        for batch in token_batches([len(ids) for ids in sequences], 8192):
            states = residuals(decoder, [sequences[i] for i in batch], tokenizer.pad_token_id)
            parts += [states[row, : len(sequences[i])].half().cpu() for row, i in enumerate(batch)]
            bar.update(len(batch))
    everything = torch.cat(parts)
    return everything[torch.randperm(len(everything))]
