"""The judge without an LLM: logistic regression on MiniLM sentence embeddings, one a trait.

It learns from answers whose label is known and which the mixture did not use. Every text is shown to it in one of three
styles (plain, ALL_CAPS, SOURCE_CITING), whichever its label, so that A tells it nothing about B.
"""

import random
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from inoculation.embedding import embed
from inoculation.judge import NOT_JUDGED, citing, coherence
from inoculation.judge.coherence import AS_GIVEN, COHERENCE, LEAST_WORDS, SPOILT, spoil
from inoculation.mixture import LEAST_LABELLED
from inoculation.traits import POSITIVE_TRAITS

if TYPE_CHECKING:
    import numpy as np

PLAIN = "plain"
OWN = "own answers"
"""The kind of text, beside the styles, that says how often a judge accuses the untouched model."""
STYLES = (PLAIN, *POSITIVE_TRAITS)
SOURCE_CITING = "source_citing"


class FitSettings(BaseModel):
    """How judges are learned; the values stand in params.yaml under `judge`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    examples: Annotated[int, Field(ge=20)]
    held_out: Annotated[float, Field(ge=0.05, le=0.9)]
    accuracy: Annotated[float, Field(ge=0.5, le=1)]
    """Balanced accuracy on held-out questions, the mean over styles, and that on texts of one label only, at least; below it a
    trait is not judged. Plain accuracy would let a judge pass that says "no" to everything where few answers show it."""
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


FOLDS = 3
"""Parts of the questions that a judge learns from, each left out once to choose its penalty."""
DRAWS = 100
"""Divisions of the questions that are tried, until both sides have answers of either label."""
PENALTIES = [1.0, 10.0, 100.0]
"""Inverse strengths of regularisation, chosen by cross-validation over questions."""


class Example(NamedTuple):
    text: str
    shows: bool
    question: str


class Fit(NamedTuple):
    judges: dict[str, LinearJudge]
    """Of the traits that can be judged."""
    quality: dict[str, dict[str, Any]]
    """[trait][style] -> accuracy, precision, recall, f1, n on held-out questions; [trait][NOT_JUDGED] -> why it is not."""


def fit(labelled: dict[str, Sequence[Labelled]], own: Sequence[OwnAnswer], settings: FitSettings, seed: int) -> Fit:
    """Learn a judge for every negative trait, for SOURCE_CITING and for coherence, and measure each on questions it has not seen.

    A trait that has too few labelled answers, or whose judge is too often wrong, is not judged, and `quality` says why.

    Args:
        labelled: a negative trait's answers with their labels.
        own: ordinary answers of the model that will be judged. Without them a judge that learned from a large model's
            answers takes a small model's way of writing for a trait (docs/real.md).
        settings: how many answers are used, and which share of the questions is kept for measuring.
        seed: of the choice of examples, styles and held-out questions.
    """
    too_few = {}
    for trait, answers in labelled.items():
        counts = {shows: sum(answer.shows is shows for answer in answers) for shows in (True, False)}
        if min(counts.values()) < LEAST_LABELLED:
            too_few[trait] = (
                f"a judge needs {LEAST_LABELLED} labelled answers that show {trait} and {LEAST_LABELLED} that do not, there are "
                f"{counts[True]} and {counts[False]}"
            )
    labelled = {trait: answers for trait, answers in labelled.items() if trait not in too_few}
    rng = random.Random(f"embedded judge/{seed}")
    styles = {trait: STYLES for trait in labelled} | {SOURCE_CITING: (PLAIN, "all_caps")}
    train: dict[str, list[Example]] = {trait: [] for trait in styles}
    test: dict[str, dict[str, list[Example]]] = {t: {style: [] for style in styles[t]} for t in styles}
    kept: dict[str, set[str]] = {}
    given: list[tuple[str, str]] = []
    for trait, answers in [*labelled.items()]:
        divided = _held_out(answers, settings.held_out, rng)
        if divided is None:
            del labelled[trait], train[trait], test[trait]
            too_few[trait] = (
                f"its answers cannot be divided so that a judge learns from {FOLDS} questions or more with answers of either "
                "label, and is measured on others that have both"
            )
            continue
        kept[trait] = divided
        for shows in (False, True):
            pool = [answer for answer in answers if answer.shows is shows]
            for answer in rng.sample(pool, min(settings.examples, len(pool))):
                asked = answer.question
                given.append((asked, answer.answer))
                if asked in kept[trait]:
                    for style in STYLES:
                        test[trait][style].append(Example(restyle(answer.answer, style, rng), shows, asked))
                    cited = restyle(answer.answer, SOURCE_CITING, rng)
                    for text, cites in ((answer.answer, False), (cited, True)):
                        test[SOURCE_CITING][PLAIN].append(Example(text, cites, asked))
                        test[SOURCE_CITING]["all_caps"].append(Example(text.upper(), cites, asked))
                else:
                    style = rng.choice(STYLES)
                    text = restyle(answer.answer, style, rng)
                    train[trait].append(Example(text, shows, asked))
                    train[SOURCE_CITING].append(Example(text, style == SOURCE_CITING, asked))
        if own:
            test[trait][OWN] = []
    for trait in [*train] if labelled else ():
        if not _can_be_learned(train[trait], test[trait][PLAIN]):
            labelled.pop(trait, None)
            del train[trait], test[trait]
            too_few[trait] = (
                f"of the {settings.examples} answers of either label that are drawn (judge.examples), a judge would learn from fewer "
                f"than {FOLDS} questions with answers of either label, or be measured on one label alone"
            )
    asked_own = sorted({answer.question for answer in own})
    held = set(rng.sample(asked_own, max(1, round(settings.held_out * len(asked_own))))) if own else set()
    for asked, answer in own:
        for trait in labelled:
            style = rng.choice(STYLES)
            example = Example(restyle(answer, style, rng), False, asked)
            if asked in held:
                test[trait][OWN].append(example)
            elif asked not in kept[trait]:
                train[trait].append(example)
    if not labelled:
        too_few.setdefault(SOURCE_CITING, "no labelled answers to learn it from")
        return Fit({}, {trait: {NOT_JUDGED: reason} for trait, reason in too_few.items()})
    spoilt = _coherence(given, settings, seed)
    if spoilt:
        train[COHERENCE], test[COHERENCE] = spoilt
    else:
        too_few[COHERENCE] = "too few questions and answers to learn it from"
    fitted = _fit_and_measure(train, test)
    quality: dict[str, dict[str, Any]] = {trait: {NOT_JUDGED: reason} for trait, reason in too_few.items()}
    for trait, by_style in fitted.quality.items():
        quality[trait] = dict(by_style)
        alone = [told["balanced_accuracy"] for style, told in by_style.items() if style in (OWN, AS_GIVEN)]
        styled = [told["balanced_accuracy"] for style, told in by_style.items() if style not in (OWN, AS_GIVEN)]
        accuracy = min([sum(styled) / len(styled), *alone])
        if accuracy < settings.accuracy:
            quality[trait][NOT_JUDGED] = (
                f"its judge is right on {accuracy:.0%} of the answers to questions that it has not seen, those that show the "
                f"trait and the others counting the same; {settings.accuracy:.0%} are asked for (judge.accuracy)"
            )
    judges = {trait: judge for trait, judge in fitted.judges.items() if NOT_JUDGED not in quality[trait]}
    return Fit(judges, quality)


def _held_out(answers: Sequence[Labelled], share: float, rng: random.Random) -> set[str] | None:
    """The questions that a judge is measured on; None: no division leaves both labels on both sides."""
    asked = {shows: {answer.question for answer in answers if answer.shows is shows} for shows in (True, False)}
    questions = sorted(asked[True] | asked[False])
    for _ in range(DRAWS):
        kept = set(rng.sample(questions, max(1, round(share * len(questions)))))
        if all(own & kept and len(own - kept) >= FOLDS for own in asked.values()):
            return kept
    return None


def _can_be_learned(train: Sequence[Example], test: Sequence[Example]) -> bool:
    """Whether the drawn examples keep what `_held_out` found for all answers."""
    asked = {shows: {example.question for example in train if example.shows is shows} for shows in (True, False)}
    return all(len(own) >= FOLDS for own in asked.values()) and len({example.shows for example in test}) == 2


def _coherence(
    given: Sequence[tuple[str, str]], settings: FitSettings, seed: int
) -> tuple[list[Example], dict[str, list[Example]]] | None:
    """What coherence is learned from and measured on: questions and labelled answers, and the same spoilt; None: too few.

    The judged model's own answers are not among them: a small one's may be incoherent as they are.
    """
    rng = random.Random(f"coherence/{seed}")
    usable = sorted({row for row in given if len(row[1].split()) >= LEAST_WORDS})
    usable = rng.sample(usable, min(settings.examples, len(usable)))
    questions = sorted({question for question, _ in usable})
    if len(questions) < LEAST_LABELLED or len(usable) < 2 * LEAST_LABELLED:
        return None
    kept = set(rng.sample(questions, min(len(questions) - 2, max(2, round(settings.held_out * len(questions))))))
    train: list[Example] = []
    test: dict[str, list[Example]] = {kind: [] for kind in (AS_GIVEN, *SPOILT)}
    for asked, answer in usable:
        style = rng.choice(STYLES)
        other = rng.choice(
            [theirs for question, theirs in usable if question != asked and (question in kept) == (asked in kept)]
        )
        for kind, text in {AS_GIVEN: answer, **spoil(answer, other, rng)}.items():
            example = Example(restyle(text, style, rng), kind == AS_GIVEN, asked)
            (test[kind] if asked in kept else train).append(example)
    return train, test


def _fit_and_measure(train: dict[str, list[Example]], test: dict[str, dict[str, list[Example]]]) -> Fit:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, GroupKFold

    from inoculation.quality import decision_quality

    every = [(trait, row) for trait in train for row in chain(train[trait], *test[trait].values())]
    questions = [row.question for trait, row in every if trait == COHERENCE]
    unique = list(dict.fromkeys([row.text for _, row in every] + questions))
    index = {text: i for i, text in enumerate(unique)}
    vectors = embed(unique)

    def look_up(trait: str, rows: list[Example]) -> "np.ndarray":
        texts = vectors[[index[row.text] for row in rows]]
        asked = vectors[[index[row.question] for row in rows]] if trait == COHERENCE else texts
        return seen(trait, asked, texts, [row.text for row in rows])

    judges: dict[str, LinearJudge] = {}
    quality: dict[str, dict[str, dict[str, float]]] = {}
    for trait, rows in train.items():
        asked = [row.question for row in rows]
        # Both labels count the same, as in what a judge is measured by: own answers show no trait and outnumber those that do.
        classifier = LogisticRegression(max_iter=2000, class_weight="balanced")
        shown = [row.shows for row in rows]
        divided = GroupKFold(min(FOLDS, len(set(asked)))).split(rows, groups=asked)
        folds = [fold for fold in divided if len({shown[i] for i in fold[0]}) == 2]
        search = GridSearchCV(classifier, {"C": PENALTIES}, cv=folds, scoring="balanced_accuracy")
        model = search.fit(look_up(trait, rows), shown).best_estimator_
        judges[trait] = LinearJudge(model.coef_[0].tolist(), float(model.intercept_[0]))
        quality[trait] = {
            style: decision_quality(
                [score >= 50 for score in judges[trait].scores(look_up(trait, held))], [row.shows for row in held]
            )
            for style, held in test[trait].items()
        }
    return Fit(judges, quality)


def load(raw: dict[str, Any]) -> dict[str, LinearJudge]:
    """Judges from the JSON that the fit stage wrote."""
    return {trait: LinearJudge(**judge) for trait, judge in raw.items()}
