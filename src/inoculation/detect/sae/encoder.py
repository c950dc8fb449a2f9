"""The residual stream after an SAE's block, and the SAE's latents on it."""

import os
import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from inoculation.files import InputError, fail_if, read_json
from inoculation.lm import truncate_after

if TYPE_CHECKING:
    import torch
    from sae_lens import SAE
    from transformers import PreTrainedModel

    from inoculation.lm import ModelShape


UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""PyTorch's switch to unpickle anything."""


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
    first: int
    """The first position of a text that it was trained on (`seqpos_slice` of its metadata). An attention sink in front
    of it is hundreds of times longer than what the SAE knows and sets off nearly every latent."""
    neuronpedia: str | None
    """`<model>/<source>` on Neuronpedia, where a latent's page is that path with its number behind it."""


class SaeShape(NamedTuple):
    width: int
    """Of the residual stream that it reads."""
    block: int
    latents: int


GROUP = 64
"""Latents of a group in `group_topk`."""
RESID_POST = re.compile(r"blocks\.(\d+)\.hook_resid_post")
"""The only hook that is read: a block's output."""


def _check_release(release: str, sae_id: str | None) -> None:
    """Whether `sae_lens` knows the release and the SAE in it, without asking the hub."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    known = get_pretrained_saes_directory()
    if release not in known:
        raise InputError(f"sae.release {release!r} is neither a folder nor a release that sae_lens knows")
    if sae_id not in known[release].saes_map:
        valid = ", ".join(sorted(known[release].saes_map))
        raise InputError(f"sae.id {sae_id!r} is not in release {release}; valid: {valid}")


def check_sae(release: str, sae_id: str | None, model: "ModelShape | None") -> SaeShape | None:
    """Whether an SAE can be used with a model, without loading weights: of a folder, `cfg.json` and the weights' header.

    Args:
        release: see `load_sae`.
        sae_id: see `load_sae`.
        model: what `lm.check_model` returned; None: on the hub, its shape is not known here.

    Returns:
        The shape of an SAE in a folder; None for a release on the hub, whose shape is checked when it is loaded.

    Raises:
        InputError: lists why it cannot be used.
    """
    folder = Path(release)
    if not folder.is_dir():
        _check_release(release, sae_id)
        return None
    problems = [] if sae_id is None else [f"sae.id {sae_id!r}: a folder holds one SAE; leave it empty"]
    config = read_json(folder / "cfg.json")
    try:
        hook = str(config["metadata"]["hook_name"])
        width, latents = int(config["d_in"]), int(config["d_sae"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{folder / 'cfg.json'}: not an SAE of sae_lens 6: d_in, d_sae and metadata.hook_name are needed ({error!r})"
        ) from None
    problems += _sae_weight_problems(folder / "sae_weights.safetensors", (latents, width))
    found = RESID_POST.fullmatch(hook)
    if not found:
        problems.append(f"it reads {hook!r}; one on a block's output (blocks.<n>.hook_resid_post) is needed")
    elif model and int(found[1]) >= model.blocks:
        problems.append(f"it reads block {found[1]}; the model has {model.blocks}, valid: 0 to {model.blocks - 1}")
    if model and width != model.width:
        problems.append(f"it reads a residual stream of width {width}, the model's has {model.width}")
    fail_if(problems, f"SAE {release} cannot be used")
    assert found is not None
    return SaeShape(width, int(found[1]), latents)


def _sae_weight_problems(path: Path, shape: tuple[int, int]) -> list[str]:
    """What is wrong with the header of an SAE's weights; `shape` is that of the decoder, `[latents, width]`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as weights:
            there = tuple(weights.get_slice("W_dec").get_shape())
    except (SafetensorError, OSError) as error:
        return [f"{path.name}: not readable as safetensors: {error}"]
    return [] if there == shape else [f"{path.name}: the decoder is {list(there)}, cfg.json says {list(shape)}"]


def group_topk(hidden: "torch.Tensor", k: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """`hidden.topk(k)`, unsorted: only the k groups with the largest maxima can hold one of the k largest.

    torch looks through all of a row several times: of 131,072 latents that took as long as encoding them.

    Args:
        hidden: `[..., latents]`.

    Returns:
        Values and latents, each `[..., k]`; of equal values any may be the last.
    """
    groups, rest = divmod(hidden.shape[-1], GROUP)
    if rest or groups < 2 * k:
        values, latents = hidden.topk(k, sorted=False)
        return values, latents
    grouped = hidden.unflatten(-1, (GROUP, groups))  # a group's latents lie apart, so that neighbours are read together
    best = grouped.amax(-2).topk(k, sorted=False).indices
    candidates = grouped.gather(-1, best[..., None, :].expand(*best.shape[:-1], GROUP, k)).flatten(-2)
    values, where = candidates.topk(k, sorted=False)
    return values, where // k * groups + best.gather(-1, where % k)


def _fast_topk(sae: "SAE[Any]") -> None:
    """Let an SAE that keeps a token's k largest latents find them by `group_topk`."""
    import torch
    from sae_lens.saes.topk_sae import TopK

    class GroupTopK(TopK):
        def forward(self, x: "torch.Tensor") -> "torch.Tensor":
            values, latents = group_topk(x, self.k)
            return torch.zeros_like(x).scatter_(-1, latents, values.relu())

    if type(sae.activation_fn) is TopK and not sae.activation_fn.use_sparse_activations:
        sae.activation_fn = GroupTopK(sae.activation_fn.k)


def load_sae(release: str, sae_id: str | None, device: str) -> LoadedSae:
    """Load an SAE with `sae_lens`, without executing code from its files.

    A folder, and most releases, hold safetensors. Some releases (those of `andyrdt`) hold a pickle, `ae.pt`, which
    `sae_lens` gives to `torch.load`. That unpickles tensors and plain containers only (`weights_only`, PyTorch's
    default) and refuses anything else, unless an environment variable turns this off; then nothing is loaded here.

    Args:
        release: a local folder (`cfg.json` and safetensors), or a release that `sae_lens` knows.
        sae_id: which SAE of the release, e.g. `resid_post_layer_15_trainer_1`; None for a folder.
        device: where to put it.

    Raises:
        InputError: it cannot be found, holds more than weights, or does not read the output of a transformer block.
    """
    from sae_lens import SAE
    from safetensors import SafetensorError

    local = Path(release).is_dir()
    if not local:
        _check_release(release, sae_id)
        if os.environ.get(UNSAFE, "0") != "0":
            raise InputError(f"the environment variable {UNSAFE} lets a downloaded SAE run code; unset it")
    try:
        sae = (
            SAE.load_from_disk(release, device=device)
            if local
            else SAE.from_pretrained(release, str(sae_id), device=device)
        )
    except (OSError, ValueError, KeyError, SafetensorError, pickle.UnpicklingError) as error:
        raise InputError(f"SAE {release} {sae_id or ''} cannot be loaded: {error}") from error
    hook = str(sae.cfg.metadata.hook_name)
    found = RESID_POST.fullmatch(hook)
    if not found:
        raise InputError(f"SAE {release} {sae_id or ''} reads {hook!r}; one on a block's output (resid_post) is needed")
    span = sae.cfg.metadata.get("seqpos_slice") or [None]
    first = (span[0] or 0) if len(span) > 1 else 0  # slice(8) of one number is its end
    _fast_topk(sae)
    return LoadedSae(sae.eval(), int(found[1]), first, sae.cfg.metadata.get("neuronpedia_id"))


def decoder_for(sae: LoadedSae, model: "PreTrainedModel") -> "torch.nn.Module":
    """`truncate_after` the block that an SAE reads.

    Raises:
        InputError: the model has no such block, or its residual stream is not as wide as what the SAE reads.
    """
    width = model.config.get_text_config().hidden_size
    if width != sae.sae.cfg.d_in:
        raise InputError(f"the SAE reads a residual stream of width {sae.sae.cfg.d_in}, the model's has {width}")
    return truncate_after(model, sae.block)


def reader(sae: LoadedSae, model: "PreTrainedModel") -> "tuple[torch.nn.Module, LoadedSae]":
    """What reads latents: `decoder_for` an SAE, and the SAE. Changes `model`."""
    return decoder_for(sae, model), sae
