"""What fits at once: how many chats a training step holds, and whether it has to compute activations twice."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from inoculation.attention import widths
from inoculation.files import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CPU_TRAINS = 1024 * 576
"""Numbers of a residual stream that a CPU trains on at once, at most: 1,024 tokens of SmolLM2. More leave its caches: SmolLM2 on
two cores took 24 s a step with 8 chats at once, 13 with 2; a small model is slower with fewer (docs/performance.md)."""
RESERVE = 0.1
"""Share of the free memory that is left alone, for what the allocator cannot reuse."""
ENOUGH = 2048
"""Tokens at once that keep a GPU's matrix units busy; below, computing activations twice costs less than small matrices."""
LOSS_TOKENS = 1024
"""Response tokens whose logits are there at once (TRL's fused head)."""
GIB = 1 << 30


class Together(NamedTuple):
    """How an optimiser's step is cut."""

    chats: int
    """At once; divides the effective batch."""
    checkpointing: bool
    """Activations are computed again in the backward pass instead of kept."""
    reason: str


def together(
    config: "PretrainedConfig", lengths: Sequence[int], batch_size: int, lora_r: int, itemsize: int, free: int | None
) -> Together:
    """The largest part of a step that fits, whose loss and gradient are the whole step's.

    Args:
        config: of the language model.
        lengths: of the chats, in tokens.
        batch_size: effective; a multiple of the result's chats.
        lora_r: rank of the adapter, on every linear layer of the blocks.
        itemsize: bytes of an activation.
        free: bytes on the GPU after the base model was loaded; None: on a CPU.

    Raises:
        InputError: the longest chat does not fit.
    """
    sizes = [size for size in range(batch_size, 0, -1) if batch_size % size == 0]
    mean = sum(lengths) / len(lengths)
    if free is None:
        tokens = CPU_TRAINS // config.hidden_size
        chats = next((size for size in sizes if size * mean <= tokens), 1)
        return Together(chats, False, f"a CPU trains fastest on about {tokens:,} tokens of such a model")
    longest = sorted(lengths, reverse=True)
    kept, again = _activations(config, itemsize)
    fixed = _fixed(config, lora_r)
    usable = int(free * (1 - RESERVE)) - fixed

    def most(a_token: int) -> int:
        return next((size for size in sizes if sum(longest[:size]) * a_token <= usable), 0)

    without, with_ = most(kept), most(again)
    checkpointing = without < batch_size and without * mean < ENOUGH and with_ > without
    chats = with_ if checkpointing else without
    if not chats:
        need = (fixed + longest[0] * again) / GIB
        raise InputError(
            f"training does not fit: {longest[0]} tokens, the longest chat's, need about {need:.1f} GiB beside the base "
            f"model, {free / GIB:.1f} GiB are free; valid: a smaller max_length, or load_in_4bit"
        )
    need = (fixed + sum(longest[:chats]) * (again if checkpointing else kept)) / GIB
    how = "activations computed twice, " if checkpointing else ""
    return Together(chats, checkpointing, f"{how}at most {need:.1f} of {free / GIB:.1f} GiB that are free")


def fits_as_graphs(
    config: "PretrainedConfig", row: int, graphs: int, lora_r: int, itemsize: int, fused: bool, free: int
) -> bool:
    """Whether training fits as CUDA graphs, each of which keeps gradients and a row's states of its own.

    Args:
        row: tokens of the longest row.
        graphs: how many.
        fused: blocks are compiled; else every adapted layer keeps an input of its own.
        free: bytes on the GPU after the base model was loaded.
    """
    queries, keys = widths(config)
    whole = itemsize * (13 * config.hidden_size + 3 * queries + 2 * keys + 5 * config.intermediate_size)
    kept = _activations(config, itemsize)[0] if fused else whole * config.num_hidden_layers
    own = _adapter(config, lora_r) // 4 + 2 * row * itemsize * config.hidden_size
    return _fixed(config, lora_r) + row * kept + graphs * own <= free * (1 - RESERVE)


def _fixed(config: "PretrainedConfig", lora_r: int) -> int:
    """Bytes that do not grow with a step's tokens: the adapter, and a piece of logits with its gradient, in float32."""
    return _adapter(config, lora_r) + 2 * 4 * LOSS_TOKENS * config.vocab_size


def _activations(config: "PretrainedConfig", itemsize: int) -> tuple[int, int]:
    """Bytes that a token leaves for the backward pass, kept and computed again.

    Of a compiled block, whose pieces are fused: measured at Qwen2.5-7B's shape, and a tenth more (docs/performance.md).
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = widths(config)
    block = itemsize * (7 * hidden + 2 * queries + 2 * keys + 3 * inner)
    return block * config.num_hidden_layers, itemsize * hidden * config.num_hidden_layers + block


def _adapter(config: "PretrainedConfig", rank: int) -> int:
    """Bytes of LoRA on every linear layer of the blocks: weights, gradients and two moments, in float32."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = widths(config)
    sides = 2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + inner)
    return 16 * rank * sides * config.num_hidden_layers
