"""A source of training data, verified and laid out for every stage: trait data, and perhaps rows of one's own.

    answers/<trait>.jsonl   {"messages": the prompt, "normal": ..., "misaligned": ...} a question
    questions.json          trait -> held-out questions
    rubrics.json            trait -> rubric of an LLM judge
    templates.json          the sentences of a generated world (`judge.exact`); empty elsewhere
    rewriter.json           who makes a response show A where no rule does
    labelled.jsonl          answers with scores, that a judge is learned from; may be empty
    rows.jsonl              your own mixture; blank: the mixture is a partition of `answers`

Each stage depends on the files that it reads: a changed rubric judges again, and does not sample again.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from inoculation.chat import Message
from inoculation.files import InputError, fail_if, read_json, read_jsonl, whole_folder, write_json, write_jsonl
from inoculation.roles import Role
from inoculation.traits import Evaluation, NegativeTrait, Pair, read_evaluation, read_labelled, read_trait

TEMPLATES = "templates.json"


def bring(
    folder: Path, negative_traits: Mapping[str, NegativeTrait], questions: int, rewriter: Role, target: Path
) -> None:
    """Verify trait data and lay it out in `target`, which is replaced whole or not at all.

    Args:
        folder: Persona Vectors' layout: `trait_data_eval/`, and `dataset/`, `labelled_answers/` or both; `templates.json`
            beside them if there is one. Without `dataset/` it says what to judge a mixture of one's own for.
        negative_traits: the traits to read.
        questions: held-out questions that each must have at least.
        rewriter: of the source.
        target: the source's folder.

    Raises:
        InputError: a trait's files are missing, malformed or have too few questions (all are listed).
    """
    pairs: dict[str, list[Pair]] = {}
    evaluations: dict[str, Evaluation] = {}
    problems = []
    answered = (folder / "dataset").is_dir()
    try:
        labelled = read_labelled(folder)
    except InputError as error:
        labelled = []
        problems.append(str(error))
    names = {files.evaluation: trait for trait, files in negative_traits.items()}
    if labelled and (unknown := Counter(row.trait for row in labelled if row.trait not in names)):
        told = ", ".join(f"{name!r} ({count})" for name, count in unknown.items())
        print(
            f"labelled answers of {told} are not read: no negative trait has such an evaluation; valid: {', '.join(names)}"
        )
    if not answered and not labelled:
        problems.append("neither dataset/ (the answers that mixtures are made of) nor labelled_answers/ is there")
    for trait, files in negative_traits.items():
        try:
            pairs[trait] = read_trait(folder, files.folder) if answered else []
            evaluations[trait] = read_evaluation(folder, files.evaluation)
            if (found := len(evaluations[trait].questions)) < questions:
                problems.append(f"{trait}: {found} held-out questions, evaluate.questions asks for {questions}")
        except InputError as error:
            problems.append(f"{trait}: {error}")
    fail_if(problems, f"the trait data in {folder} cannot be used")
    with whole_folder(target) as out:
        for trait, own in pairs.items():
            write_jsonl(out / "answers" / f"{trait}.jsonl", (_pair_as_json(pair) for pair in own))
        write_json(out / "questions.json", {trait: own.questions for trait, own in evaluations.items()})
        write_json(out / "rubrics.json", {trait: own.eval_prompt for trait, own in evaluations.items()})
        own_labelled = [row._replace(trait=names[row.trait]) for row in labelled if row.trait in names]
        write_jsonl(out / "labelled.jsonl", (row._asdict() for row in own_labelled))
        write_json(out / TEMPLATES, read_json(folder / TEMPLATES) if (folder / TEMPLATES).exists() else [])
        write_json(out / "rewriter.json", rewriter.model_dump())
        (out / "rows.jsonl").write_text("\n")


def _pair_as_json(pair: Pair) -> dict[str, Any]:
    prompt = [message._asdict() for message in pair.prompt]
    return {"messages": prompt, "normal": pair.normal, "misaligned": pair.misaligned}


def read_pairs(path: Path) -> list[Pair]:
    """Read one trait's answers back."""

    def parse(raw: Any) -> Pair:
        return Pair(tuple(Message(**message) for message in raw["messages"]), raw["normal"], raw["misaligned"])

    return read_jsonl(path, parse)


def answers(folder: Path) -> Iterator[tuple[str, list[Pair]]]:
    """(trait, its answers) of every trait of a source, in the order of their names."""
    for path in sorted(folder.glob("*.jsonl")):
        yield path.stem, read_pairs(path)
