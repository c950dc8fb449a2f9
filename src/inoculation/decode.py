"""Answers on a GPU: a fixed number of places in memory, each of which takes the next prompt as soon as its answer ends.

A token of every answer is one CUDA graph: 28 blocks under an adapter are 1,700 small operations, which take longer to launch
than to compute. `generate` launches each of them, and lets a batch wait for its longest answer.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from inoculation.attention import use, widths

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

T = TypeVar("T")

NAME = "places"
MEMORY = 0.6
"""Share of the free memory that keys and values may take."""
REFILL = 8
"""Prompts are read when an eighth of the places is free: a few are read nearly as fast as one."""
READ = 16384
"""Tokens of prompts that are read at once, at most, padding included."""
ROUNDED = 64
"""Lengths are multiples, so that the same graph serves calls of nearly the same lengths."""


class Places:
    """Keys and values of every place, for a model's forward pass in the place of a `transformers.Cache`."""

    def __init__(self, config: Any, places: int, length: int, dtype: "torch.dtype", device: "torch.device") -> None:
        import torch

        heads = config.num_key_value_heads
        size = widths(config)[1] // heads
        # One place more: where the rows of a graph go that have no prompt.
        self.keys, self.values = (
            [torch.zeros(places + 1, heads, length, size, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
            for _ in range(2)
        )  # fmt: skip
        self.every = torch.arange(places, device=device)
        self.spare = places
        self.positions = torch.zeros(places, dtype=torch.long, device=device)
        """Of the token that each place reads next."""
        self.into: torch.Tensor | None = None
        """The places whose prompts are being read; None: every place reads one token."""

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def update(
        self, key: "torch.Tensor", value: "torch.Tensor", layer: int, *_: Any
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """Write what a block's new tokens left, `[places, heads, tokens, head_dim]`; returns what they look at."""
        if self.into is not None:
            self.keys[layer][self.into, :, : key.shape[2]] = key.to(self.keys[layer].dtype)
            self.values[layer][self.into, :, : key.shape[2]] = value.to(self.values[layer].dtype)
            return key, value
        self.keys[layer][self.every, :, self.positions] = key[:, :, 0].to(self.keys[layer].dtype)
        self.values[layer][self.every, :, self.positions] = value[:, :, 0].to(self.values[layer].dtype)
        return self.keys[layer][: self.spare], self.values[layer][: self.spare]

    @staticmethod
    def bytes_a_place(config: Any, length: int, itemsize: int) -> int:
        return 2 * widths(config)[1] * length * config.num_hidden_layers * itemsize


def attend(
    module: "torch.nn.Module", query: "torch.Tensor", key: "torch.Tensor", value: "torch.Tensor",
    attention_mask: "torch.Tensor", scaling: float, **kwargs: Any,
) -> "tuple[torch.Tensor, None]":  # fmt: skip
    """transformers' attention function for `Places`: prompts within themselves, a single token with all before it.

    Queries that share a key are queries of one head, so that keys are not copied for each of them.
    """
    from torch.nn.functional import scaled_dot_product_attention

    places, heads, tokens, size = query.shape
    if key.shape[2] == tokens:  # prompts
        out = scaled_dot_product_attention(query, key, value, scale=scaling, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None
    query = query.to(key.dtype).reshape(places, key.shape[1], heads // key.shape[1], size)
    mask = attention_mask.expand(-1, -1, query.shape[2], -1)
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(places, 1, heads, size), None


@contextmanager
def decoding(model: "PreTrainedModel", longest: int, max_new_tokens: int, most: int) -> "Iterator[Decoder]":
    """A decoder for prompts of at most `longest` tokens; the model attends as before afterwards.

    Args:
        most: answers at once; fewer where memory is short.
    """
    before = model.config._attn_implementation
    use(model, NAME, attend)
    try:
        yield Decoder(model, longest, max_new_tokens, most)
    finally:
        model.set_attn_implementation(before)


class Reader(NamedTuple):
    rows: "torch.Tensor"
    """Prompts, `[some, width]`."""
    into: "torch.Tensor"
    """Their places."""
    read: "Callable[[], None]"


class Decoder:
    """Answers of one model under one adapter, sampled in places."""

    def __init__(self, model: "PreTrainedModel", longest: int, max_new_tokens: int, most: int) -> None:
        import torch

        self.model, self.max_new_tokens = model, max_new_tokens
        self.length = -(-(longest + max_new_tokens) // ROUNDED) * ROUNDED
        config, device = model.config.get_text_config(), model.device
        if device.type == "cuda":
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info()[0]
            most = min(most, int(MEMORY * free) // Places.bytes_a_place(config, self.length, model.dtype.itemsize))
        self.count = max(1, most)
        self.places = Places(config, self.count, self.length, model.dtype, device)
        self.ids = torch.zeros(self.count, 1, dtype=torch.long, device=device)
        self.columns = torch.arange(self.length, device=device)
        # One pool for all graphs: they run one after another, and logits are read before the next one runs.
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.step: Callable[[], torch.Tensor] | None = None
        self.readers: dict[int, Reader] = {}

    def _next(self) -> "torch.Tensor":
        """Logits of every place's next token, `[places, vocabulary]`."""
        mask = (self.columns <= self.places.positions[:, None])[:, None, None]
        return self.model(
            input_ids=self.ids, position_ids=self.places.positions[:, None], attention_mask=mask,
            past_key_values=self.places, use_cache=True,
        ).logits[:, -1]  # fmt: skip

    def _captured(self, run: "Callable[[], T]") -> "Callable[[], T]":
        """A CUDA graph of what `run` does, whose replays write the same result anew; on a CPU `run` itself."""
        import torch

        if self.ids.device.type != "cuda":
            return run
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = run()

        def replay() -> T:
            graph.replay()
            return result

        return replay

    def _reader(self, width: int) -> "Reader":
        """Reads some prompts of at most `width` tokens into places."""
        import torch

        count = max(1, min(self.count // REFILL, READ // width))
        rows = torch.zeros(count, width, dtype=torch.long, device=self.ids.device)
        into = torch.full((count,), self.places.spare, device=self.ids.device)
        seen = torch.ones(width, width, dtype=torch.bool, device=self.ids.device).tril()[None, None]

        def run() -> None:
            self.places.into = into
            self.model.get_decoder()(
                input_ids=rows, position_ids=self.columns[None, :width], attention_mask=seen,
                past_key_values=self.places, use_cache=True,
            )  # fmt: skip
            self.places.into = None

        return Reader(rows, into, self._captured(run))

    def _read(self, places: list[int], prompts: list[Sequence[int]]) -> None:
        """Put prompts into places: all but the last token, which the next step reads."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        device = self.ids.device
        where = torch.tensor(places, device=device)
        self.ids[where, 0] = torch.tensor([prompt[-1] for prompt in prompts], device=device)
        self.places.positions[where] = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        width = min(self.length, -(-max(len(prompt) for prompt in prompts) // ROUNDED) * ROUNDED)
        reader = self.readers.get(width) or self.readers.setdefault(width, self._reader(width))
        for start in range(0, len(prompts), len(reader.rows)):
            # What stands behind a shorter prompt is overwritten before it is looked at.
            rows = pad_sequence(
                [torch.tensor(p[:-1]) for p in prompts[start : start + len(reader.rows)]], batch_first=True
            )
            reader.rows[: len(rows), : rows.shape[1]] = rows.to(device)
            reader.into.fill_(self.places.spare)
            reader.into[: len(rows)] = where[start : start + len(rows)]
            reader.read()

    def sample(
        self, prompts: Sequence[Sequence[int]], temperature: float, seed: int, ends: set[int]
    ) -> list[list[int]]:
        """A continuation of every prompt, up to an end token, which is part of it, or `max_new_tokens`.

        Args:
            prompts: tokens, none longer than the decoder was made for.
            temperature: 0: greedy.
        """
        import torch

        generator = torch.Generator(self.ids.device).manual_seed(seed)
        waiting = deque(range(len(prompts)))
        running: dict[int, int] = {}
        answers: list[list[int]] = [[] for _ in prompts]
        with torch.inference_mode():
            while waiting or running:
                free = [place for place in range(self.count) if place not in running] if waiting else []
                if waiting and (len(free) * REFILL >= self.count or not running):
                    taken = [(place, waiting.popleft()) for place in free[: len(waiting)]]
                    self._read([place for place, _ in taken], [prompts[i] for _, i in taken])
                    running.update(taken)
                self.step = self.step or self._captured(self._next)
                logits = self.step().float()
                if temperature:
                    tokens = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
                else:
                    tokens = logits.argmax(-1, keepdim=True)
                self.ids.copy_(tokens)
                self.places.positions.add_(1).clamp_(max=self.length - 1)
                for place, token in enumerate(tokens[:, 0].tolist()):
                    if place in running:
                        answer = answers[running[place]]
                        answer.append(token)
                        if token in ends or len(answer) == self.max_new_tokens:
                            del running[place]
        return answers
