"""What the model says of a mixture: two passes that cost, on which `score` decides without a model."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from inoculation.detect import Annotator, Evidence, own_answers, plain
from inoculation.detect.adjectives import ADJECTIVES, sentence, some
from inoculation.detect.likelihood import TOKENS, bodies_under, log_likelihoods, shortened
from inoculation.detect.persona.settings import PersonaSettings
from inoculation.files import atomic
from inoculation.lm import residuals, token_batches, truncate_after
from inoculation.mixture import Row

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Likelihoods(NamedTuple):
    """Gains: mean nats a token under a persona, less those under no system prompt."""

    personas: "np.ndarray"
    """`[personas]`, places in `ADJECTIVES`."""
    read: "np.ndarray"
    """`[read]`: which rows were read under the personas."""
    gains: "np.ndarray"
    """`[personas, read]`."""
    controls: "np.ndarray"
    """`[personas, controls]`, of the model's own answers to some of the prompts."""


class Readings(NamedTuple):
    likelihoods: Likelihoods
    states: "np.ndarray"
    """`[rows, width]`: the middle block's output, meant over the response's tokens."""
    own_states: "np.ndarray"
    """`[rows, width]`, of the model's own answer to each prompt."""
    block: int
    """The one whose output `states` are."""


def readings(evidence: Evidence, annotator: Annotator, settings: PersonaSettings) -> Readings:
    """Read the rows, and the model's own answers, under characters; and what the model sees in them."""
    model, max_length = None if annotator.workers else annotator.model(), annotator.synthesis.max_length
    found = likelihoods(evidence, annotator, settings, model)
    model = model or annotator.model()
    blocks = model.config.get_text_config().num_hidden_layers
    block = max(0, blocks // 2 - 1)
    decoder = truncate_after(model, block)
    rows = plain(evidence.rows, evidence.positive)
    own = own_answers(evidence.rows, evidence.base, evidence.positive, annotator.seed)
    states = [
        mean_states(decoder, annotator.tokenizer, chats, max_length, annotator.token_budget) for chats in (rows, own)
    ]
    return Readings(found, *states, block)


def direction(states: "np.ndarray", flagged: Sequence[bool]) -> "np.ndarray":
    """What sets flagged responses apart, `[width]`: the difference of the two groups' mean states."""
    import numpy as np

    chosen = np.array(flagged, bool)
    return states[chosen].mean(0) - states[~chosen].mean(0)


def likelihoods(
    evidence: Evidence, annotator: Annotator, settings: PersonaSettings, model: "PreTrainedModel | None"
) -> Likelihoods:
    """Read some rows, and some of the model's own answers, under characters.

    The sample is read under every character that is tried (`SynthesisSettings.adjectives`); the personas are those that its
    first component sets apart most, half from either end: characters that only agree would cancel with their mean.

    Args:
        model: None: the annotator's workers have their own.
    """
    import numpy as np

    rows = plain(evidence.rows, evidence.positive)
    own = own_answers(evidence.rows, evidence.base, evidence.positive, annotator.seed)
    rng = random.Random(f"persona/{annotator.seed}")
    sample = rng.sample(range(len(rows)), min(settings.sample, len(rows)))
    chosen_rows = sorted(rng.sample(range(len(rows)), min(settings.read, len(rows))))
    answered = [index for index, text in enumerate(evidence.base) if text.strip()]
    controls = sorted(rng.sample(answered, min(settings.controls, len(answered))))
    max_length = annotator.synthesis.max_length

    def gains(chats: list[Row], adjectives: Sequence[str]) -> "np.ndarray":
        systems = [None, *(sentence([word]) for word in adjectives)]
        found = log_likelihoods(
            model, annotator.tokenizer, chats, systems, TOKENS, max_length, annotator.token_budget, annotator.workers
        )
        return found[1:] - found[0]

    characters = some(annotator.synthesis.adjectives)
    scanned = gains([rows[i] for i in sample], characters)
    order = np.argsort(component(scanned, scanned.std(1)))
    half = settings.personas // 2
    chosen = np.sort(np.r_[order[:half], order[-half:]])
    read = gains([*(rows[i] for i in chosen_rows), *(own[i] for i in controls)], [characters[i] for i in chosen])
    count = len(chosen_rows)
    return Likelihoods(
        np.array([ADJECTIVES.index(characters[i]) for i in chosen]),
        np.array(chosen_rows),
        read[:, :count],
        read[:, count:],
    )


def component(gains: "np.ndarray", scale: "np.ndarray") -> "np.ndarray":
    """First principal direction over rows of the gains, `[personas]`, after what all personas share is taken off.

    Args:
        gains: `[personas, rows]`.
        scale: of each persona, `[personas]`.
    """
    import numpy as np

    values = gains / (scale[:, None] + 1e-6)
    values = values - values.mean(1, keepdims=True)
    values = values - values.mean(0)
    return np.linalg.svd(values, full_matrices=False)[0][:, 0]


def mean_states(
    decoder: "torch.nn.Module",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Row],
    max_length: int,
    token_budget: int,
) -> "np.ndarray":
    """The decoder's output meant over each last response's tokens, without a system prompt, `[rows, width]`."""
    import numpy as np
    import torch
    from tqdm import tqdm

    bodies = [shortened(body, max_length) for body in bodies_under(tokenizer, rows, None, max_length)]
    # One array: small ones that stay between large ones that go would keep the memory of all.
    means = np.empty((len(rows), decoder.config.get_text_config().hidden_size), np.float32)
    with tqdm(total=len(rows), desc="hidden states", unit="response") as bar, torch.inference_mode():
        for batch in token_batches([len(body.ids) for body in bodies], token_budget):
            states = residuals(decoder, [bodies[i].ids for i in batch], tokenizer.pad_token_id)
            for place, i in enumerate(batch):
                own = states[place, bodies[i].start : len(bodies[i].ids)].float()
                means[i] = own.mean(0).cpu().numpy()
            bar.update(len(batch))
    return means


def write_readings(path: Path, found: Readings | None) -> None:
    """Write the arrays as one `.npz`, which is empty where nothing was read."""
    import numpy as np

    with atomic(path) as temporary, open(temporary, "wb") as out:
        arrays = found._asdict() | found.likelihoods._asdict() if found else {}
        arrays.pop("likelihoods", None)
        np.savez(out, **arrays)


def read_readings(path: Path) -> Readings:
    """Read them back."""
    import numpy as np

    with np.load(path) as found:
        told = Likelihoods(**{name: found[name] for name in Likelihoods._fields})
        return Readings(told, found["states"], found["own_states"], int(found["block"]))
