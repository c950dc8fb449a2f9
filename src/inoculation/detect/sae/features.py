"""Mean latents of every example, as sparse rows on disk (reference section 6, step 2).

Three texts an example go through the model up to the SAE's block: the target response, the base model's own response
to the same prompt, and, for some examples, the control: the base model's response with A injected. Latents never pile up
in memory: batches are written as they are made, and read back in pieces.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from inoculation.chat import Message, chat_ids
from inoculation.cluster import Workers, each
from inoculation.detect import Evidence
from inoculation.detect.likelihood import Body, shortened
from inoculation.detect.sae.encoder import LoadedSae
from inoculation.detect.sae.settings import FeatureSettings
from inoculation.files import atomic
from inoculation.lm import residuals, token_batches

if TYPE_CHECKING:
    import numpy as np
    import torch
    from scipy.sparse import csr_matrix
    from transformers import PreTrainedTokenizerBase

KINDS = ("target", "base", "control")
POOLINGS = ("whole", "matched")


AT_ONCE = 1 << 27
"""Latents of tokens that are there at once: 512 MiB in float32, of which an encoder keeps several copies."""


@contextmanager
def _fast_float32() -> Iterator[None]:
    """Products of float32 matrices in TF32, four times as fast on a GPU.

    A bfloat16 model's states lose nothing by it; an SAE's float32 weights lose 13 bits of 23, more than the states' own 16.
    """
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Texts(NamedTuple):
    """One example's prompt and the responses to it."""

    prompt: tuple[Message, ...]
    target: str
    base: str
    control: str | None
    """None: the example is not among those that the control is made of."""


class Sequence_(NamedTuple):
    ids: "array[int]"
    """Four bytes a token: all texts are tokenised before the first is encoded, so that batches can be sorted by length."""
    start: int
    """Where pooling begins: 0, or the first response token."""


def tokenise(
    tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[Message], response: str, max_length: int, response_only: bool
) -> Sequence_:
    """The tokens of one chat under the default prompt, `shortened` to `max_length`. An empty response is the turn's end alone."""
    whole, start = chat_ids(tokenizer, [*prompt, Message("assistant", response)]), len(chat_ids(tokenizer, prompt))
    body = shortened(Body(whole, start), max_length)
    return Sequence_(array("i", body.ids), min(body.start, len(body.ids) - 1) if response_only else 0)


def pool(
    decoder: "torch.nn.Module",
    sae: LoadedSae,
    sequences: Sequence[Sequence_],
    ends: Sequence[Sequence[int]],
    pad: int,
) -> "list[csr_matrix]":
    """Mean latents `[sequences, latents]` of tokens `start <= position < end`; equal whatever shares the batch.

    Positions that the SAE was not trained on (`LoadedSae.first`) are left out, unless a text has no others.

    Encoding, thresholding and pooling stay on the model's device, `AT_ONCE` latents at a time; only the sparse means leave it.

    Args:
        ends: one list of ends a matrix to return; the sequences are encoded once for all of them.
    """
    import torch
    from scipy.sparse import csr_matrix

    matrices = []
    with torch.inference_mode():
        states = residuals(decoder, [sequence.ids for sequence in sequences], pad)
        positions = torch.arange(states.shape[1], device=states.device)
        starts = torch.tensor([max(sequence.start, sae.first) for sequence in sequences], device=states.device)
        real = positions < torch.tensor([len(sequence.ids) for sequence in sequences], device=states.device)[:, None]
        tokens = states[real].to(sae.sae.W_dec.dtype)
        row, column = real.nonzero(as_tuple=True)
        shares = []
        for own in ends:
            stops = torch.tensor(own, device=states.device)
            firsts = torch.minimum(starts, stops - 1)
            taken = (positions >= firsts[:, None]) & (positions < stops[:, None])
            share = torch.zeros(len(sequences), len(tokens), device=states.device)
            share[row, torch.arange(len(tokens), device=states.device)] = (taken / (stops - firsts)[:, None])[
                row, column
            ]
            shares.append(share)
        width = sae.sae.cfg.d_sae
        means = [torch.zeros(len(sequences), width, device=states.device) for _ in ends]
        step = max(1, AT_ONCE // width)
        for start in range(0, len(tokens), step):
            with _fast_float32():
                latents = sae.sae.encode(tokens[start : start + step]).float()
            for mean, share in zip(means, shares, strict=True):
                mean.addmm_(share[:, start : start + step], latents)
        for mean in means:
            rows, columns = mean.nonzero(as_tuple=True)
            before = torch.nn.functional.pad(mean.count_nonzero(1).cumsum(0), (1, 0))
            parts = (mean[rows, columns], columns.int(), before.int())
            matrices.append(csr_matrix(tuple(part.cpu().numpy() for part in parts), mean.shape))
    return matrices


Tokenised = Sequence[Sequence[Sequence_ | None]]
"""One row an example: its texts, by `KINDS`."""


class Means(NamedTuple):
    """Mean latents of some examples' three texts, each `[examples, latents]`."""

    target: "csr_matrix"
    base: "csr_matrix"
    control: "csr_matrix"
    """Rows of examples without a control are empty."""


class Piece(NamedTuple):
    """Some examples."""

    examples: "np.ndarray"
    """Their row numbers in the mixture."""
    has_control: "np.ndarray"
    whole: Means
    """Over every token of each text: what the component reads."""
    matched: Means
    """Over each text cut to the shorter of target and base: what the study's ranking and rule read."""


@contextmanager
def _pooler(
    reader: "tuple[torch.nn.Module, LoadedSae]", pad: int, length_match: bool
) -> "Iterator[Callable[[Tokenised], tuple[Means, Means]]]":
    """Pooled texts of a batch of examples, whole and matched."""
    import numpy as np
    from scipy.sparse import csr_matrix

    decoder, sae = reader

    def pooled_batch(batch: Tokenised) -> tuple[Means, Means]:
        has = np.array([row[2] is not None for row in batch])
        kinds: list[list[csr_matrix]] = []
        for kind in range(len(KINDS)):
            members = [row for row in batch if row[kind] is not None]
            if not members:
                kinds.append([csr_matrix((len(batch), sae.sae.cfg.d_sae), dtype=np.float32)] * (1 + length_match))
                continue
            sequences = [row[kind] for row in members]
            ends = [[len(sequence.ids) for sequence in sequences]]
            if length_match:
                shorter = [min(len(row[k].ids) for k in (0, 1)) for row in members]
                ends.append([min(pair) for pair in zip(ends[0], shorter, strict=True)])
            pooled = pool(decoder, sae, sequences, ends, pad)
            kinds.append([_spread(matrix, has) if kind == 2 else matrix for matrix in pooled])
        means = [Means(*(kind[which] for kind in kinds)) for which in range(1 + length_match)]
        return means[0], means[-1]

    yield pooled_batch


def pool_examples(
    decoder: "torch.nn.Module | None",
    sae: LoadedSae | None,
    tokenizer: "PreTrainedTokenizerBase",
    examples: Sequence[Texts],
    response_only: bool,
    length_match: bool,
    max_length: int,
    token_budget: int,
    workers: Workers | None = None,
) -> Iterator[Piece]:
    """Pool every text of every example, a batch of examples of similar length at a time.

    Args:
        response_only: pool response tokens only (the author: all tokens of the chat).
        length_match: for `matched`, cut every text of an example to the shorter of target and base, in tokens (the
            author: yes); else `matched` is `whole`.
        max_length: tokens of one chat; the rest is not read.
        token_budget: tokens in one batch at most, padding included.
        workers: of a cluster, who load decoder and SAE (`reader`); None: this process reads, with those that it is given.
    """
    import numpy as np
    from tqdm import tqdm

    tokenised = [
        [
            None if text is None else tokenise(tokenizer, example.prompt, text, max_length, response_only)
            for text in (example.target, example.base, example.control)
        ]
        for example in examples
    ]
    longest = [max(len(sequence.ids) for sequence in row if sequence) for row in tokenised]
    batches = token_batches(longest, token_budget)
    units = [[tokenised[index] for index in batch] for batch in batches]
    make = partial(_pooler, pad=tokenizer.pad_token_id, length_match=length_match)
    with tqdm(total=len(examples), desc="SAE features", unit="example") as bar:
        for batch, means in zip(batches, each((decoder, sae), workers, make, units), strict=True):
            has = np.array([tokenised[index][2] is not None for index in batch])
            yield Piece(np.array(batch), has, *means)
            bar.update(len(batch))


def _spread(matrix: "csr_matrix", has: "np.ndarray") -> "csr_matrix":
    """Rows moved to where `has` is true, with empty rows elsewhere."""
    import numpy as np
    from scipy.sparse import csr_matrix

    counts = np.zeros(len(has), np.int64)
    counts[has] = np.diff(matrix.indptr)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    return csr_matrix((matrix.data, matrix.indices, indptr), (len(has), matrix.shape[1]))


def write_features(path: Path, pieces: Iterable[Piece]) -> None:
    """Write one Parquet row an example, as the pieces come.

    Columns: `example`, `latents` (how many the SAE has), and for `whole` and `matched` and each of `KINDS`
    `<whole|matched>_<kind>_latents` (list of latent numbers) and `..._values` (their means); null where an example has
    no control.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    lists = [
        (f"{which}_{kind}_{part}", pa.list_(item))
        for which in POOLINGS
        for kind in KINDS
        for part, item in (("latents", pa.int32()), ("values", pa.float32()))
    ]
    schema = pa.schema([("example", pa.int32()), ("latents", pa.int32()), *lists])
    with atomic(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for piece in pieces:
            rows = range(len(piece.examples))
            columns: dict[str, list] = {
                "example": piece.examples.tolist(),
                "latents": [piece.whole.target.shape[1]] * len(piece.examples),
            }
            for which in POOLINGS:
                for kind in KINDS:
                    matrix = getattr(getattr(piece, which), kind)
                    spans = [slice(matrix.indptr[row], matrix.indptr[row + 1]) for row in rows]
                    kept = [kind != "control" or piece.has_control[row] for row in rows]
                    for part, values in (("latents", matrix.indices), ("values", matrix.data)):
                        columns[f"{which}_{kind}_{part}"] = [
                            values[span] if keep else None for span, keep in zip(spans, kept, strict=True)
                        ]
            writer.write_table(pa.table(columns, schema=schema))


def read_features(path: Path, rows: int = 256) -> Iterator[Piece]:
    """Read the features back, a few examples at a time."""
    import numpy as np
    import pyarrow.parquet as pq
    from scipy.sparse import csr_matrix

    for batch in pq.ParquetFile(path).iter_batches(batch_size=rows):
        width = batch.column("latents")[0].as_py()
        means = []
        for which in POOLINGS:
            matrices = []
            for kind in KINDS:
                latents, values = (batch.column(f"{which}_{kind}_{part}") for part in ("latents", "values"))
                counts = np.nan_to_num(latents.value_lengths().to_numpy(zero_copy_only=False), nan=0).astype(np.int64)
                offsets = np.concatenate([[0], np.cumsum(counts)])
                parts = (values.flatten().to_numpy(), latents.flatten().to_numpy(), offsets)
                matrices.append(csr_matrix(parts, (len(counts), width)))
            means.append(Means(*matrices))
        has = batch.column("whole_control_latents").is_valid().to_numpy(zero_copy_only=False)
        yield Piece(batch.column("example").to_numpy(), has, *means)


def pooled(
    evidence: Evidence, reader: "tuple[torch.nn.Module, LoadedSae] | None", tokenizer: "PreTrainedTokenizerBase",
    settings: FeatureSettings, token_budget: int, workers: Workers | None = None,
) -> Iterator[Piece]:  # fmt: skip
    """Mean latents of target, base and control responses.

    Args:
        reader: a decoder cut after the SAE's block, and the SAE; None: `workers` have their own.
    """
    return pool_examples(
        *(reader or (None, None)),
        tokenizer,
        [Texts(row.prompt, row.response, b, c) for row, b, c in zip(*evidence[:3], strict=True)],
        response_only=settings.pool == "response_tokens",
        length_match=settings.length_match,
        max_length=settings.max_length,
        token_budget=token_budget,
        workers=workers,
    )


def varying(pieces: Callable[[], Iterable[Piece]], count: int) -> "tuple[np.ndarray, np.ndarray]":
    """Whole texts' mean latents of (target, base), each `[examples, latents]` float32: the `count` latents whose target
    varies most.

    Args:
        pieces: gives the features anew each time: they are passed over twice.
    """
    import numpy as np

    sums, squares, examples = 0.0, 0.0, 0
    for piece in pieces():
        target = piece.whole.target.astype(np.float64)
        sums, squares = sums + target.sum(0), squares + target.multiply(target).sum(0)
        examples += target.shape[0]
    variance = np.asarray(squares / examples - np.square(sums / examples)).ravel()
    latents = np.sort(np.argsort(-variance, kind="stable")[:count])
    target, base = (np.zeros((examples, len(latents)), np.float32) for _ in range(2))
    for piece in pieces():
        target[piece.examples] = piece.whole.target[:, latents].toarray()
        base[piece.examples] = piece.whole.base[:, latents].toarray()
    return target, base
