"""Training on a GPU as CUDA graphs: a forward and a backward pass are launched at once.

Under LoRA a block is a hundred operations, and a processor takes as long to launch them as a GPU to compute them: SmolLM2's 30
blocks six times as long, those of Qwen2.5-7B a third longer for 16 chats, and more than twice for 8 (docs/performance.md). A graph
wants the same number of tokens every time.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SMALL = 1_000_000_000
"""Parameters of a model whose operations are too short for compiling them to pay."""
ROUNDED = 128
SIZES = 5
"""Graphs at most; all are made before the first step."""


def sizes(rows: Sequence[int], most: int = SIZES) -> list[int]:
    """Lengths for which graphs are made, so that rows that are filled up to the next one are filled up least in all.

    Args:
        rows: tokens of every row.
        most: lengths.

    Returns:
        Multiples of `ROUNDED`, ascending, the last at least the longest row.
    """
    counts = Counter(-(-row // ROUNDED) * ROUNDED for row in rows)
    lengths = sorted(counts)

    def filled(first: int, last: int) -> int:
        return sum(counts[length] * (lengths[last] - length) for length in lengths[first:last])

    @cache
    def best(last: int, left: int) -> tuple[int, tuple[int, ...]]:
        """Tokens that fill rows up to `lengths[last]`, and the lengths, of which it is one and `left` others are shorter."""
        alone = filled(0, last), (lengths[last],)
        if not left:
            return alone
        shorter = ((best(before, left - 1), before) for before in range(last))
        return min(
            [
                alone,
                *((cost + filled(before + 1, last), (*chosen, lengths[last])) for (cost, chosen), before in shorter),
            ]
        )

    return list(best(len(lengths) - 1, most - 1)[1])


def longest_filling(rows: Sequence[int], lengths: Sequence[int]) -> int:
    """Tokens that fill a row up to the next of some lengths, at most."""
    return max(lengths[bisect_left(lengths, row)] - row for row in rows)


def replay(decoder: "torch.nn.Module", lengths: Sequence[int], chats: int) -> None:
    """Let a decoder run as graphs, in training, on rows of packed texts (`attention.use_packed`).

    Rows are filled up to the next length with a text that nothing looks at; one that is longer than all runs as it would
    have. Only one graph's activations are there at a time, and all share their place.

    Args:
        lengths: of rows, in tokens, ascending.
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

    # Capturing runs on a stream of its own; the trainer's waits for it.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    pool = torch.cuda.graph_pool_handle()

    def captured(tokens: int) -> Any:
        ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
        positions = torch.arange(tokens, device=device)[None]
        bounds = torch.tensor([0] + [tokens] * (chats + 1), dtype=torch.int32, device=device)
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return torch.cuda.make_graphed_callables(Row().train(), (ids, positions, bounds), pool=pool)

    # The longest first: the others fit in its place.
    graphs = {tokens: captured(tokens) for tokens in reversed(lengths)}

    def places() -> list[int]:
        return [
            parameter.data_ptr() for name, parameter in decoder.named_parameters() if "lora_" in name
        ]  # frozen ones too

    before = places()

    @cache
    def in_place() -> bool:
        """Whether the weights are where they were captured; asked at the first row, after a checkpoint was loaded."""
        return places() == before

    def forward(input_ids: Any = None, position_ids: Any = None, cu_seq_lens_q: Any = None, **kwargs: Any) -> Any:
        there = input_ids.shape[1] if input_ids is not None else 0
        fits = cu_seq_lens_q is not None and 0 < there <= lengths[-1] and len(cu_seq_lens_q) <= chats + 1
        if not (decoder.training and fits and in_place()):
            return eager(input_ids=input_ids, position_ids=position_ids, cu_seq_lens_q=cu_seq_lens_q, **kwargs)
        tokens = lengths[bisect_left(lengths, there)]
        pad, rest = tokens - there, chats + 2 - len(cu_seq_lens_q)
        states = graphs[tokens](
            torch.nn.functional.pad(input_ids, (0, pad)),
            torch.cat([position_ids, torch.arange(pad, device=device)[None]], 1),
            torch.nn.functional.pad(cu_seq_lens_q, (0, rest), value=tokens),
        )
        return BaseModelOutputWithPast(last_hidden_state=states[:, :there])

    decoder.forward = forward  # type: ignore[method-assign]
