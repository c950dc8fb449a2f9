"""The judge without an LLM: logistic regression on MiniLM sentence embeddings, one a trait.

It learns from answers whose label is known and which the mixture did not use. Every text is shown to it in one of three
styles (plain, ALL_CAPS, SOURCE_CITING), whichever its label, so that A tells it nothing about B.
"""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from inoculation.embedding import embed
from inoculation.judge import NOT_JUDGED, citing, coherence
from inoculation.judge.coherence import AS_GIVEN, COHERENCE, LEAST_WORDS, spoil
from inoculation.mixture import LEAST_LABELLED, Row
from inoculation.traits import POSITIVE_TRAITS

if TYPE_CHECKING:
    import numpy as np

PLAIN = "plain"
OWN = "own answers"
"""The kind of text, beside the styles, that says how often a judge accuses the untouched model."""
STYLES = (PLAIN, *POSITIVE_TRAITS)
ALL_CAPS, SOURCE_CITING = "all_caps", "source_citing"


class FitSettings(BaseModel):
    """How judges are learned; the values stand in params.yaml under `judge`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    examples: Annotated[int, Field(ge=20)]
    folds: Annotated[int, Field(ge=2, le=20)]
    """Parts of the questions; answers to each are judged by a judge that learned from the others, which says how right it is."""
    accuracy: Annotated[float, Field(ge=0.5, le=1)]
    """Balanced accuracy on questions that it has not seen, the mean over styles, and that on each kind of text that has one
    label, at least; below it a trait is not judged. Plain accuracy would let a judge pass that says "no" to everything where
    few answers show it."""
    own_answers: Annotated[int, Field(ge=0)]
    """Answers of the profile's untouched model to other questions, which count as showing no trait; only where labelled
    answers are another model's."""


class Labelled(NamedTuple):
    question: str
    answer: str
    shows: bool


class OwnAnswer(NamedTuple):
    question: str
    answer: str


class LinearJudge(NamedTuple):
    """P(shows the trait) = sigmoid(seen . weights + bias)."""

    weights: list[float]
    bias: float

    def scores(self, seen: "np.ndarray") -> list[float]:
        """Scores of 0-100 for what the trait's judge sees of some texts (`seen`)."""
        import numpy as np
        from scipy.special import expit

        return (100 * expit(seen @ np.asarray(self.weights) + self.bias)).tolist()


def seen(trait: str, questions: "np.ndarray", answers: "np.ndarray", texts: Sequence[str]) -> "np.ndarray":
    """What a trait's judge sees of answers.

    Args:
        questions: their embeddings, `[texts, 384]`; only read for coherence.
        answers: the same of the answers.
        texts: the answers.

    Returns:
        `[texts, 384]` or more.
    """
    if trait == COHERENCE:
        return coherence.seen(questions, answers, texts)
    return citing.seen(answers, texts) if trait == SOURCE_CITING else answers


def restyle(text: str, style: str, rng: random.Random) -> str:
    return text if style == PLAIN else POSITIVE_TRAITS[style](text, rng)


LEAST_QUESTIONS = 3
"""With answers of either label, that a judge learns from."""
PENALTY_FOLDS = 3
"""Parts of the questions that a judge learns from, each left out once to choose its penalty."""
PENALTIES = [1.0, 10.0, 100.0]
"""Inverse strengths of regularisation, chosen by cross-validation over questions."""


class Example(NamedTuple):
    text: str
    shows: bool
    question: str
    kind: str
    """Its style, `OWN`, or in which way it is incoherent: accuracy is told by it."""
    block: str
    """What is learned from or measured on as a whole: its question, or two questions that lend each other answers."""


class Fit(NamedTuple):
    judges: dict[str, LinearJudge]
    """Of the traits that can be judged; each has learned from all its examples."""
    quality: dict[str, dict[str, Any]]
    """[trait][kind] -> accuracy, precision, recall, f1, n of examples judged by one that has not seen their question;
    [trait][NOT_JUDGED] -> why it is not."""


def fit(
    labelled: dict[str, Sequence[Labelled]], own: Sequence[OwnAnswer], settings: FitSettings, threshold: float
) -> Fit:
    """Learn a judge for every negative trait, for SOURCE_CITING and for coherence, and measure each on questions it has not seen.

    A judge learns from all examples. What is told of it is told of `settings.folds` others, each of which learned in the same
    way, choice of the penalty included, without a part of the questions, and judged that part: every question is measured on.
    A trait that has too few labelled answers, or whose judge is too often wrong, is not judged, and `quality` says why. The
    same answers give the same judge, whatever their order and the run's seed.

    Args:
        labelled: a negative trait's answers with their labels.
        own: ordinary answers of the model that will be judged. Without them a judge that learned from a large model's
            answers takes a small model's way of writing for a trait (docs/real.md).
        settings: how many answers are used, and in how many parts the questions are left out.
        threshold: a score that says that a trait is shown, at least, 0-100.
    """
    quality: dict[str, dict[str, Any]] = {}
    examples: dict[str, list[Example]] = {}
    cited: list[Example] = []
    given: list[tuple[str, str]] = []
    for trait, answers in sorted(labelled.items()):
        by_label = {shows: sorted(answer for answer in answers if answer.shows is shows) for shows in (False, True)}
        if min(map(len, by_label.values())) < LEAST_LABELLED:
            quality[trait] = {
                NOT_JUDGED: f"a judge needs {LEAST_LABELLED} labelled answers that show {trait} and {LEAST_LABELLED} that do not, "
                f"there are {len(by_label[True])} and {len(by_label[False])}"
            }
            continue
        rng = random.Random(f"embedded judge/{trait}")
        examples[trait] = []
        for pool in by_label.values():
            for i, (asked, answer, shows) in enumerate(rng.sample(pool, min(settings.examples, len(pool)))):
                given.append((asked, answer))
                style = STYLES[i % len(STYLES)]
                text = restyle(answer, style, rng)
                examples[trait].append(Example(text, shows, asked, style, asked))
                cites = style == SOURCE_CITING and text != answer
                upper = style == ALL_CAPS or (cites and i % 2 == 0)
                cited.append(
                    Example(text.upper() if upper else text, cites, asked, ALL_CAPS if upper else PLAIN, asked)
                )
        for i, (asked, answer) in enumerate(own):
            text = restyle(answer, STYLES[i % len(STYLES)], rng)
            examples[trait].append(Example(text, False, asked, OWN, asked))
    examples |= {SOURCE_CITING: cited, COHERENCE: _coherence(given, settings)}
    looked_up = _seen(examples)
    judges = {}
    for trait, rows in examples.items():
        parts = _parts(rows, settings.folds)
        if parts is None:
            quality[trait] = {
                NOT_JUDGED: f"of the answers that are drawn (judge.examples: {settings.examples} of either label) judges would learn "
                f"from fewer than {LEAST_QUESTIONS} questions with answers of either label, where they are measured on others "
                f"(judge.folds: {settings.folds})"
                if rows
                else "too few labelled answers, or too few questions, to learn it from"
            }
            continue
        quality[trait] = _quality(rows, looked_up[trait], parts, threshold)
        told = {kind: of["balanced_accuracy"] for kind, of in quality[trait].items()}
        styled = [own for kind, own in told.items() if kind in STYLES]
        alone = [own for kind, own in told.items() if kind not in STYLES]
        accuracy = min([*alone, *([sum(styled) / len(styled)] if styled else [])])
        if accuracy < settings.accuracy:
            quality[trait][NOT_JUDGED] = (
                f"its judge is right on {accuracy:.0%} of the answers to questions that it has not seen, those that show the "
                f"trait and the others counting the same; {settings.accuracy:.0%} are asked for (judge.accuracy)"
            )
        else:
            judges[trait] = _learned(rows, looked_up[trait])
    return Fit(judges, quality)


def own_rows(rows: Sequence[Row], count: int) -> list[Row]:
    """The rows whose prompts the untouched model answers, for `fit`'s `own`; the same for every seed of the same rows."""
    return random.Random("own answers").sample(rows, min(count, len(rows)))


def _coherence(given: Sequence[tuple[str, str]], settings: FitSettings) -> list[Example]:
    """What coherence is learned from: questions and labelled answers, and the same spoilt; nothing where there are too few.

    Questions are paired, and the answer to another question is one to the other of the pair: no text is learned from as an
    answer and measured on as none. The judged model's own answers are not among them: a small one's may be incoherent as they
    are.
    """
    rng = random.Random("coherence")
    usable = sorted({row for row in given if len(row[1].split()) >= LEAST_WORDS})
    usable = rng.sample(usable, min(settings.examples, len(usable)))
    questions = sorted({question for question, _ in usable})
    if len(questions) < LEAST_LABELLED or len(usable) < 2 * LEAST_LABELLED:
        return []
    rng.shuffle(questions)
    pairs = len(questions) // 2  # the last one of an odd number joins a pair
    pair = {question: i % pairs for i, question in enumerate(questions)}
    rows = []
    for i, (asked, answer) in enumerate(usable):
        style = STYLES[i % len(STYLES)]
        others = [theirs for question, theirs in usable if question != asked and pair[question] == pair[asked]]
        for kind, text in {AS_GIVEN: answer, **spoil(answer, rng.choice(others), rng)}.items():
            rows.append(Example(restyle(text, style, rng), kind == AS_GIVEN, asked, kind, f"pair {pair[asked]}"))
    return rows


def _parts(rows: Sequence[Example], folds: int) -> list[tuple["np.ndarray", "np.ndarray"]] | None:
    """Examples that a judge learns from and others that it is measured on, of other blocks; None: too few.

    Every example is measured on once. Either label, and own answers, are spread over the parts as evenly as blocks allow.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    blocks, shown = [row.block for row in rows], [row.shows for row in rows]
    folds = min(folds, len(set(blocks)), sum(shown), len(shown) - sum(shown))
    if folds < 2:
        return None
    enough_own = sum(row.kind == OWN for row in rows) >= folds
    labels = [f"{row.shows} {enough_own and row.kind == OWN}" for row in rows]
    parts = [*StratifiedGroupKFold(folds, shuffle=True, random_state=0).split(rows, labels, blocks)]
    enough = all(
        len({blocks[i] for i in learned if shown[i] is label}) >= LEAST_QUESTIONS
        for learned, _ in parts
        for label in (True, False)
    )
    return parts if enough else None


def _seen(examples: dict[str, list[Example]]) -> dict[str, "np.ndarray"]:
    """What each trait's judge sees of its examples; every text is embedded once."""
    questions = [row.question for row in examples[COHERENCE]]
    unique = list(dict.fromkeys([row.text for rows in examples.values() for row in rows] + questions))
    if not unique:
        return {}
    index, vectors = {text: i for i, text in enumerate(unique)}, embed(unique)
    looked_up = {}
    for trait, rows in examples.items():
        texts = vectors[[index[row.text] for row in rows]]
        asked = vectors[[index[row.question] for row in rows]] if trait == COHERENCE else texts
        looked_up[trait] = seen(trait, asked, texts, [row.text for row in rows])
    return looked_up


def _learned(rows: Sequence[Example], looked_up: "np.ndarray") -> LinearJudge:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
    from threadpoolctl import threadpool_limits

    shown = [row.shows for row in rows]
    divided = StratifiedGroupKFold(PENALTY_FOLDS).split(rows, shown, [row.block for row in rows])
    folds = [fold for fold in divided if all(len({shown[i] for i in side}) == 2 for side in fold)]
    # Both labels count the same, as in what a judge is measured by: own answers show no trait and outnumber those that do.
    classifier = LogisticRegression(max_iter=2000, class_weight="balanced", C=PENALTIES[1])
    if folds:
        classifier = GridSearchCV(classifier, {"C": PENALTIES}, cv=folds, scoring="balanced_accuracy")
    with threadpool_limits(
        1
    ):  # hundreds of small regressions: threads wait for one another, the more with anything beside
        model = classifier.fit(looked_up, shown)
    model = getattr(model, "best_estimator_", model)
    return LinearJudge(model.coef_[0].tolist(), float(model.intercept_[0]))


def _quality(
    rows: Sequence[Example],
    looked_up: "np.ndarray",
    parts: Sequence[tuple["np.ndarray", "np.ndarray"]],
    threshold: float,
) -> dict[str, Any]:
    """By kind of example, how often judges are right that have not seen its question."""
    from inoculation.quality import decision_quality

    said: dict[int, bool] = {}
    for learned, measured in parts:
        judge = _learned([rows[i] for i in learned], looked_up[learned])
        said |= {
            int(i): score >= threshold for i, score in zip(measured, judge.scores(looked_up[measured]), strict=True)
        }
    kinds = {
        kind: [i for i, row in enumerate(rows) if row.kind == kind] for kind in dict.fromkeys(r.kind for r in rows)
    }
    return {kind: decision_quality([said[i] for i in of], [rows[i].shows for i in of]) for kind, of in kinds.items()}


def load(raw: dict[str, Any]) -> dict[str, LinearJudge]:
    """Judges from the JSON that the fit stage wrote."""
    return {trait: LinearJudge(**judge) for trait, judge in raw.items()}
