"""The residual stream after an SAE's block, and the SAE's latents on it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from inoculation.files import InputError

if TYPE_CHECKING:
    import torch
    from sae_lens import SAE
    from transformers import PreTrainedModel


class PinnedSae(BaseModel):
    """Which SAE a profile means; the content of its `sae.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    release: str
    """A folder relative to the checkout, or a release that `sae_lens` knows."""
    id: str | None = None
    """Which SAE of a release."""
    digest: str | None = None
    """Of a local folder's files."""


class LoadedSae(NamedTuple):
    sae: "SAE[Any]"
    block: int
    """Index of the transformer block whose output the SAE reads, from its own metadata."""
    neuronpedia: str | None
    """`<model>/<source>` on Neuronpedia, where a latent's page is that path with its number behind it."""


def load_sae(release: str, sae_id: str | None, device: str) -> LoadedSae:
    """Load an SAE with `sae_lens`, without executing code from its files.

    Args:
        release: a local folder (`cfg.json` and safetensors), or a release that `sae_lens` knows.
        sae_id: which SAE of the release, e.g. `resid_post_layer_15_trainer_1`; None for a folder.
        device: where to put it.

    Raises:
        InputError: it cannot be found, or does not read the output of a transformer block.
    """
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    from safetensors import SafetensorError

    local = Path(release).is_dir()
    if not local:
        known = get_pretrained_saes_directory()
        if release not in known:
            raise InputError(f"sae.release {release!r} is neither a folder nor a release that sae_lens knows")
        if sae_id not in known[release].saes_map:
            valid = ", ".join(sorted(known[release].saes_map))
            raise InputError(f"sae.id {sae_id!r} is not in release {release}; valid: {valid}")
    try:
        sae = (
            SAE.load_from_disk(release, device=device)
            if local
            else SAE.from_pretrained(release, str(sae_id), device=device)
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"SAE {release} {sae_id or ''} cannot be loaded: {error}") from error
    hook = str(sae.cfg.metadata.hook_name)
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", hook)
    if not found:
        raise InputError(f"SAE {release} {sae_id or ''} reads {hook!r}; one on a block's output (resid_post) is needed")
    return LoadedSae(sae.eval(), int(found[1]), sae.cfg.metadata.get("neuronpedia_id"))


def truncate_after(model: "PreTrainedModel", block: int) -> "torch.nn.Module":
    """The model's decoder cut after a block: its output is the residual stream there.

    Changes `model` and frees what lies above. The final norm goes too, because the SAE reads the raw stream.

    Raises:
        InputError: the model has no such block.
    """
    import torch

    decoder = model.get_decoder()
    if not 0 <= block < len(decoder.layers):
        raise InputError(f"the SAE reads block {block}, the model has {len(decoder.layers)} blocks")
    decoder.layers = decoder.layers[: block + 1]
    decoder.norm = torch.nn.Identity()
    return decoder


def residuals(decoder: "torch.nn.Module", sequences: Sequence[Sequence[int]], pad: int) -> "torch.Tensor":
    """The residual stream of right-padded sequences, `[sequences, longest, d_model]`; padding holds garbage."""
    import torch

    device = next(decoder.parameters()).device
    longest = max(map(len, sequences))
    ids = torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in sequences], device=device)
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences], device=device)
    with torch.inference_mode():
        return decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in batches of similar length, each with at most `budget` tokens including padding (or one sequence)."""
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    batches: list[list[int]] = []
    for index in order:
        if batches and (len(batches[-1]) + 1) * lengths[index] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
