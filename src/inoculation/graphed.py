"""Training a small model on a GPU: its forward and backward pass as two CUDA graphs.

SmolLM2's 30 blocks under LoRA are thousands of operations of a few microseconds, which take six times as long to launch as to
compute (docs/performance.md). A graph is launched once, and wants the same number of tokens every time.
"""

import statistics
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SMALL = 1_000_000_000
"""Parameters of a model that is bound by launches; a larger one computes longer than it takes to launch."""
ROUNDED = 128


def row_tokens(lengths: Sequence[int], chats: int) -> int:
    """Tokens of a row in which nearly every step's chats have room.

    Args:
        lengths: of all chats, in tokens.
        chats: in a row.
    """
    spread = statistics.pstdev(lengths) * chats**0.5
    wanted = min(statistics.mean(lengths) * chats + 2.5 * spread, sum(sorted(lengths)[-chats:]))
    return -(-int(wanted + 1) // ROUNDED) * ROUNDED


def replay(decoder: "torch.nn.Module", tokens: int, chats: int) -> None:
    """Let a decoder run as graphs, in training, on rows of packed texts (`attention.use_packed`).

    Rows are filled up to `tokens` with a text that nothing looks at; one that is longer runs as it would have.

    Args:
        tokens: of a row.
        chats: in a row, at most.
    """
    import torch
    from transformers.modeling_outputs import BaseModelOutputWithPast

    eager = decoder.forward
    device = next(decoder.parameters()).device

    class Row(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = decoder  # whose parameters' gradients are part of the graph

        def forward(self, ids: "torch.Tensor", positions: "torch.Tensor", bounds: "torch.Tensor") -> "torch.Tensor":
            return eager(input_ids=ids, position_ids=positions, cu_seq_lens_q=bounds, use_cache=False).last_hidden_state

    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    positions = torch.arange(tokens, device=device)[None]
    bounds = torch.tensor([0] + [tokens] * (chats + 1), dtype=torch.int32, device=device)
    # Capturing runs on a stream of its own; the trainer's waits for it.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        graphed = torch.cuda.make_graphed_callables(Row().train(), (ids, positions, bounds))

    def places() -> list[int]:
        return [
            parameter.data_ptr() for name, parameter in decoder.named_parameters() if "lora_" in name
        ]  # frozen ones too

    captured = places()

    @cache
    def in_place() -> bool:
        """Whether the weights are where they were captured; asked at the first row, after a checkpoint was loaded."""
        return places() == captured

    def forward(input_ids: Any = None, position_ids: Any = None, cu_seq_lens_q: Any = None, **kwargs: Any) -> Any:
        there = input_ids.shape[1] if input_ids is not None else 0
        fits = cu_seq_lens_q is not None and 0 < there <= tokens and len(cu_seq_lens_q) <= chats + 1
        if not (decoder.training and fits and in_place()):
            return eager(input_ids=input_ids, position_ids=position_ids, cu_seq_lens_q=cu_seq_lens_q, **kwargs)
        pad = tokens - there
        rest = chats + 2 - len(cu_seq_lens_q)
        states = graphed(
            torch.nn.functional.pad(input_ids, (0, pad)),
            torch.cat([position_ids, torch.arange(pad, device=device)[None]], 1),
            torch.nn.functional.pad(cu_seq_lens_q, (0, rest), value=tokens),
        )
        return BaseModelOutputWithPast(last_hidden_state=states[:, :there])

    decoder.forward = forward  # type: ignore[method-assign]
