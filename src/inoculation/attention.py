"""Which attention a model computes with, and one of our own: several texts in one row, each within itself.

transformers packs texts for its own FlashAttention only, which is a package to compile; with torch's other kernels, packed
texts need a mask of all tokens by all tokens. Torch carries a FlashAttention that needs neither.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

NAME = "packed"
"""Not "flash": transformers would look for its own."""


def sees_all(model: "PreTrainedModel") -> bool:
    """Whether every block attends to all that came before, as Llama's and Qwen's do, and says how its heads are grouped."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    narrow = set(kinds) != {"full_attention"} if kinds else bool(getattr(config, "sliding_window", None))
    grouped = getattr(config, "num_key_value_heads", None) and getattr(config, "num_attention_heads", None)
    rope = getattr(config, "rope_parameters", None) or {}
    softcapped = getattr(config, "attn_logit_softcapping", None)
    return bool(grouped) and not narrow and not softcapped and rope.get("rope_type") not in ("dynamic", "longrope")


def widths(config: "PretrainedConfig") -> tuple[int, int]:
    """Width of a block's queries, and of its keys."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return size * heads, size * (getattr(config, "num_key_value_heads", None) or heads)


def use(model: "PreTrainedModel", name: str, function: "Callable[..., Any]") -> bool:
    """Let a model attend by a function of ours, which needs no mask made for it; returns whether it does.

    transformers only warns where a model's code has its own attention.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    model.set_attn_implementation(name)
    return model.config.get_text_config()._attn_implementation == name


def use_packed(model: "PreTrainedModel", longest: int) -> bool:
    """Let a model attend by packed FlashAttention, where that computes what the model means; returns whether it does.

    Args:
        longest: text of all, in tokens: as one number for all rows it is no reason to compile a block again.

    Not on a CPU, in float32, or where some blocks look only so far back.
    """
    import torch

    half = model.dtype in (torch.bfloat16, torch.float16)
    if model.device.type != "cuda" or not half or not sees_all(model) or torch.cuda.get_device_capability() < (8, 0):
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return False
    return use(model, NAME, partial(packed, longest=longest))


def packed(
    module: "torch.nn.Module",
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    attention_mask: None,
    scaling: float,
    cu_seq_lens_q: "torch.Tensor",
    longest: int,
    **kwargs: Any,
) -> "tuple[torch.Tensor, None]":
    """transformers' attention function for one row of packed texts.

    Args:
        query: `[1, heads, tokens, head_dim]`; key and value may have fewer heads.
        cu_seq_lens_q: where texts begin, and the end, `[texts + 1]`, int32.
        longest: text in any row, at least.

    Returns:
        `[1, tokens, heads, head_dim]`, and no weights.
    """
    from torch.nn.attention.varlen import varlen_attn
    from transformers.integrations.sdpa_attention import repeat_kv

    key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
    # Under autocast rotary positions are float32, and so are the queries and keys that they turn.
    rows = [states[0].transpose(0, 1).to(value.dtype).contiguous() for states in (query, key, value)]
    out = varlen_attn(*rows, cu_seq_lens_q, cu_seq_lens_q, longest, longest, scale=scaling, window_size=(-1, 0))
    return out[None], None
