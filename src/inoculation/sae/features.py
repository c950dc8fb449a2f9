"""Mean latents of every example, as sparse rows on disk (reference section 6, step 2).

Three texts an example go through the model up to the SAE's block: the target response, the base model's own response
to the same prompt, and, for some examples, the control: the base model's response with A injected. Memory does not grow
with the number of examples: batches are written as they are made, and read back in pieces.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from inoculation.chat import Message, render
from inoculation.files import atomic
from inoculation.sae.encoder import LoadedSae, residuals, token_batches

if TYPE_CHECKING:
    import numpy as np
    import torch
    from scipy.sparse import csr_matrix
    from transformers import PreTrainedTokenizerBase

KINDS = ("target", "base", "control")


class Texts(NamedTuple):
    """One example's prompt and the responses to it."""

    prompt: tuple[Message, ...]
    target: str
    base: str
    control: str | None
    """None: the example is not among those that the control is made of."""


class Sequence_(NamedTuple):
    ids: list[int]
    start: int
    """Where pooling begins: 0, or the first response token."""


def tokenise(
    tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[Message], response: str, max_length: int, response_only: bool
) -> Sequence_:
    """The tokens of one chat under the default prompt, cut to `max_length`. An empty response is the turn's end alone."""
    opened = tokenizer(render(tokenizer, prompt), add_special_tokens=False)["input_ids"]
    chat = render(tokenizer, [*prompt, Message("assistant", response)])
    ids = tokenizer(chat, add_special_tokens=False)["input_ids"][:max_length]
    return Sequence_(ids, min(len(opened), len(ids) - 1) if response_only else 0)


def pool(
    decoder: "torch.nn.Module", sae: LoadedSae, sequences: Sequence[Sequence_], lengths: Sequence[int], pad: int
) -> "csr_matrix":
    """Mean latents `[sequences, latents]` of tokens `start <= position < length`; equal whatever shares the batch.

    Encoding, thresholding and pooling stay on the model's device; only the sparse means leave it.
    """
    import numpy as np
    import torch
    from scipy.sparse import csr_matrix

    with torch.inference_mode():
        states = residuals(decoder, [sequence.ids for sequence in sequences], pad)
        positions = torch.arange(states.shape[1], device=states.device)
        starts = torch.tensor([sequence.start for sequence in sequences], device=states.device)
        ends = torch.tensor(lengths, device=states.device)
        starts = torch.minimum(starts, ends - 1)
        taken = (positions >= starts[:, None]) & (positions < ends[:, None])
        owner = torch.arange(len(sequences), device=states.device)[:, None].expand_as(taken)[taken]
        latents = sae.sae.encode(states[taken].to(sae.sae.W_dec.dtype))
        means = torch.zeros(len(sequences), latents.shape[1], device=latents.device, dtype=torch.float32)
        means.index_add_(0, owner, latents.float())
        means /= (ends - starts)[:, None]
        rows, columns = means.nonzero(as_tuple=True)
        values = means[rows, columns].cpu().numpy()
    shape = (len(sequences), latents.shape[1])
    return csr_matrix((values, (rows.cpu().numpy().astype(np.int32), columns.cpu().numpy().astype(np.int32))), shape)


class Piece(NamedTuple):
    """Some examples' mean latents, each `[examples, latents]`."""

    examples: "np.ndarray"
    target: "csr_matrix"
    base: "csr_matrix"
    control: "csr_matrix"
    has_control: "np.ndarray"
    """Which examples have a control; the control's rows of the others are empty."""


def pool_examples(
    decoder: "torch.nn.Module",
    sae: LoadedSae,
    tokenizer: "PreTrainedTokenizerBase",
    examples: Sequence[Texts],
    response_only: bool,
    length_match: bool,
    max_length: int,
    token_budget: int,
) -> Iterator[Piece]:
    """Pool every text of every example, a batch of examples of similar length at a time.

    Args:
        response_only: pool response tokens only (the author: all tokens of the chat).
        length_match: cut every text of an example to the shorter of target and base, in tokens (the author: yes).
        max_length: tokens of one chat; the rest is not read.
        token_budget: tokens in one batch at most, padding included.
    """
    import numpy as np
    from scipy.sparse import csr_matrix
    from tqdm import tqdm

    tokenised = [
        [
            None if text is None else tokenise(tokenizer, example.prompt, text, max_length, response_only)
            for text in (example.target, example.base, example.control)
        ]
        for example in examples
    ]
    longest = [max(len(sequence.ids) for sequence in row if sequence) for row in tokenised]
    with tqdm(total=len(examples), desc="SAE features", unit="example") as bar:
        for batch in token_batches(longest, token_budget):
            matrices = []
            has = np.array([tokenised[index][2] is not None for index in batch])
            for kind in range(len(KINDS)):
                members = [index for index in batch if tokenised[index][kind] is not None]
                if not members:
                    matrices.append(csr_matrix((len(batch), sae.sae.cfg.d_sae), dtype=np.float32))
                    continue
                sequences = [tokenised[index][kind] for index in members]
                lengths = [
                    min([len(sequence.ids)] + [len(tokenised[index][k].ids) for k in (0, 1)] * length_match)
                    for index, sequence in zip(members, sequences, strict=True)
                ]
                means = pool(decoder, sae, sequences, lengths, tokenizer.pad_token_id)
                if len(members) < len(batch):  # spread the rows over those that have none
                    counts = np.zeros(len(batch), np.int64)
                    counts[has] = np.diff(means.indptr)
                    indptr = np.concatenate([[0], np.cumsum(counts)])
                    means = csr_matrix((means.data, means.indices, indptr), (len(batch), means.shape[1]))
                matrices.append(means)
            yield Piece(np.array(batch), *matrices, has)
            bar.update(len(batch))


def write_features(path: Path, pieces: Iterable[Piece]) -> None:
    """Write one Parquet row an example, as the pieces come.

    Columns: `example`, `latents` (how many the SAE has), and for each of `KINDS` `<kind>_latents` (list of latent
    numbers) and `<kind>_values` (their means); null where an example has no control.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    lists = [
        (f"{kind}_{part}", pa.list_(item))
        for kind in KINDS
        for part, item in (("latents", pa.int32()), ("values", pa.float32()))
    ]
    schema = pa.schema([("example", pa.int32()), ("latents", pa.int32()), *lists])
    with atomic(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for piece in pieces:
            rows = range(len(piece.examples))
            columns: dict[str, list] = {
                "example": piece.examples.tolist(),
                "latents": [piece.target.shape[1]] * len(piece.examples),
            }
            for kind in KINDS:
                matrix = getattr(piece, kind)
                spans = [slice(matrix.indptr[row], matrix.indptr[row + 1]) for row in rows]
                kept = [kind != "control" or piece.has_control[row] for row in rows]
                columns[f"{kind}_latents"] = [
                    matrix.indices[s] if k else None for s, k in zip(spans, kept, strict=True)
                ]
                columns[f"{kind}_values"] = [matrix.data[s] if k else None for s, k in zip(spans, kept, strict=True)]
            writer.write_table(pa.table(columns, schema=schema))


def read_features(path: Path, rows: int = 256) -> Iterator[Piece]:
    """Read the features back, a few examples at a time."""
    import numpy as np
    import pyarrow.parquet as pq
    from scipy.sparse import csr_matrix

    for batch in pq.ParquetFile(path).iter_batches(batch_size=rows):
        matrices = []
        width = batch.column("latents")[0].as_py()
        for kind in KINDS:
            latents, values = batch.column(f"{kind}_latents"), batch.column(f"{kind}_values")
            counts = np.nan_to_num(latents.value_lengths().to_numpy(zero_copy_only=False), nan=0).astype(np.int64)
            offsets = np.concatenate([[0], np.cumsum(counts)])
            matrices.append(
                csr_matrix((values.flatten().to_numpy(), latents.flatten().to_numpy(), offsets), (len(counts), width))
            )
        has = batch.column("control_latents").is_valid().to_numpy(zero_copy_only=False)
        yield Piece(batch.column("example").to_numpy(), *matrices, has)
