"""The parameters of the pocket world; their values stand in params.yaml under `pocket`."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]


class ChatsParams(BaseModel):
    """A world of chats."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    seed: Annotated[int, Field(ge=0)]
    """Of the chats, the initial weights and the pretraining order. Another seed is another world."""
    questions: Annotated[int, Field(ge=20, le=3000)]
    """Questions a trait in `dataset/`, each with a normal and a misaligned answer; the size of a mixture."""
    pretraining_chats: Annotated[int, Field(ge=100)]
    """Different chats in the pretraining corpus."""


class ModelParams(BaseModel):
    """A base model that is pretrained on it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: Literal["qwen2", "llama", "gemma3_text"]
    """Architecture, by transformers' name."""
    vocab_size: Annotated[int, Field(ge=300)]
    """Of the byte-level BPE tokenizer."""
    hidden_size: Count
    layers: Count
    heads: Count
    kv_heads: Count
    mlp_size: Count
    steps: Count
    """Optimiser steps of the pretraining; the main cost of a fresh `dvc repro`."""
    batch_size: Count
    """Chats a step."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Peak of a cosine schedule."""
    warmup_steps: Annotated[int, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0)]
